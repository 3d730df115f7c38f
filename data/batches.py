"""Images, their conditions (labels or vectors), and every random number of training and sampling.

* Training: all randomness of step k comes from one generator seeded by (seed, k) and is drawn for the whole global
  batch; a process keeps its own rows. So a step does not depend on how many processes share it, and a resumed run
  needs no saved generator state.
* Sampling: image i has its own generator seeded by (seed, i), so it does not depend on the batch it is drawn in.
"""

import functools
import hashlib
import math
import os
import random
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, UserError, explain
from data import fashion as fashion_mnist
from data import sources
from data.latents import read_header

FIRST = int(os.environ.get("RANK", 0)) == 0                 # of several processes one prints


class BatchRandom:
    """Random numbers of one training step: drawn for `batch` examples, of which this process keeps `rows`."""

    def __init__(self, seed: int, step: int, batch: int, rows: slice | None = None,
                 device: torch.device | str = "cpu"):
        self.rows, self.batch, self.device = rows or slice(0, batch), batch, device
        # torch's CPU generator reads 32 bits of its seed: consecutive steps of one run must differ in those
        self.generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
        self.shared = random.Random(f"{seed} {step}")

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), (rows, *shape)."""
        return torch.rand(self.batch, *shape, generator=self.generator, device=self.device)[self.rows]

    def randn(self, *shape: int) -> Tensor:
        """Standard normal, (rows, *shape)."""
        return torch.randn(self.batch, *shape, generator=self.generator, device=self.device)[self.rows]

    def choice(self, shares: list[float]) -> int:
        """One index, drawn with these probabilities, the same for every row and every process."""
        return self.shared.choices(range(len(shares)), shares)[0]


def philox(seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


class ImageRandom:
    """Gaussians of the images with the given numbers: image i draws from a generator seeded by (seed, i)."""

    def __init__(self, seed: int, numbers: Iterable[int], device: torch.device | str = "cpu"):
        self.generators, self.device = [philox(seed, int(i)) for i in numbers], device

    def randn(self, *shape: int) -> Tensor:
        """Standard normal, (images, *shape)."""
        draws = np.stack([g.standard_normal(shape, dtype=np.float32) for g in self.generators])
        return torch.from_numpy(draws).to(self.device)


@functools.lru_cache(maxsize=2)
def epoch(count: int, seed: int, number: int) -> np.ndarray:
    return philox(seed, number).permutation(count)


def order(count: int, seed: int, start: int, length: int) -> np.ndarray:
    """Entries start..start+length-1 of an endless list of shuffled epochs over `count` examples."""
    places = np.arange(start, start + length)
    return np.concatenate([epoch(count, seed, int(e))[places[places // count == e] % count]
                           for e in np.unique(places // count)])


def read_step(dataset: "Dataset", cfg: Config, step: int, parts: list[slice]) -> list[tuple]:
    """(raw, y) of each part, rows of the global batch. Images and mirroring depend on the seed and the step alone."""
    index = order(len(dataset), cfg.seed, step * cfg.batch, cfg.batch)
    u = philox(cfg.seed, 2**63 + step).random((cfg.batch, 3))
    return [dataset.read(index[part], u[part]) for part in parts]


def micro_batches(dataset: "Dataset", cfg: Config, step: int, parts: Callable[[int], list[slice]],
                  device: torch.device, condition: torch.nn.Module | None) -> Generator[Generator, None, None]:
    """Yields, for step, step + 1, ..., a generator of (x1, y, rng) for each of parts(step), on the device.

    y is what `condition` takes, with its null in cfg.label_drop of the rows, or None; the loss draws from rng. A thread
    reads one step ahead, into pinned memory for a GPU; a part goes to the device when its turn comes.
    """
    device = torch.device(device)

    def read(step):
        pairs = read_step(dataset, cfg, step, parts(step))
        return [[x if x is None or device.type != "cuda" else x.pin_memory() for x in pair] for pair in pairs]

    def prepare(step, pairs):
        for part, (raw, y) in zip(parts(step), pairs, strict=True):
            rng = BatchRandom(cfg.seed, step, cfg.batch, part, device)
            x1 = dataset.x1(raw.to(device, non_blocking=True), rng)                 # (B, C, H, W)
            if y is not None:                               # one draw per example, shared by all bands
                y = y.to(device, non_blocking=True)
                dropped = rng.rand() < cfg.label_drop
                y = torch.where(dropped.view(-1, *[1] * (y.dim() - 1)), condition.null(y), y)
            yield x1, y, rng

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, step)
        while True:
            pairs, ahead = ahead.result(), pool.submit(read, step + 1)
            yield prepare(step, pairs)
            step += 1


def to_uint8(x: Tensor) -> Tensor:
    """Pixels in [-1, 1] to 0..255, rounded. mini.py alone has a copy."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def to_images(x: Tensor) -> np.ndarray:
    """Pixels (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C)."""
    return to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()


class Dataset:
    """What training needs of data. A data set also has

    channels, side      of what the network sees: pixels or latents
    read(index, u)      the raw batch and its condition y (or None), on the CPU; u (B, 3) uniform: the first number
                        decides mirroring, the others are for forks, such as crops
    """

    classes: list[str]                                      # names of the labels; none: unconditional, or vectors
    labels: np.ndarray                                      # (N,)
    vectors: np.ndarray | None = None                       # float32 (N, dim): the condition in place of labels
    fingerprint: str = ""                                   # of the files it came from
    latent: dict | None = None                              # the autoencoder's facts; None: pixels
    held_out: Callable[[], "Dataset"] | None = None         # reads the test split
    originals: np.ndarray | None = None                     # see fid.originals
    device: torch.device | str = "cpu"                      # of x1

    def use_vectors(self, vectors: np.ndarray) -> None:
        """Vectors (N, dim) take the place of the labels, and become part of the fingerprint."""
        digest = hashlib.sha256(self.fingerprint.encode())
        digest.update(np.ascontiguousarray(vectors))
        self.vectors, self.classes, self.fingerprint = vectors, [], digest.hexdigest()

    def conditions(self, index: np.ndarray) -> np.ndarray:
        """Labels (B,) or vectors (B, dim)."""
        return np.asarray((self.labels if self.vectors is None else self.vectors)[index])

    def y(self, index: np.ndarray) -> Tensor | None:
        return torch.from_numpy(self.conditions(index)) if self.classes or self.vectors is not None else None

    def examples(self) -> Tensor | None:
        """At most 256 vectors (M, dim) spread over the set, None without vectors."""
        if self.vectors is None:
            return None
        rows = np.linspace(0, len(self.vectors) - 1, min(256, len(self.vectors))).round().astype(int)
        return torch.from_numpy(np.asarray(self.vectors[rows]))

    def to(self, device: torch.device) -> None:
        """Before the first read. Pixels stay on the CPU."""

    def x1(self, raw: Tensor, rng: BatchRandom | None = None) -> Tensor:
        """Raw pixels, on any device, as data (B, C, H, W)."""
        return raw.float() / 127.5 - 1

    def plain(self, index: np.ndarray) -> Tensor:
        """Examples as x1 (B, C, H, W), none mirrored."""
        return self.x1(self.read(index, np.ones((len(index), 3)))[0])

    def reference(self, count: int, seed: int = 0) -> tuple[Tensor, np.ndarray]:
        """At most `count` unmirrored examples as x1, shuffled, and their labels or vectors."""
        index = epoch(len(self), seed, 0)[:count]
        return self.plain(index), self.conditions(index)

    def real(self) -> "Dataset":
        """What samples are scored against: the test split, read the first time; itself where there is none."""
        return self.held_out() if self.held_out else self


class Images(Dataset):
    """Images in memory: `pixels` uint8 (N, C, H, W), `labels` (N,), the names of the classes (none: unconditional)."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: list[str] | None = None, flip: bool = True,
                 fingerprint: str = "", held_out: Callable[[], Dataset] | None = None):
        self.pixels, self.labels, self.classes, self.flip = pixels, labels, list(classes or []), flip
        self.channels, self.side = pixels.shape[1], pixels.shape[2]
        self.fingerprint, self.held_out = fingerprint, held_out and functools.cache(held_out)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: np.ndarray, u: np.ndarray) -> tuple[Tensor, Tensor | None]:
        raw = self.pixels[index]                                                    # (B, C, H, W)
        if self.flip:
            raw = np.where(u[:, 0].reshape(-1, 1, 1, 1) < 0.5, raw[..., ::-1], raw)
        return torch.from_numpy(raw), self.y(index)


class Latents(Dataset):
    """A cache that data.latents wrote: `moments` float16 (N, 2, 2C, h, w) holds for each image and for its mirror image
    the mean and the standard deviation of the autoencoder's posterior. Every visit draws a fresh sample of it."""

    def __init__(self, folder: Path, header: dict, flip: bool):
        self.flip, self.latent, self.classes = flip, header["vae"], header["classes"]
        self.channels, self.side, self.fingerprint = header["channels"], header["side"], header["fingerprint"]
        shape = (header["count"], 2, 2 * self.channels, self.side, self.side)
        size, expected = (folder / "moments.f16").stat().st_size, 2 * math.prod(shape)
        if size != expected:
            raise ValueError(f"moments.f16 has {size:,} bytes and should have {expected:,}")
        self.moments = np.memmap(folder / "moments.f16", np.float16, "r", shape=shape)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        self.valid = np.flatnonzero(labels >= 0)            # an image that could not be read has label -1
        self.labels = labels[self.valid]
        if labels.shape != shape[:1] or labels.dtype != np.int64 or not len(self.valid) or (
                labels.max() >= max(1, len(self.classes))):
            raise ValueError("labels.npy does not fit header.json")
        self.shift, self.scale = (torch.tensor(self.latent[key]).view(-1, 1, 1) for key in ("shift", "scale"))

    def __len__(self) -> int:
        return len(self.valid)

    def to(self, device: torch.device) -> None:
        self.shift, self.scale, self.device = self.shift.to(device), self.scale.to(device), device

    def read(self, index: np.ndarray, u: np.ndarray) -> tuple[Tensor, Tensor | None]:
        mirrored = (u[:, 0] < 0.5) & self.flip
        return torch.from_numpy(self.moments[self.valid[index], mirrored.astype(int)]), self.y(index)   # (B, 2C, h, w)

    def x1(self, raw: Tensor, rng: BatchRandom | None = None) -> Tensor:
        """A sample of the posterior; without rng its mean: decoded, the image as the autoencoder gives it back."""
        z, std = raw.to(self.device).float().chunk(2, dim=1)                        # (B, C, h, w) each
        if rng is not None:
            z = z + std * rng.randn(*z.shape[1:])
        return (z - self.shift) * self.scale


def digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8, 10 classes (UCI, Alpaydin & Kaynak 1998)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]           # (1797, 1, 8, 8), 17 grey levels
    return Images(pixels, bunch.target.astype(np.int64), [str(d) for d in range(10)], flip=False)


def fashion(where: str, split: str = "train") -> Images:
    """Fashion-MNIST padded to 32 x 32, never mirrored; its 10,000 test images are held out."""
    pixels, labels, fingerprint = fashion_mnist.read(where, split)
    held_out = functools.partial(fashion, where, "test") if split == "train" else None
    return Images(pixels, labels, fashion_mnist.CLASSES, False, fingerprint, held_out)


def read_all(source: sources.Source, cfg: Config) -> Images:
    """Every image of a source, decoded into memory (3 R^2 bytes each). Raises UserError at a bad one, or skips it."""
    vectors = source.vectors() if cfg.condition == "vectors" else None
    with explain(f"{len(source):,} images of {cfg.res} x {cfg.res} are too many for the memory",
                 "; train on smaller ones, or on latents", kinds=MemoryError):
        pixels, good, bad = np.empty((len(source), 3, cfg.res, cfg.res), np.uint8), [], []
    if FIRST:
        source.warn_of_small(cfg.res)
    with (tqdm(total=len(source), desc="reading images", unit="file", leave=False, disable=not FIRST or None) as bar,
          ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool):
        for part in sources.chunks_of(len(source), 256):
            read = pool.map(lambda i: source.image_or_problem(i, cfg.res, cfg.skip_bad), part)
            for i, (image, problem) in zip(part, read, strict=True):
                pixels[len(good)] = image
                if problem:
                    bad.append(problem)
                else:
                    good.append(i)
                bar.update()
    if bad and FIRST:
        print(f"left out {len(bad)} of {len(source)} images: {'; '.join(bad[:5])}")
    if not good:
        raise UserError(f"none of the {len(source)} images of {source.where} can be read")
    labels = np.array(source.labels, np.int64)[good]
    images = Images(pixels[: len(good)], labels, source.classes, cfg.flip, source.fingerprint)
    if vectors is not None:
        images.use_vectors(vectors[good])
    return images


def image_files(cfg: Config) -> Dataset:
    """The images of --data as pixels, or their latents; DIR/test, beside DIR/train, is held out."""
    if cfg.space == "latent":
        return open_latents(cfg)
    source = sources.open_source(cfg.dataset, cfg.data)
    images = read_all(source, cfg)
    if cfg.dataset == "folder" and "test" in source.splits:
        try:
            test = sources.open_source(cfg.dataset, cfg.data, "test")
            if test.classes != source.classes:
                raise UserError(f"the split test of {cfg.data} has other classes")
            if cfg.condition == "vectors":
                test.vectors()                              # raises when they are missing
            images.held_out = functools.cache(functools.partial(read_all, test, cfg))
        except UserError as problem:
            if FIRST:
                print(f"warning: {problem}: scores compare with the training images")
    return images


def open_latents(cfg: Config) -> Latents:
    """The latent cache of a configuration. Raises UserError when it is missing, unfinished or of something else."""
    folder, vectors = Path(cfg.latents), cfg.condition == "vectors"
    command = (f"\n  python -m data.latents --dataset {cfg.dataset} --res {cfg.res} --vae {cfg.vae} --data "
               f"{cfg.data or 'DIR'} --out {folder}{' --condition vectors' if vectors else ''}")
    header = read_header(folder)
    if header is None:
        hint = "" if cfg.data else "\n" + sources.WHERE.get(cfg.dataset, "")
        raise UserError(f"there is no latent cache in {folder}; make it with{command}{hint}")
    if not header["complete"]:
        raise UserError(f"the latent cache in {folder} is not finished; the same command goes on:{command}")
    if vectors and not (folder / "vectors.npy").exists():
        raise UserError(f"the latent cache in {folder} has no vectors.npy; the same command adds it:{command}")
    settings = (("dataset", header["dataset"], cfg.dataset), ("resolution", header["res"], cfg.res),
                ("vae", header["vae"].get("name"), cfg.vae))
    wrong = [f"its {name} is {made!r}, the run asks for {asked!r}" for name, made, asked in settings if made != asked]
    if cfg.data and sources.open_source(cfg.dataset, cfg.data, header["split"]).fingerprint != header["fingerprint"]:
        wrong.append(f"it was made of other images than {cfg.data}")
    if wrong:
        raise UserError(f"the latent cache in {folder} is of another run: {'; '.join(wrong)}. Make one with{command}")
    with explain(f"the latent cache in {folder} is damaged", f"; delete it and make it again with{command}"):
        latents = Latents(folder, header, cfg.flip)
    if vectors:
        array = sources.read_vectors(folder / "vectors.npy", header["count"])
        latents.use_vectors(array if len(latents) == len(array) else array[latents.valid])
    return latents


def facts(dataset: Dataset) -> dict:
    """What a checkpoint remembers of its data: a run continues only on the same, and sample.py needs no more."""
    return {"channels": dataset.channels, "side": dataset.side, "classes": dataset.classes,
            "vectors": None if dataset.vectors is None else list(dataset.examples().shape),     # how many, dim
            "count": len(dataset), "fingerprint": dataset.fingerprint, "latent": dataset.latent}


LOADERS = {
    "digits": lambda cfg: digits(),
    "fashion": lambda cfg: fashion(cfg.data),
    "folder": image_files, "celebahq": image_files, "imagenet": image_files,
}
SIDES = {"digits": 8, "fashion": 32}                        # of the images of a set that has one size only


def load(cfg: Config) -> Dataset:
    """The data set of a configuration. Raises UserError when it is missing or does not fit."""
    if cfg.data and cfg.dataset == "digits":
        raise UserError(f"--data {cfg.data} is not used by the dataset digits: add --dataset folder")
    if cfg.condition == "vectors" and cfg.dataset in ("digits", "fashion"):
        raise UserError(f"the dataset {cfg.dataset} has labels and no vectors: leave out --condition vectors")
    if cfg.res != (side := SIDES.get(cfg.dataset, cfg.res)):
        raise UserError(f"the images of {cfg.dataset} are {side} x {side}: leave --res at {side}, not {cfg.res}")
    return LOADERS[cfg.dataset](cfg)
