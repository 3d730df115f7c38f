"""Features of images, for scores: the networks, the one way images reach them, and statistics that fit into memory.

An extractor is a function: images uint8 (B, H, W, C) -> features float32 (B, D), and probabilities (B, classes) or
None. It has a `name` and an `identity`, which a reference must agree with. Bring your own, or choose one by name:

    inception    the Inception of 2015 that FID is defined with, as TorchScript; 2,048 features, and class probabilities
    dinov2       DINOv2 ViT-L/14, 1,024 features: the Frechet distance on it is called FDD
    pixels       no network: pixels averaged to 8 x 8, 192 features; needs no download
"""

import hashlib
import io
import json
import os
import urllib.request
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import runs
from config import UserError, first_line
from ranks import Ranks

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
DINOV2 = "facebookresearch/dinov2:7764ea0f912e53c92e82eb78a2a1631e92725fc8"
EXTRACTORS = ("inception", "dinov2", "pixels")
CODECS = ("none", "jpeg")


# ---------------------------------------------------------------------------------------------------------------------
# extractors


class Pixels:
    name, identity = "pixels", "pixels averaged to 8 x 8, in [0, 1]"

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return pixel_features(images).astype(np.float32), None


def pixel_features(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) -> float64 (N, 64 C): pixels in [0, 1], averaged to 8 x 8."""
    parts = [torch.tensor(images[i : i + 64]).permute(0, 3, 1, 2).double() / 255 for i in range(0, len(images), 64)]
    return torch.cat([F.adaptive_avg_pool2d(x, 8).flatten(1) for x in parts]).numpy()


class Inception:
    """The TorchScript file takes images of any size and resizes them to 299 as TensorFlow 1 did (bilinear, without
    antialiasing), which is what published FIDs have. file: "" looks in torch's cache and downloads once.

    Raises UserError when the file is not at hand, or has another SHA-256 (trust=True accepts it, and records it).
    """

    name = "inception"

    def __init__(self, file: str = "", device: torch.device | str = "cpu", trust: bool = False):
        path = Path(file) if file else download_inception()
        if not path.is_file():
            raise UserError(f"there is no Inception file {str(path)!r}; get it from {INCEPTION_URL}")
        digest = sha256(path)
        if digest != INCEPTION_SHA256 and not trust:
            raise UserError(f"{path} is not the Inception of published FIDs: its SHA-256 is {digest}, not "
                            f"{INCEPTION_SHA256}; a TorchScript file can run any code. Use it only if you know it, "
                            "with --trust")
        self.network = load_script(path, device)
        self.identity, self.device = f"inception {digest}", device

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        x = torch.from_numpy(rgb(images)).permute(0, 3, 1, 2).to(self.device)
        features = self.network(x, return_features=True)
        probabilities = self.network(x, no_output_bias=True)                        # as the inception score is defined
        if features.ndim != 2 or probabilities.ndim != 2:
            raise UserError(f"the extractor gives features of shape {tuple(features.shape)}, not (images, features)")
        return features.float().cpu().numpy(), probabilities.float().cpu().numpy()


class DINOv2:
    """As Stein et al. 2023: bicubic to 224 with PIL, normalised as ImageNet. file: a TorchScript file in place of the
    hub's model at its pinned revision; it has no published hash, so trust=True is needed."""

    name = "dinov2"

    def __init__(self, file: str = "", device: torch.device | str = "cpu", trust: bool = False):
        self.device = device
        if file:
            if not trust:
                raise UserError(f"{file}: a TorchScript file can run any code, and this one has no published hash. "
                                "Use it only if you know it, with --trust")
            self.network = load_script(Path(file), device)
            self.identity = f"dinov2 {sha256(Path(file))}"
            return
        try:
            network = torch.hub.load(DINOV2, "dinov2_vitl14", trust_repo=True, skip_validation=True)
            self.network = network.eval().to(device)
        except Exception as problem:                        # whatever the network and the hub raise
            raise UserError(f"DINOv2 cannot be loaded from {DINOV2} ({type(problem).__name__}); without a network, run "
                            f"torch.hub.load on a machine that has one and copy {torch.hub.get_dir()} with "
                            "checkpoints/dinov2_vitl14_pretrain.pth, or name a TorchScript file with --extractor-file"
                            ) from None
        self.identity = DINOV2

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        from PIL import Image

        small = [np.asarray(Image.fromarray(i).resize((224, 224), Image.Resampling.BICUBIC)) for i in rgb(images)]
        x = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).to(self.device).float() / 255
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (
            (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return self.network((x - mean) / std).float().cpu().numpy(), None


Extractor = Pixels | Inception | DINOv2


def load_script(path: Path, device: torch.device | str) -> torch.nn.Module:
    """A TorchScript file, whose hash has been checked. Raises UserError when it is none."""
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as problem:
        raise UserError(f"{path} is no TorchScript file: {first_line(problem)}") from None


def load_extractor(name: str, file: str = "", device: torch.device | str = "cpu", trust: bool = False) -> Extractor:
    """One of EXTRACTORS. Raises UserError when it is unknown or not at hand."""
    runs.full_float32()
    if name == "pixels":
        return Pixels()
    if name not in EXTRACTORS:
        raise UserError(f"unknown extractor {name!r}; choose one of {', '.join(EXTRACTORS)}")
    return {"inception": Inception, "dinov2": DINOv2}[name](file, device, trust)


def download_inception() -> Path:
    """The file in torch's cache, downloaded when it is not there; a part of a download is never taken for it."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / "inception-2015-12-05.pt"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        urllib.request.urlretrieve(INCEPTION_URL, temporary)
        if sha256(temporary) != INCEPTION_SHA256:
            temporary.unlink()
            raise UserError(f"the download of {INCEPTION_URL} has another SHA-256 than the Inception of published FIDs")
        os.replace(temporary, path)
        return path
    except OSError as problem:
        raise UserError(f"the Inception network cannot be downloaded ({problem}); get {INCEPTION_URL} where there is a "
                        f"network and put it at {path}, or name it with --extractor-file") from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(file.read()).hexdigest()


def rgb(images: np.ndarray) -> np.ndarray:
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else np.ascontiguousarray(images)


def through_codec(images: np.ndarray, codec: str) -> np.ndarray:
    """Images as a reader of the files gets them. jpeg: quality 75, PIL's default, as LFM stores both sides."""
    from PIL import Image

    if codec == "none":
        return images
    result = []
    for image in rgb(images):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "jpeg")
        result.append(np.asarray(Image.open(stream)))
    return np.stack(result)


# ---------------------------------------------------------------------------------------------------------------------
# statistics of a set of images


KEEP = 50_000                                               # features kept of a set: 0.4 GB of Inception's


@dataclass
class Statistics:
    """Mean, covariance and features of a set of images, added up batch by batch.

    Sums and products are float64. Features and probabilities of at most KEEP images, a fixed random choice among
    `total` (0: all), are kept in float32, in the order of the images, whoever added them.
    how: what they were made of and how, everything that must be equal to compare.
    """

    how: dict
    total: int = 0
    features: dict = field(default_factory=dict)            # number of the first image of a batch -> array
    probabilities: dict = field(default_factory=dict)
    count: int = 0
    sum: np.ndarray | float = 0.0
    products: np.ndarray | float = 0.0

    def add(self, features: np.ndarray, probabilities: np.ndarray | None = None, first: int | None = None) -> None:
        """Features (B, D) of the images first, first + 1, ... (None: those after the last)."""
        if features.ndim != 2:
            raise UserError(f"features must have the shape (images, features), not {features.shape}")
        x, first = features.astype(np.float64), self.count if first is None else first
        self.count, self.sum, self.products = self.count + len(x), self.sum + x.sum(axis=0), self.products + x.T @ x
        kept = self.kept[first : first + len(x)] if self.total > KEEP else slice(None)
        self.features[first] = features.astype(np.float32)[kept]
        if probabilities is not None:
            self.probabilities[first] = probabilities.astype(np.float32)[kept]

    @cached_property
    def kept(self) -> np.ndarray:
        """Which of `total` images keep their features."""
        mask = np.zeros(self.total, bool)
        mask[np.random.default_rng(0).permutation(self.total)[:KEEP]] = True
        return mask

    def gather(self, ranks: Ranks) -> "Statistics":
        """The statistics of all processes together, in the first one."""
        parts = ranks.gather((self.count, self.sum, self.products, self.features, self.probabilities))
        joined = Statistics(self.how, self.total)
        for count, total, products, features, probabilities in parts:
            joined.count, joined.sum = joined.count + count, joined.sum + total
            joined.products = joined.products + products
            joined.features.update(features)
            joined.probabilities.update(probabilities)
        return joined

    @property
    def mean(self) -> np.ndarray:
        return self.sum / self.count

    @property
    def cov(self) -> np.ndarray:
        """Unbiased, symmetric to the last bit."""
        cov = (self.products - np.outer(self.sum, self.sum) / self.count) / (self.count - 1)
        return (cov + cov.T) / 2

    def all_features(self) -> np.ndarray:
        return np.concatenate([self.features[first] for first in sorted(self.features)])

    def all_probabilities(self) -> np.ndarray:
        return np.concatenate([self.probabilities[first] for first in sorted(self.probabilities)])


@dataclass
class Reference:
    """What generated images are compared with; features is None when only mean and covariance are known."""

    mean: np.ndarray
    cov: np.ndarray
    features: np.ndarray | None
    how: dict


def save_reference(file: Path, statistics: Statistics) -> None:
    """mu, sigma (as pytorch-fid names them), features, and how they were made. Raises UserError when it cannot."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".tmp.npz")
        np.savez(temporary, mu=statistics.mean, sigma=statistics.cov, features=statistics.all_features(),
                 how=np.array(json.dumps({**statistics.how, "n": statistics.count})))
        os.replace(temporary, file)
    except OSError as problem:
        raise UserError(f"the reference cannot be written to {file}: {problem}") from None


def load_reference(file: str) -> Reference:
    """A reference of `fid.py ref`, or the mu and sigma of ADM or pytorch-fid. Raises UserError when it is none."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            mean, cov = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
            features = arrays["features"] if "features" in arrays else None
            how = json.loads(str(arrays["how"])) if "how" in arrays else {}
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or not isinstance(how, dict) or (
                features is not None and (features.ndim != 2 or features.shape[1] != len(mean))):
            raise ValueError("its arrays have the wrong shapes")
        return Reference(mean, cov, features, how)
    except Exception as problem:                            # numpy raises many kinds for a damaged file
        raise UserError(f"{file} is no reference: it must be an .npz with mu and sigma, as fid.py ref writes "
                        f"({first_line(problem)})") from None


def check_comparable(reference: Reference, how: dict, file: str) -> None:
    """Raises UserError when the two sides were not made alike: extractor, codec or resolution."""
    for key in ("extractor", "codec", "res"):
        if key in reference.how and reference.how[key] != how[key]:
            raise UserError(f"{file} cannot be compared with these images: its {key} is {reference.how[key]}, theirs "
                            f"is {how[key]}; make a reference with the same (python fid.py ref)")
