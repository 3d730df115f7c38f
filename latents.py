"""Latents: images through the encoder of a VAE, once, into a cache that train.py reads; and back through its decoder.

    python latents.py --dataset celebahq --res 256 --data DIR                        one process
    torchrun --nproc_per_node=8 latents.py --dataset imagenet --res 256 --data DIR   eight, the same bytes

(The same on the same hardware; on CPUs with as many threads for each process too, since sums round by their order.)
The same command continues after a stop or a kill; what was written stays. The cache, latents/DATASET-RES-VAE/SPLIT:

    moments.f16   float16 (N, 2, 2C, h, w): of image i and of its mirror image, mean and standard deviation of the
                  posterior (a latent cannot be mirrored; a mirrored image can be encoded). Training draws from it
    labels.npy    int64 (N,); -1 for an image that was left out
    header.json   what it was made of and how; train.py refuses a cache that does not match its run
    names.txt     the images, in order

The latents that a model sees are (z - shift) * scale per channel, both from the VAE's own configuration.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import config

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python latents.py --dataset NAME --res N --data DIR [options]")
    PARSER.add_argument("--dataset", default="folder", choices=("celebahq", "imagenet", "folder"), help="[folder]")
    PARSER.add_argument("--res", type=int, default=256, help="height and width of the images in pixels [256]")
    PARSER.add_argument("--data", default="", help="folder, zip, parquet, LMDB, or hf:OWNER/NAME@REVISION")
    PARSER.add_argument("--split", default="train", help="which split, where the data have several [train]")
    PARSER.add_argument("--vae", help="folder, or OWNER/NAME[@REVISION] on the hub [that of the paper for this --res]")
    PARSER.add_argument("--out", help="directory of the cache [latents/DATASET-RES-VAE/SPLIT]")
    PARSER.add_argument("--batch", type=int, default=16, help="images at a time; part of the cache's identity [16]")
    PARSER.add_argument("--precision", default="float32", choices=config.PRECISIONS, help="of the VAE")
    PARSER.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that read images")
    PARSER.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read: they are named")
    PARSER.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    ARGUMENTS = PARSER.parse_args()

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import ranks as processes
import sources
from config import UserError, first_line


class Autoencoder:
    """diffusers' AutoencoderKL, with the normalisation its own configuration asks for. Frozen, outside autocast.

    name: a folder, or OWNER/NAME[@REVISION] on the hub. expect: the `facts` of the one that made the latents.
    Raises UserError when it cannot be loaded, and when it is not the expected one.
    """

    PIXELS = 2**20                                          # at a time: one image of 1024 x 1024; bounds the memory

    def __init__(self, name: str, device: torch.device | str, precision: str = "float32", expect: dict | None = None):
        from diffusers import AutoencoderKL

        folder = Path(name)
        if not folder.is_dir():
            folder = sources.download(name, ["config.json", "*.safetensors", "*.bin"])
        try:
            if not (folder / "config.json").exists() and (folder / "vae").is_dir():
                folder = folder / "vae"                     # a whole pipeline
            vae = AutoencoderKL.from_pretrained(folder, torch_dtype=getattr(torch, precision), local_files_only=True,
                                                low_cpu_mem_usage=False)            # needs no accelerate
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as problem:
            raise UserError(f"there is no AutoencoderKL of diffusers in {folder}: {first_line(problem)}") from None
        channels, digest = vae.config.latent_channels, hashlib.sha256()
        for key, tensor in sorted(vae.state_dict().items()):
            digest.update(key.encode() + tensor.float().numpy().tobytes())
        self.vae = vae.eval().requires_grad_(False).to(device)
        mean, std = (getattr(vae.config, key, None) for key in ("latents_mean", "latents_std"))
        self.facts = {
            "name": name, "revision": folder.name if folder.parent.name == "snapshots" else "",
            "sha256": digest.hexdigest(), "precision": precision,
            "factor": 2 ** (len(vae.config.block_out_channels) - 1),
            "shift": [float(m) for m in mean] if mean else [float(vae.config.shift_factor or 0)] * channels,
            "scale": [vae.config.scaling_factor / float(s) for s in (std or [1.0] * channels)]}
        self.channels, self.factor, self.dtype = channels, self.facts["factor"], self.vae.dtype
        for key in ("sha256", "shift", "scale") if expect else ():
            if expect[key] != self.facts[key]:
                raise UserError(f"the autoencoder {name} is not the one that made the latents of this run: its {key} "
                                "differs. A decoder of another VAE gives wrong colours; use the same one")
        self.shift, self.scale = (torch.tensor(self.facts[key], device=device).view(-1, 1, 1)
                                  for key in ("shift", "scale"))

    @torch.no_grad()
    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, R, R) in [-1, 1] -> mean and standard deviation of the posterior (B, 2C, R/f, R/f), float32."""
        chunk = max(1, self.PIXELS // (x.shape[-1] * x.shape[-2]))
        parts = [self.vae.encode(part.to(self.dtype)).latent_dist for part in x.split(chunk)]
        return torch.cat([torch.cat([part.mean, part.std], dim=1).float() for part in parts])

    @torch.no_grad()
    def decode(self, x1: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, C, h, w) -> images (B, 3, R, R), about in [-1, 1], a few at a time."""
        z = (x1.to(self.scale.device) / self.scale + self.shift).to(self.dtype)
        chunk = max(1, self.PIXELS // (z.shape[-1] * z.shape[-2] * self.factor**2))
        return torch.cat([self.vae.decode(part).sample.float() for part in z.split(chunk)])


class Cache:
    """The directory while it is being written. Chunk c holds images c B .. (c + 1) B, whoever encodes it.

    A chunk is written, flushed to the disk, and only then noted, in one line of a file of this process's own. So a kill
    at any moment costs the chunks in flight, and the bytes do not depend on kills or on the number of processes.
    """

    def __init__(self, folder: Path, header: dict, rank: int):
        self.folder, self.header, self.rank = folder, header, rank
        self.row = 2 * 2 * header["channels"] * header["side"] ** 2 * 2             # bytes of one image

    def prepare(self, names: list[str], labels: list[int]) -> None:
        """By the first process: creates the files, or checks that those there are of the same job."""
        found = data.read_header(self.folder)
        if found is not None:
            differ = [key for key in self.header if key not in ("complete", "where") and
                      found.get(key) != self.header[key]]
            if differ:
                raise UserError(f"{self.folder} holds another cache: {', '.join(differ)} differ. Choose another "
                                "directory with --out, or delete this one")
            return
        need = len(names) * self.row
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("progress-*.jsonl"):
            stale.unlink()
        free = shutil.disk_usage(self.folder).free
        if free < 1.02 * need:
            raise UserError(f"the cache needs {need / 2**30:.1f} GiB, but there are {free / 2**30:.1f} GiB free for "
                            f"{self.folder}")
        with open(self.folder / "moments.f16", "wb") as file:
            file.truncate(need)
        np.save(self.folder / "labels.npy", np.array(labels, np.int64))
        (self.folder / "names.txt").write_bytes(("\n".join(names) + "\n").encode(errors="surrogateescape"))
        self.write_header(self.header)

    def write_header(self, header: dict) -> None:
        temporary = self.folder / "header.tmp"
        temporary.write_text(json.dumps(header, indent=2) + "\n")
        os.replace(temporary, self.folder / "header.json")

    def notes(self) -> dict[int, dict]:
        """What is known of the finished chunks, by number."""
        notes = checkpoint.read_lines(self.folder.glob("progress-*.jsonl"))
        return {note["chunk"]: note for note in notes if "chunk" in note}

    def write(self, chunk: int, moments: np.ndarray, note: dict) -> None:
        with open(self.folder / "moments.f16", "r+b") as file:
            file.seek(chunk * self.header["batch"] * self.row)
            file.write(moments.tobytes())
            file.flush()
            os.fsync(file.fileno())
        checkpoint.append_line(self.folder / f"progress-{self.rank}.jsonl", {"chunk": chunk, **note})

    def complete(self) -> dict:
        """By the first process, when all chunks are there: labels of left out images, statistics, the final header."""
        notes = [note for _, note in sorted(self.notes().items())]
        bad = {int(i): why for note in notes for i, why in note["bad"].items()}
        if len(bad) == self.header["count"]:
            raise UserError(f"none of the {len(bad)} images of {self.header['where']} can be read: {bad[0]}")
        labels = np.load(self.folder / "labels.npy", allow_pickle=False)
        labels[list(bad)] = -1
        np.save(self.folder / "labels.tmp.npy", labels)
        os.replace(self.folder / "labels.tmp.npy", self.folder / "labels.npy")
        count = 2 * self.header["side"] ** 2 * (len(labels) - len(bad))
        mean = np.sum([note["sum"] for note in notes], axis=0) / count
        std = np.sqrt(np.sum([note["square"] for note in notes], axis=0) / count - mean**2)
        shift, scale = (np.array(self.header["vae"][key]) for key in ("shift", "scale"))
        header = {**self.header, "complete": True, "left_out": [f"{i}: {why}" for i, why in sorted(bad.items())],
                  "latent_mean": ((mean - shift) * scale).tolist(), "latent_std": (std * scale).tolist(),
                  "pixels_sha256": hashlib.sha256("".join(n["pixels"] for n in notes).encode()).hexdigest()}
        self.write_header(header)
        for file in self.folder.glob("progress-*.jsonl"):
            file.unlink()
        return header


def encode_chunk(source: sources.Source, numbers: range, images: list, vae: Autoencoder, device: torch.device,
                 skip_bad: bool) -> tuple[np.ndarray, dict]:
    """Moments (B, 2, 2C, h, w) float16 of some images and their mirror images, and a note about them."""
    pixels = np.stack([image for image, _ in images])                               # (B, 3, R, R)
    bad = {i: why for i, (_, why) in zip(numbers, images, strict=True) if why}
    if bad and not skip_bad:
        raise UserError(f"{next(iter(bad.values()))}, or leave out such images with --skip-bad")
    x = torch.from_numpy(pixels).to(device).float() / 127.5 - 1
    both = torch.stack([vae.moments(x), vae.moments(x.flip(-1))], dim=1).cpu()      # (B, 2, 2C, h, w)
    finite = both.half().isfinite().flatten(1).all(dim=1)
    if not finite.all():
        name = source.names[numbers[int((~finite).nonzero()[0])]]
        raise UserError(f"the VAE gives values that are not finite for {name!r}: try --precision float32")
    good = [n for n, i in enumerate(numbers) if i not in bad]
    mean, std = both.half().double()[good].chunk(2, dim=2)
    note = {"bad": bad, "pixels": hashlib.sha256(pixels.tobytes()).hexdigest(),
            "sum": mean.sum(dim=(0, 1, 3, 4)).tolist(),
            "square": (mean.square() + std.square()).sum(dim=(0, 1, 3, 4)).tolist()}
    return both.half().numpy(), note


def encode(dataset: str, res: int, where: str, vae_name: str, out: Path, split: str = "train", batch: int = 16,
           precision: str = "float32", workers: int = 4, skip_bad: bool = False, device: str | None = None) -> dict:
    """Encodes a data set into `out`, or goes on with it. Returns the header. Raises UserError for what goes wrong."""
    ranks = processes.Ranks.start(device)
    try:
        source = sources.open_source(dataset, where, split)
        if dataset == "celebahq" and len(source) not in (27_000, 30_000):
            ranks.say(f"warning: CelebA-HQ has 30,000 images (27,000 for training in NVAE and LFM), {where} has "
                      f"{len(source):,}")
        torch.backends.cudnn.allow_tf32 = False             # full float32 where float32 is asked for
        vae = Autoencoder(vae_name, ranks.device, precision)
        if res % vae.factor:
            raise UserError(f"--res {res} does not divide by the {vae.factor} of the VAE {vae_name}")
        header = {"complete": False, "dataset": dataset, "split": split, "where": where, "res": res,
                  "count": len(source), "channels": vae.channels, "side": res // vae.factor, "batch": batch,
                  "crop": "ADM: box halving, bicubic, centre", "classes": source.classes,
                  "fingerprint": source.fingerprint, "vae": vae.facts}
        cache = Cache(out, header, ranks.rank)
        ranks.first_does(lambda: cache.prepare(source.names, source.labels))
        if data.read_header(out)["complete"]:
            ranks.say(f"{out} is complete already")
            return data.read_header(out)
        done = ranks.share(cache.notes() if ranks.first else None)
        todo = [c for c in range(-(-len(source) // batch)) if c not in done]
        if done:
            ranks.say(f"going on in {out}: {len(done)} of {len(done) + len(todo)} chunks were there")
        chunks = {c: range(c * batch, min((c + 1) * batch, len(source))) for c in todo[ranks.rank :: ranks.world]}

        def read(i):
            try:
                return source.image(i, res), None
            except UserError as problem:
                return np.zeros((3, res, res), np.uint8), str(problem)

        with ThreadPoolExecutor(max(1, workers)) as pool, tqdm(
                total=len(source), initial=len(source) - sum(min(batch, len(source) - c * batch) for c in todo),
                desc="encoding", unit="img", disable=not ranks.first) as bar:
            waiting = list(chunks)
            ahead = pool.map(read, chunks[waiting[0]]) if waiting else None         # starts reading at once
            for place, chunk in enumerate(waiting):
                images = list(ahead)
                if place + 1 < len(waiting):
                    ahead = pool.map(read, chunks[waiting[place + 1]])
                cache.write(chunk, *encode_chunk(source, chunks[chunk], images, vae, ranks.device, skip_bad))
                bar.update(min(len(images) * ranks.world, bar.total - bar.n))
        ranks.barrier()
        ranks.first_does(cache.complete)
        return data.read_header(out)
    except OSError as problem:
        raise UserError(f"encoding into {out} stopped: {problem}; the same command goes on from there") from None
    finally:
        ranks.stop()


def main(args: argparse.Namespace) -> None:
    if args.res < 8 or args.batch < 1:
        raise UserError("--res must be at least 8 and --batch at least 1")
    vae = args.vae or config.standard_vae(args.res)
    out = Path(args.out or config.cache_folder(args.dataset, args.res, vae, args.split))
    header = encode(args.dataset, args.res, args.data, vae, out, args.split, args.batch, args.precision, args.workers,
                    args.skip_bad, args.device)
    if int(os.environ.get("RANK", 0)) == 0:
        for said in header["left_out"]:
            print(f"left out   {said}")
        mean, std = (" ".join(f"{v:.3f}" for v in header[key]) for key in ("latent_mean", "latent_std"))
        images, side = header["count"] - len(header["left_out"]), header["side"]
        print(f"cache      {out}: {images:,} images of {header['res']} pixels, {len(header['classes'])} classes, "
              f"{len(header['left_out'])} left out")
        print(f"latents    {header['channels']} x {side} x {side}, by channel mean {mean}, std {std}")
        print(f"next       python train.py --dataset {args.dataset} --res {args.res} --vae {vae} --latents {out}")


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except UserError as problem:
        sys.exit(f"error: {problem}")
