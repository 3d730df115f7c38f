"""Images, labels, and every random number of the project.

Two rules make runs repeatable:

* Training: all randomness of step k comes from one generator seeded by (seed, k) and is drawn for the whole global
  batch; a process keeps its own rows. So a step does not depend on how many processes share it, and a resumed run
  needs no saved generator state.
* Sampling: image i has its own generator seeded by (seed, i), so it does not depend on the batch it is drawn in.
"""

import math
import os
import random
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import checkpoint
import sources
from config import Config, UserError, first_line

# ---------------------------------------------------------------------------------------------------------------------
# randomness


class BatchRandom:
    """Random numbers of one training step: drawn for `batch` examples, of which this process keeps `rows`."""

    def __init__(self, seed: int, step: int, batch: int, rows: slice | None = None,
                 device: torch.device | str = "cpu"):
        self.rows, self.batch, self.device = rows or slice(0, batch), batch, device
        # torch's CPU generator reads 32 bits of its seed: consecutive steps of one run must differ in those
        self.generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
        self.shared = random.Random(f"{seed} {step}")

    def rand(self, *shape: int) -> torch.Tensor:
        """Uniform in [0, 1), (rows, *shape)."""
        return torch.rand(self.batch, *shape, generator=self.generator, device=self.device)[self.rows]

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normal, (rows, *shape)."""
        return torch.randn(self.batch, *shape, generator=self.generator, device=self.device)[self.rows]

    def choice(self, shares: list[float]) -> int:
        """One index, drawn with these probabilities, the same for every row and every process."""
        return self.shared.choices(range(len(shares)), shares)[0]

    def randint(self, high: int) -> int:
        """One integer in [0, high), the same for every row and every process."""
        return self.shared.randrange(high)


class ImageRandom:
    """Gaussians of the images with the given numbers: image i draws from a generator seeded by (seed, i)."""

    def __init__(self, seed: int, numbers: Iterable[int], device: torch.device | str = "cpu"):
        self.generators = [np.random.Generator(np.random.Philox(key=[seed, int(i)])) for i in numbers]
        self.device = device

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normal, (images, *shape)."""
        draws = np.stack([g.standard_normal(shape, dtype=np.float32) for g in self.generators])
        return torch.from_numpy(draws).to(self.device)


@lru_cache(maxsize=2)
def _epoch(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def order(count: int, seed: int, start: int, length: int) -> np.ndarray:
    """Entries start..start+length-1 of an endless list of shuffled epochs over `count` examples."""
    places = np.arange(start, start + length)
    return np.concatenate([_epoch(count, seed, int(e))[places[places // count == e] % count]
                           for e in np.unique(places // count)])


def read_step(dataset: "Dataset", cfg: Config, step: int, rows: list[slice]) -> list[tuple]:
    """(raw, y) of each of the given rows of the global batch. Which images a step takes, and which of them are
    mirrored, depends on the seed and the step alone."""
    index = order(len(dataset), cfg.seed, step * cfg.batch, cfg.batch)
    u = np.random.Generator(np.random.Philox(key=[cfg.seed, 2**63 + step])).random((cfg.batch, 3))
    return [dataset.read(index[part], u[part]) for part in rows]


def read_ahead(dataset: "Dataset", cfg: Config, step: int, rows: list[slice],
               pin: bool = False) -> Generator[list[tuple], None, None]:
    """Yields, for steps step, step + 1, ..., a list with (raw, y) of each of the given rows of the global batch.

    A thread reads one step ahead; pin=True puts the tensors into memory that a GPU copies from by itself.
    """
    def read(step):
        pairs = read_step(dataset, cfg, step, rows)
        return [tuple(x.pin_memory() if pin and x is not None and not x.is_cuda else x for x in pair) for pair in pairs]

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, step)
        while True:
            step += 1
            now, ahead = ahead.result(), pool.submit(read, step)
            yield now


# ---------------------------------------------------------------------------------------------------------------------
# data sets
#
# Each has   channels, side    of what the network sees: pixels or latents
#            classes           names, none when unconditional
#            to(device)        before the first read
#            read(index, u)    the raw batch and its labels y (or None), on the CPU; u (B, 3) uniform decides mirroring
#            x1(raw, rng)      raw, on any device, as data x1 (B, C, H, W); rng is a BatchRandom
#            reference(count)  at most `count` unmirrored examples as x1, shuffled, and their labels, for evaluation


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] to 0..255, rounded. The only place where this conversion is made."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def to_images(x: torch.Tensor) -> np.ndarray:
    """Pixels (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C)."""
    return to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()


@dataclass
class Images:
    """Images in memory: `pixels` uint8 (N, C, H, W), `labels` (N,), the names of the classes (none: unconditional)."""

    pixels: np.ndarray
    labels: np.ndarray
    classes: list[str] = field(default_factory=list)
    flip: bool = True
    fingerprint: str = ""                                   # of the files they came from
    latent: dict | None = None                              # these are pixels

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def side(self) -> int:
        return self.pixels.shape[2]

    def to(self, device: torch.device) -> None:
        """Pixels stay on the CPU."""

    def read(self, index: np.ndarray, u: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        raw = self.pixels[index]                                                    # (B, C, H, W)
        if self.flip:
            raw = np.where(u[:, 0].reshape(-1, 1, 1, 1) < 0.5, raw[..., ::-1], raw)
        return torch.from_numpy(raw), torch.from_numpy(self.labels[index]) if self.classes else None

    def x1(self, raw: torch.Tensor, rng: BatchRandom | None = None) -> torch.Tensor:
        return raw.float() / 127.5 - 1

    def reference(self, count: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
        index = _epoch(len(self), seed, 0)[:count]
        return self.x1(torch.from_numpy(self.pixels[index])), self.labels[index]


@dataclass
class Photos:
    """Random mirrored crops of a few large photographs; the class is the photograph. One epoch is 4,096 crops."""

    photos: list[np.ndarray]                                # uint8 (C, H, W) each
    side: int
    classes: list[str]
    flip: bool = True
    channels: int = 3
    fingerprint: str = ""
    latent: dict | None = None

    def __len__(self) -> int:
        return 4096

    def read(self, index: np.ndarray, u: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """u also decides the place of the crop."""
        r, labels, crops = self.side, np.asarray(index) % len(self.photos), []
        for label, (flip, row, column) in zip(labels, u, strict=True):
            photo = self.photos[label]
            top, left = int(row * (photo.shape[1] - r + 1)), int(column * (photo.shape[2] - r + 1))
            crop = photo[:, top : top + r, left : left + r]
            crops.append(crop[:, :, ::-1] if self.flip and flip < 0.5 else crop)
        return torch.from_numpy(np.stack(crops)), torch.from_numpy(labels)

    x1, to = Images.x1, Images.to

    def reference(self, count: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
        raw, y = self.read(np.arange(count), np.random.Generator(np.random.Philox(key=[seed, 0])).random((count, 3)))
        return self.x1(raw), y.numpy()


class Latents:
    """A cache that latents.py wrote: `moments` float16 (N, 2, 2C, h, w) holds for each image and for its mirror image
    the mean and the standard deviation of the autoencoder's posterior. Every visit draws a fresh sample of it."""

    def __init__(self, folder: Path, header: dict, flip: bool):
        self.folder, self.flip, self.latent = folder, flip, header["vae"]
        self.channels, self.side, self.classes = header["channels"], header["side"], header["classes"]
        self.fingerprint = header["fingerprint"]
        shape = (header["count"], 2, 2 * self.channels, self.side, self.side)
        self.labels = np.load(folder / "labels.npy", allow_pickle=False)
        self.valid = np.flatnonzero(self.labels >= 0)       # an image that could not be read has label -1
        if self.labels.shape != shape[:1] or self.labels.dtype != np.int64 or not len(self.valid) or (
                self.labels.max() >= max(1, len(self.classes))):
            raise ValueError("labels.npy does not fit header.json")
        self.moments = np.memmap(folder / "moments.f16", np.float16, "r", shape=shape)
        statistics = zip(self.latent["shift"], self.latent["scale"], strict=True)
        self.shift, self.scale = (torch.tensor(row).view(-1, 1, 1) for row in zip(*statistics, strict=True))

    def __len__(self) -> int:
        return len(self.valid)

    def to(self, device: torch.device) -> None:
        """Holds the whole cache on a GPU when that takes less than a quarter of its free memory."""
        self.shift, self.scale = self.shift.to(device), self.scale.to(device)
        if device.type == "cuda" and self.moments.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            whole = torch.empty(self.moments.shape, dtype=torch.float16, device=device)
            for first in range(0, len(whole), 1024):        # piece by piece: eight processes share the machine's memory
                whole[first : first + 1024] = torch.from_numpy(np.array(self.moments[first : first + 1024]))
            self.moments = whole

    def read(self, index: np.ndarray, u: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        index, mirrored = self.valid[index], ((u[:, 0] < 0.5) & self.flip).astype(np.int64)
        y = torch.from_numpy(self.labels[index]) if self.classes else None
        if isinstance(self.moments, torch.Tensor):          # on the GPU already; pinned, so that nobody waits for it
            place = [torch.from_numpy(x).pin_memory().to(self.moments.device, non_blocking=True)
                     for x in (index, mirrored)]
            return self.moments[place[0], place[1]], y
        return torch.from_numpy(self.moments[index, mirrored]), y                   # (B, 2C, h, w)

    def x1(self, raw: torch.Tensor, rng: BatchRandom) -> torch.Tensor:
        mean, std = raw.float().chunk(2, dim=1)                                     # (B, C, h, w) each
        return (mean + std * rng.randn(*mean.shape[1:]) - self.shift) * self.scale

    def reference(self, count: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
        """Means of the posteriors: decoded, they are the images as the autoencoder gives them back."""
        index = _epoch(len(self), seed, 0)[:count]
        raw, _ = self.read(index, np.ones((len(index), 3)))
        mean = raw.to(self.shift.device).float().chunk(2, dim=1)[0]
        return (mean - self.shift) * self.scale, self.labels[self.valid[index]]


Dataset = Images | Photos | Latents


def digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8, 10 classes (UCI, Alpaydin & Kaynak 1998)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]           # (1797, 1, 8, 8), 17 grey levels
    return Images(pixels, bunch.target.astype(np.int64), [str(d) for d in range(10)], flip=False)


def photos(resolution: int, flip: bool) -> Photos:
    """Crops of scikit-learn's two photographs (427 x 640), shrunk so that a crop spans at least a third of them."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    bunch = load_sample_images()
    if resolution > 427:
        raise UserError(f"the bundled photographs are 427 pixels high: --res {resolution} is too large for them")
    shrink = min(1, 3 * resolution / 427)
    arrays = []
    for image in bunch.images:
        size = (round(image.shape[1] * shrink), round(image.shape[0] * shrink))
        arrays.append(np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)).transpose(2, 0, 1))
    return Photos(arrays, resolution, [Path(name).stem for name in bunch.filenames], flip)


def read_all(source: sources.Source, resolution: int, flip: bool, skip_bad: bool) -> Images:
    """Every image of a source, decoded into memory (3 R^2 bytes each). Raises UserError at a bad one, or skips it."""
    from tqdm import tqdm

    pixels = np.empty((len(source), 3, resolution, resolution), np.uint8)
    kept, skipped = [], []
    others = int(os.environ.get("RANK", 0)) > 0             # one progress bar is enough
    for i in tqdm(range(len(source)), desc="reading images", unit="file", leave=False, disable=others):
        try:
            pixels[len(kept)] = source.image(i, resolution)
            kept.append(i)
        except UserError as problem:
            if not skip_bad:
                raise UserError(f"{problem}, or leave out such images with --skip-bad") from None
            skipped.append(str(problem))
    if skipped:
        print(f"left out {len(skipped)} of {len(source)} images: {'; '.join(skipped[:5])}")
    if not kept:
        raise UserError(f"none of the {len(source)} images of {source.where} can be read")
    return Images(pixels[: len(kept)], np.array(source.labels, np.int64)[kept], source.classes, flip,
                  source.fingerprint)


def open_latents(cfg: Config) -> Latents:
    """The latent cache of a configuration. Raises UserError when it is missing, unfinished or of something else."""
    folder = Path(cfg.latents)
    wanted = f"--dataset {cfg.dataset} --res {cfg.res} --vae {cfg.vae}"
    make = f"python latents.py {wanted} --data {cfg.data or 'DIR'} --out {folder}"
    header = read_header(folder)
    if header is None:
        told = f"\n{sources.WHERE[cfg.dataset]}" if cfg.dataset in sources.WHERE and not cfg.data else ""
        raise UserError(f"there is no latent cache in {folder}; make it with\n  {make}\n"
                        f"(torchrun --nproc_per_node=8 latents.py ... shares the work over 8 GPUs){told}")
    if not header["complete"]:
        raise UserError(f"the latent cache in {folder} is not finished; the same command goes on where it stopped:\n"
                        f"  {make}")
    source = sources.open_source(cfg.dataset, cfg.data, header.get("split", "train")) if cfg.data else None
    if source and source.fingerprint != header["fingerprint"]:
        raise UserError(f"the latent cache in {folder} was made of other images than {cfg.data}: name another with "
                        f"--latents, or make one with\n  {make}")
    wrong = [f"its {name} is {found!r}, the run asks for {asked!r}" for name, found, asked in (
        ("dataset", header["dataset"], cfg.dataset), ("resolution", header["res"], cfg.res),
        ("vae", header["vae"].get("name"), cfg.vae)) if found != asked]
    if wrong:
        raise UserError(f"the latent cache in {folder} is of another run: {'; '.join(wrong)}. Name another with "
                        f"--latents, or make one with\n  {make}")
    try:
        expected = header["count"] * 2 * 2 * header["channels"] * header["side"] ** 2 * 2
        found = (folder / "moments.f16").stat().st_size
        if found == expected:
            return Latents(folder, header, cfg.flip)
    except Exception as problem:                            # numpy raises many kinds for a damaged file
        raise UserError(f"the latent cache in {folder} cannot be read: {first_line(problem)}; delete the directory and "
                        f"make it again with\n  {make}") from None
    raise UserError(f"the latent cache in {folder} is damaged: moments.f16 has {found:,} bytes and should have "
                    f"{expected:,}; delete the directory and make it again with\n  {make}")


def read_header(folder: Path) -> dict | None:
    """header.json of a latent cache, None without one. Raises UserError when it is not what latents.py writes."""
    header = checkpoint.read_json(folder / "header.json", "header of a latent cache")
    if header is None:
        return None
    kinds = {"complete": bool, "dataset": str, "split": str, "res": int, "side": int, "channels": int, "classes": list,
             "fingerprint": str, "count": int, "vae": dict}
    wrong = [name for name, kind in kinds.items() if type(header.get(name, "train" if name == "split" else None))
             is not kind]                                   # type: true is no number of images
    if not wrong:
        wrong = what_is_wrong(header, header["vae"]) + (["count"] if header["count"] < 1 else [])
    if wrong:
        raise UserError(f"{folder / 'header.json'} is no header of a latent cache: its {', '.join(wrong)} cannot be")
    return header


def what_is_wrong(facts: dict, latent: dict | None) -> list[str]:
    """Names of the entries that nothing of ours wrote, of `facts` or of a header; latent: its autoencoder's."""
    channels, side, classes = (facts.get(name) for name in ("channels", "side", "classes"))
    wrong = [name for name, value in (("channels", channels), ("side", side))
             if type(value) is not int or not 0 < value <= 2**14]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        wrong.append("classes")
    if latent is not None and not (isinstance(latent, dict) and isinstance(latent.get("sha256"), str) and all(
            isinstance(latent.get(name), list) and len(latent[name]) == channels
            and all(isinstance(v, float) and math.isfinite(v) for v in latent[name]) for name in ("shift", "scale"))):
        wrong.append("vae")
    return wrong


def facts(dataset: Dataset) -> dict:
    """What a checkpoint remembers of its data: a run continues only on the same, and sample.py needs no more."""
    return {"channels": dataset.channels, "side": dataset.side, "classes": dataset.classes, "count": len(dataset),
            "fingerprint": dataset.fingerprint, "latent": dataset.latent}


def load(cfg: Config) -> Dataset:
    """The data set of a configuration. Raises UserError when it is unknown, missing or does not fit."""
    if cfg.data and cfg.dataset in ("digits", "photos"):
        raise UserError(f"--data {cfg.data} is of no use to the dataset {cfg.dataset}: add --dataset folder")
    if cfg.dataset == "digits":
        if cfg.res != 8:
            raise UserError(f"the digits are 8 x 8 images: leave --res at 8, not {cfg.res}")
        return digits()
    if cfg.dataset == "photos":
        return photos(cfg.res, cfg.flip)
    if cfg.space == "latent":
        return open_latents(cfg)
    return read_all(sources.open_source(cfg.dataset, cfg.data), cfg.res, cfg.flip, cfg.skip_bad)
