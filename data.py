"""Images, labels, and every random number of the project.

Two rules make runs repeatable:

* Training: all randomness of step k comes from one generator seeded by (seed, k) and is drawn for the whole global
  batch; a process keeps its own rows. So a step does not depend on how many processes share it, and a resumed run
  needs no saved generator state.
* Sampling: image i has its own generator seeded by (seed, i), so it does not depend on the batch it is drawn in.
"""

import hashlib
import random
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from config import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


# ---------------------------------------------------------------------------------------------------------------------
# randomness


class BatchRandom:
    """Random numbers of one training step: drawn for `batch` examples, of which this process keeps `rows`."""

    def __init__(self, seed: int, step: int, batch: int, rows: slice | None = None, device="cpu"):
        self.first_row, self.batch, self.device = (rows.start if rows else 0), batch, device
        self.rows = rows or slice(0, batch)
        # torch's CPU generator reads 32 bits of its seed: consecutive steps of one run must differ in those
        self.generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
        self.shared = random.Random(f"{seed} {step}")

    def rand(self, *shape: int) -> torch.Tensor:
        """Uniform in [0, 1), (rows, *shape)."""
        return torch.rand(self.batch, *shape, generator=self.generator, device=self.device)[self.rows]

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normal, (rows, *shape)."""
        return torch.randn(self.batch, *shape, generator=self.generator, device=self.device)[self.rows]

    def randint(self, high: int) -> int:
        """One integer in [0, high), the same for every row and every process."""
        return self.shared.randrange(high)


class ImageRandom:
    """Gaussians of the images with the given numbers: image i draws from a generator seeded by (seed, i)."""

    def __init__(self, seed: int, numbers, device="cpu"):
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


# ---------------------------------------------------------------------------------------------------------------------
# data sets


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] to 0..255, rounded. The only place where this conversion is made."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


@dataclass
class Images:
    """Images in memory: `pixels` uint8 (N, C, H, W), `labels` (N,), the names of the classes (none: unconditional)."""

    pixels: np.ndarray
    labels: np.ndarray
    classes: list[str] = field(default_factory=list)
    flip: bool = True
    fingerprint: str = ""                                   # of the files they came from

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    def batch(self, index: np.ndarray, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x1 (B, C, H, W) in [-1, 1] and y (B,), or None without classes; u (B, 3) uniform decides the mirroring."""
        x = torch.from_numpy(self.pixels[index]).float() / 127.5 - 1
        if self.flip:
            x = torch.where(u.cpu()[:, 0].view(-1, 1, 1, 1) < 0.5, x.flip(-1), x)
        return x, torch.from_numpy(self.labels[index]) if self.classes else None

    def reference(self, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """At most `count` unmirrored real images (N, H, W, C) and their labels, shuffled, for evaluation."""
        index = _epoch(len(self), seed, 0)[:count]
        return self.pixels[index].transpose(0, 2, 3, 1), self.labels[index]


@dataclass
class Photos:
    """Random mirrored crops of a few large photographs; the class is the photograph. One epoch is 4,096 crops."""

    photos: list[np.ndarray]                                # uint8 (C, H, W) each
    resolution: int
    classes: list[str]
    flip: bool = True
    channels: int = 3
    fingerprint: str = ""

    def __len__(self) -> int:
        return 4096

    def batch(self, index: np.ndarray, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As Images.batch; u (B, 3) uniform decides the mirroring and the place of the crop."""
        r, labels, crops = self.resolution, np.asarray(index) % len(self.photos), []
        for label, (flip, row, column) in zip(labels, u.cpu().numpy(), strict=True):
            photo = self.photos[label]
            top, left = int(row * (photo.shape[1] - r + 1)), int(column * (photo.shape[2] - r + 1))
            crop = photo[:, top : top + r, left : left + r]
            crops.append(crop[:, :, ::-1] if self.flip and flip < 0.5 else crop)
        return torch.from_numpy(np.stack(crops)).float() / 127.5 - 1, torch.from_numpy(labels)

    def reference(self, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        x, y = self.batch(np.arange(count), BatchRandom(seed, 2**31, count).rand(3))
        return to_uint8(x).permute(0, 2, 3, 1).numpy(), y.numpy()


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


def natural(name: str) -> list:
    """Sort key in which "9" comes before "10"."""
    return [(0, int(part), "") if part.isascii() and part.isdecimal() else (1, 0, part)
            for part in re.split(r"([0-9]+)", str(name)) if part] + [(2, 0, str(name))]


def list_images(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Image files of a folder: (files, labels, classes). Subfolders are classes in natural order; none, no classes.

    Raises UserError when the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise UserError(f"there is no image folder {str(folder)!r}; name one with --data DIR")

    def images(directory, pattern):
        return sorted((f for f in directory.glob(pattern) if f.suffix.lower() in EXTENSIONS and f.is_file()),
                      key=lambda f: natural(str(f.relative_to(directory))))

    classes = sorted((d.name for d in folder.iterdir() if d.is_dir() and images(d, "**/*")), key=natural)
    if not classes:
        files, labels = images(folder, "*"), None
    else:
        groups = [images(folder / name, "**/*") for name in classes]
        files, labels = sum(groups, []), [i for i, group in enumerate(groups) for _ in group]
        if stray := images(folder, "*"):
            raise UserError(f"{str(folder)!r} holds both class folders and images, such as {stray[0].name!r}: "
                            "move the images into a class folder, or the class folders away")
    if not files:
        raise UserError(f"no images in {str(folder)!r}; looked for {', '.join(sorted(EXTENSIONS))}")
    return files, labels or [0] * len(files), classes


def read_image(file: Path, resolution: int) -> np.ndarray:
    """One image file as uint8 (3, R, R): upright, RGB, centre-cropped as in ADM. Raises UserError naming the file.

    The crop halves the image while its short side is at least 2R (box), resizes it to R (bicubic), cuts the centre.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):                  # 16-bit grey: PIL would clip it to white
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if image.has_transparency_data:                 # transparent pixels become white
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise UserError(f"cannot read the image {str(file)!r}: {problem}; repair or remove it") from None
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = tuple(max(resolution, round(side * scale)) for side in image.size)
    image = np.asarray(image.resize(size, Image.Resampling.BICUBIC))                # (H, W, 3)
    top, left = (image.shape[0] - resolution) // 2, (image.shape[1] - resolution) // 2
    return image[top : top + resolution, left : left + resolution].transpose(2, 0, 1)


def folder(directory: str, resolution: int, flip: bool) -> Images:
    """Every image of a folder, decoded into memory (3 R^2 bytes each)."""
    from tqdm import tqdm

    files, labels, classes = list_images(Path(directory))
    pixels = np.empty((len(files), 3, resolution, resolution), np.uint8)
    for i, file in enumerate(tqdm(files, desc="reading images", unit="file", leave=False)):
        pixels[i] = read_image(file, resolution)
    names = "\n".join(str(file.relative_to(directory)) for file in files)
    return Images(pixels, np.array(labels, np.int64), classes, flip, hashlib.sha256(names.encode()).hexdigest())


def facts(dataset) -> dict:
    """What a checkpoint remembers of its data: a run continues only on the same."""
    return {"channels": dataset.channels, "classes": dataset.classes, "count": len(dataset),
            "fingerprint": dataset.fingerprint}


def load(cfg) -> Images | Photos:
    """The data set of a configuration. Raises UserError when it is unknown, missing or does not fit."""
    if cfg.data and cfg.dataset != "folder":
        raise UserError(f"--data {cfg.data} is of no use to the dataset {cfg.dataset}: add --dataset folder")
    if cfg.dataset == "digits":
        if cfg.res != 8:
            raise UserError(f"the digits are 8 x 8 images: leave --res at 8, not {cfg.res}")
        return digits()
    if cfg.dataset == "photos":
        return photos(cfg.res, cfg.flip)
    if cfg.dataset == "folder":
        if not cfg.data:
            raise UserError("--dataset folder needs the image folder: add --data DIR")
        return folder(cfg.data, cfg.res, cfg.flip)
    raise UserError(f"unknown dataset {cfg.dataset!r}; choose one of digits, photos, folder")
