"""Latents: images through the encoder of a VAE, once, into a cache that train.py reads; and back through its decoder.

    python -m data.latents --dataset celebahq --res 256 --data DIR                        one process
    torchrun --nproc_per_node=8 -m data.latents --dataset imagenet --res 256 --data DIR   eight, the same bytes

(On the same hardware; on CPUs with as many threads too, since sums round by their order.) The same command continues
after a stop or a kill. The cache, latents/DATASET-RES-VAE/SPLIT:

    moments.f16   float16 (N, 2, 2C, h, w): of image i and of its mirror image, mean and standard deviation of the
                  posterior (a latent cannot be mirrored; a mirrored image can be encoded). Training draws from it
    labels.npy    int64 (N,); -1 for an image that was left out
    vectors.npy   float32 (N, dim), with --condition vectors only
    header.json   what it was made of and how; train.py refuses a cache that does not match its run
"""

import hashlib
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
from config import UserError, explain
from data import sources
from run import checkpoint
from run.paper import standard_vae
from run.ranks import Ranks


class Autoencoder:
    """diffusers' AutoencoderKL, frozen. Models see (z - shift) * scale per channel, both from its own configuration.

    name: a folder, or OWNER/NAME[@REVISION] on the hub. expect: the `facts` of the one that made the latents; another
    one raises UserError.
    """

    PIXELS = 2**20                                          # at a time: one image of 1024 x 1024; bounds the memory

    def __init__(self, name: str, device: torch.device | str, expect: dict | None = None):
        from diffusers import AutoencoderKL

        folder = Path(name)
        if not folder.is_dir():
            folder = sources.download(name, ["config.json", "*.safetensors", "*.bin"])
        if not (folder / "config.json").exists() and (folder / "vae").is_dir():
            folder = folder / "vae"                         # a whole pipeline
        with explain(f"there is no AutoencoderKL of diffusers in {folder}"):
            vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True,
                                                low_cpu_mem_usage=False)            # needs no accelerate
        channels, digest = vae.config.latent_channels, hashlib.sha256()
        for key, tensor in sorted(vae.state_dict().items()):
            digest.update(key.encode() + tensor.float().numpy().tobytes())
        mean, std = (getattr(vae.config, key, None) for key in ("latents_mean", "latents_std"))
        self.facts = {
            "name": name, "revision": folder.name if folder.parent.name == "snapshots" else "",
            "sha256": digest.hexdigest(), "precision": "float32",
            "factor": 2 ** (len(vae.config.block_out_channels) - 1),
            "shift": [float(m) for m in mean] if mean else [float(vae.config.shift_factor or 0)] * channels,
            "scale": [vae.config.scaling_factor / float(s) for s in (std or [1.0] * channels)]}
        for key in ("sha256", "shift", "scale") if expect else ():
            if expect[key] != self.facts[key]:
                raise UserError(f"the autoencoder {name} is not the one that made the latents of this run: its {key} "
                                "differs. A decoder of another VAE gives wrong colours; use the same one")
        self.vae = vae.eval().requires_grad_(False).to(device)
        self.channels, self.factor = channels, self.facts["factor"]
        self.shift, self.scale = (torch.tensor(self.facts[key], device=device).view(-1, 1, 1)
                                  for key in ("shift", "scale"))

    @torch.no_grad()
    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, R, R) in [-1, 1] -> mean and standard deviation of the posterior (B, 2C, R/f, R/f), float32."""
        chunk = max(1, self.PIXELS // (x.shape[-1] * x.shape[-2]))
        parts = [self.vae.encode(part).latent_dist for part in x.split(chunk)]
        return torch.cat([torch.cat([part.mean, part.std], dim=1) for part in parts])

    @torch.no_grad()
    def decode(self, x1: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, C, h, w) -> images (B, 3, R, R), about in [-1, 1], a few at a time."""
        z = x1.to(self.scale.device) / self.scale + self.shift
        chunk = max(1, self.PIXELS // (z.shape[-1] * z.shape[-2] * self.factor**2))
        return torch.cat([self.vae.decode(part).sample for part in z.split(chunk)])


def read_header(folder: Path) -> dict | None:
    """header.json of a latent cache, None without one. Raises UserError when it is not one of ours."""
    header = checkpoint.read_json(folder / "header.json", "header of a latent cache")
    if header is None:
        return None
    kinds = {"complete": bool, "dataset": str, "split": str, "res": int, "fingerprint": str, "count": int}
    wrong = [name for name, kind in kinds.items() if type(header.get(name)) is not kind]        # true is not a count
    wrong += what_is_wrong(header, header.get("vae") or {})
    if wrong or header["count"] < 1:
        wrong = ", ".join(wrong) or "count"
        raise UserError(f"{folder / 'header.json'} is not the header of a latent cache: wrong {wrong}")
    return header


def what_is_wrong(facts: dict, latent: dict | None) -> list[str]:
    """Entries of a header, or of the `facts` of a run on latents of this autoencoder, that are impossible."""
    channels, classes, vectors = (facts.get(name) for name in ("channels", "classes", "vectors"))

    def is_size(value, most=2**14):
        return type(value) is int and 0 < value <= most

    def are_floats(values):
        return (isinstance(values, list) and len(values) == channels
                and all(isinstance(v, float) and math.isfinite(v) for v in values))

    right = {"channels": is_size(channels), "side": is_size(facts.get("side")),
             "classes": isinstance(classes, list) and all(isinstance(name, str) for name in classes),
             "vectors": vectors is None or (isinstance(vectors, list) and len(vectors) == 2
                                            and all(is_size(value, 2**16) for value in vectors)),
             "vae": latent is None or (isinstance(latent, dict) and isinstance(latent.get("sha256"), str)
                                       and are_floats(latent.get("shift")) and are_floats(latent.get("scale")))}
    return [name for name in right if not right[name]]


class Cache:
    """A cache while it is being written. Chunk c holds images c B .. (c + 1) B, whichever process encodes it.

    A chunk is written, flushed to the disk, and only then noted, in one line of this process's own file. So a kill at
    any moment costs the chunks in flight, and the bytes do not depend on kills or on the number of processes.
    """

    def __init__(self, folder: Path, header: dict, source: sources.Source, vae: Autoencoder, ranks: Ranks):
        self.folder, self.header, self.source, self.vae, self.ranks = folder, header, source, vae, ranks
        self.row = 2 * 2 * header["channels"] * header["side"] ** 2 * 2             # bytes of one image
        self.chunks = sources.chunks_of(len(source), header["batch"])

    def prepare(self, vectors: np.ndarray | None) -> None:
        """By the first process: makes room, or checks that the files there belong to the same job."""
        header, size = read_header(self.folder), len(self.source) * self.row
        if header is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.forget_notes()
            free = shutil.disk_usage(self.folder).free
            if free < 1.02 * size:
                raise UserError(f"the cache needs {size / 2**30:.1f} GiB, but there are {free / 2**30:.1f} GiB free "
                                f"for {self.folder}")
            with open(self.folder / "moments.f16", "wb") as file:
                file.truncate(size)
            self.write_header(self.header)
        elif differ := [key for key in self.header if key not in ("complete", "where")
                        and header.get(key) != self.header[key]]:
            raise UserError(f"{self.folder} holds another cache: {', '.join(differ)} differ. Choose another directory "
                            "with --out, or delete this one")
        if vectors is not None:                             # may be added to a cache that is complete
            np.save(self.folder / "vectors.npy", vectors)

    def write_header(self, header: dict) -> None:
        temporary = self.folder / "header.tmp"
        temporary.write_text(json.dumps(header, indent=2) + "\n")
        os.replace(temporary, self.folder / "header.json")

    def notes(self) -> dict[int, dict]:
        """Chunk number -> its note, of the chunks that are written."""
        notes = checkpoint.read_lines(self.folder.glob("progress-*.jsonl"))
        return {note["chunk"]: note for note in notes if "chunk" in note}

    def forget_notes(self) -> None:
        for file in self.folder.glob("progress-*.jsonl"):
            file.unlink()

    def fill(self, workers: int, skip_bad: bool) -> None:
        """Encodes and writes the chunks that are missing, each process its share; threads read one chunk ahead."""
        ranks, chunks = self.ranks, self.chunks
        written = ranks.share(self.notes() if ranks.first else None)
        todo = [c for c in range(len(chunks)) if c not in written]
        if written:
            ranks.say(f"going on in {self.folder}: {len(chunks) - len(todo)} of {len(chunks)} chunks were there")

        def read(i):
            return self.source.image_or_problem(i, self.header["res"], skip_bad)

        bar = tqdm(total=len(self.source), initial=len(self.source) - sum(len(chunks[c]) for c in todo),
                   desc="encoding", unit="img", mininterval=1, disable=not ranks.first)
        with ThreadPoolExecutor(max(1, workers)) as pool, bar:
            own = todo[ranks.rank :: ranks.world]
            waiting = (pool.map(read, chunks[c]) for c in own)                      # next() starts reading a chunk
            ahead = next(waiting, ())
            for c in own:
                images, ahead = list(ahead), next(waiting, ())
                self.write(c, *self.encode(chunks[c], images))
                bar.update(min(len(images) * ranks.world, bar.total - bar.n))
        ranks.barrier()

    def encode(self, numbers: range, images: list[tuple[np.ndarray, str]]) -> tuple[np.ndarray, dict]:
        """Moments (B, 2, 2C, h, w) float16 of images and of their mirror images, and a note about them."""
        pixels = np.stack([image for image, _ in images])                           # (B, 3, R, R)
        x = torch.from_numpy(pixels).to(self.ranks.device).float() / 127.5 - 1
        moments = torch.stack([self.vae.moments(x), self.vae.moments(x.flip(-1))], dim=1).cpu().half()
        finite = moments.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            name = self.source.names[numbers[int((~finite).nonzero()[0])]]
            raise UserError(f"the VAE gives values that are not finite for {name!r}")
        bad = {i: problem for i, (_, problem) in zip(numbers, images, strict=True) if problem}
        return moments.numpy(), {"bad": bad}

    def write(self, chunk: int, moments: np.ndarray, note: dict) -> None:
        with open(self.folder / "moments.f16", "r+b") as file:
            file.seek(chunk * self.header["batch"] * self.row)
            file.write(moments.tobytes())
            file.flush()
            os.fsync(file.fileno())
        checkpoint.append_line(self.folder / f"progress-{self.ranks.rank}.jsonl", {"chunk": chunk, **note})

    def complete(self) -> None:
        """By the first process, when all chunks are written: labels, names, the final header."""
        bad = {int(i): problem for note in self.notes().values() for i, problem in note["bad"].items()}
        labels = np.array(self.source.labels, np.int64)
        if len(bad) == len(labels):
            raise UserError(f"none of the {len(bad)} images of {self.source.where} can be read: {bad[0]}")
        labels[list(bad)] = -1
        np.save(self.folder / "labels.npy", labels)
        left_out = [f"{i}: {problem}" for i, problem in sorted(bad.items())]
        self.write_header({**self.header, "complete": True, "left_out": left_out})
        self.forget_notes()


def encode(dataset: str, res: int, data: str, vae: str, out: Path, split: str = "train", condition: str = "labels",
           batch: int = 16, workers: int = 4, skip_bad: bool = False, device: str | None = None) -> dict:
    """Encodes a data set into `out`, or goes on with it. Returns the header. Raises UserError for what goes wrong."""
    with Ranks.start(device) as ranks, explain(
            f"encoding into {out} stopped", "; the same command goes on from there", OSError):
        source = sources.open_source(dataset, data, split)
        torch.backends.cudnn.allow_tf32 = False
        autoencoder = Autoencoder(vae, ranks.device)
        if res % autoencoder.factor:
            raise UserError(f"--res {res} is not divisible by {autoencoder.factor}, the factor of the VAE {vae}")
        header = {"complete": False, "dataset": dataset, "split": split, "where": data, "res": res,
                  "count": len(source), "channels": autoencoder.channels, "side": res // autoencoder.factor,
                  "batch": batch, "crop": "ADM: box halving, bicubic, centre", "classes": source.classes,
                  "fingerprint": source.fingerprint, "vae": autoencoder.facts}
        cache = Cache(out, header, source, autoencoder, ranks)
        ranks.first_does(lambda: cache.prepare(source.vectors() if condition == "vectors" else None))
        if read_header(out)["complete"]:
            ranks.say(f"{out} is complete already")
        else:
            ranks.first_does(lambda: source.warn_of_small(res))
            cache.fill(workers, skip_bad)
            ranks.first_does(cache.complete)
        return read_header(out)


def main() -> None:
    parser = config.parser(__doc__, "python -m data.latents --dataset NAME --res N --data DIR [options]")
    parser.add_argument("--dataset", default="folder", choices=("celebahq", "imagenet", "folder"), help="[folder]")
    parser.add_argument("--res", type=int, default=256, help="height and width of the images in pixels [256]")
    parser.add_argument("--data", default="", help="folder, zip, parquet file, or hf:OWNER/NAME@REVISION")
    parser.add_argument("--split", default="train", help="which split, where the data have several [train]")
    parser.add_argument("--condition", default="labels", choices=config.CHOICES["condition"],
                        help="vectors: store vectors.npy too, for train.py --condition vectors [labels]")
    parser.add_argument("--vae", help="folder, or OWNER/NAME[@REVISION] on the hub [that of the paper for this --res]")
    parser.add_argument("--out", help="directory of the cache [latents/DATASET-RES-VAE/SPLIT]")
    parser.add_argument("--batch", type=int, default=16, help="images at a time; part of the cache's identity [16]")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that read images")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read: they are named")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    args = parser.parse_args()
    if args.res < 8 or args.batch < 1:
        raise UserError("--res must be at least 8 and --batch at least 1")
    args.vae = args.vae or standard_vae(args.res)
    args.out = Path(args.out or config.cache_folder(args.dataset, args.res, args.vae, args.split))
    header = encode(**vars(args))
    if int(os.environ.get("RANK", 0)) == 0:
        for name in header["left_out"]:
            print(f"left out   {name}")
        left_out = len(header["left_out"])
        print(f"cache      {args.out}: {header['count'] - left_out:,} images of {header['res']} pixels, "
              f"{len(header['classes'])} classes, {left_out} left out")
        print(f"next       python train.py --dataset {args.dataset} --res {args.res} --vae {args.vae} --latents "
              f"{args.out}{' --condition vectors' if args.condition == 'vectors' else ''}")


if __name__ == "__main__":
    config.run(main)
