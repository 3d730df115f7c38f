"""A judge for one data set: a small network trained once on its real training images.

Its 128 features see what the classes see, its predictions say whether an image shows the class it was asked for. The
weights are kept in judges/classifier-KEY.pt of the current directory; KEY is a hash of the data and of SETTINGS, so
other data or another recipe is another judge. Compare only scores of one `identity`: KEY and a hash of the weights,
which may differ on another machine. Fashion-MNIST: 92% of the test images right, after 90 seconds of one thread. It has
seen the training images: where the data has no test split, its scores of real images flatter.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from config import UserError, explain
from data.batches import Dataset
from run.load import full_float32

SETTINGS = dict(version=1, widths=(32, 64, 128, 128), features=128, side=64, examples=60_000, epochs=20, least=300,
                most=2000, batch=128, lr=3e-3, weight_decay=0.05, shift=32, seed=0)


class Network(nn.Module):
    """Convolutions that halve the image down to 4 x 4, at least three, and two linear layers."""

    def __init__(self, channels: int, side: int, classes: int):
        super().__init__()
        halvings = max(1, round(np.log2(side / 4)))
        count, widths = max(3, halvings), (channels, *SETTINGS["widths"])
        layers = [nn.BatchNorm2d(channels, affine=False)]   # sets mean and variance of the pixels
        for i, (before, width) in enumerate(zip(widths[:count], widths[1 : count + 1], strict=True)):
            layers += [nn.Conv2d(before, width, 3, 2 if i >= count - halvings else 1, 1, bias=False),
                       nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                                  nn.Linear(16 * widths[count], SETTINGS["features"], bias=False),
                                  nn.BatchNorm1d(SETTINGS["features"]), nn.ReLU())
        self.head = nn.Linear(SETTINGS["features"], classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, 128)."""
        return self.body(x.contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))                                          # (B, classes)


class Classifier:
    """The extractor: images uint8 (B, H, W, C) -> features (B, 128); `classify` gives their classes."""

    name = "classifier"

    def __init__(self, network: Network, identity: str, device: torch.device | str):
        self.network, self.identity, self.device = network.eval().to(device), identity, device

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.network.features(to_input(images).to(self.device).float() / 255).cpu().numpy()

    @torch.no_grad()
    def classify(self, features: np.ndarray) -> np.ndarray:
        """Features (N, 128) -> the numbers of the most probable classes (N,)."""
        x = torch.tensor(features, dtype=torch.float32, device=self.device)
        return self.network.head(x).argmax(dim=1).cpu().numpy()


def to_input(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, C) -> uint8 (B, C, H, W), at most 64 x 64."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    side = SETTINGS["side"]
    return x if x.shape[-1] <= side else F.adaptive_avg_pool2d(x.float(), side).round().byte()


def load_classifier(dataset: Dataset, decode: Callable, device: torch.device | str = "cpu",
                    folder: Path = Path("judges")) -> Classifier:
    """The classifier of a data set, from its file or trained now; decode: data x1 -> uint8 images (B, H, W, C).

    Raises UserError for data without classes, and for a damaged file.
    """
    if len(dataset.classes) < 2:
        raise UserError("the classifier needs data with class labels: choose other --features, such as efficientnet")
    full_float32()
    x1, labels = dataset.reference(256)
    facts = [SETTINGS, dataset.fingerprint, dataset.classes, len(dataset), labels.tolist()]
    key = hashlib.sha256(json.dumps(facts).encode() + x1.cpu().numpy().tobytes()).hexdigest()[:16]
    file = folder / f"classifier-{key}.pt"
    image = to_input(decode(x1[:1]))                                                # (1, C, H, W)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SETTINGS["seed"])
        network = Network(image.shape[1], image.shape[2], len(dataset.classes)).to(memory_format=torch.channels_last)
    if not file.exists():
        train(network, dataset, decode, device)
        with explain(f"the classifier cannot be written to {file}", kinds=OSError):
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(network.state_dict(), file.with_suffix(f".{os.getpid()}.tmp"))
            os.replace(file.with_suffix(f".{os.getpid()}.tmp"), file)
    with explain(f"{file} cannot be read as a classifier", ": delete it, and it is trained again"):
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    weights = b"".join(tensor.numpy().tobytes() for tensor in network.cpu().state_dict().values())
    return Classifier(network, f"classifier {key} {hashlib.sha256(weights).hexdigest()[:16]}", device)


def train(network: Network, dataset: Dataset, decode: Callable, device: torch.device | str) -> None:
    """AdamW with one cycle of the learning rate (Smith and Topin 2018), on shifted images; deterministic by seed.

    From SETTINGS["examples"] training images, fewer when their floats would fill more than 2 GB.
    """
    s, generator = SETTINGS, torch.Generator().manual_seed(SETTINGS["seed"])
    x1, labels = dataset.reference(min(s["examples"], 2**29 // dataset.channels // dataset.side**2))
    x, y = torch.cat([to_input(decode(part)) for part in x1.split(256)]), torch.from_numpy(labels)
    steps, most = min(max(s["epochs"] * len(x) // s["batch"], s["least"]), s["most"]), x.shape[-1] // s["shift"]
    network.train().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=s["lr"], weight_decay=s["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s["lr"], steps, pct_start=0.2)
    for _ in trange(steps, desc="training the classifier", leave=False):
        rows = torch.randint(len(x), (s["batch"],), generator=generator)
        shift = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
        batch = x[rows].roll(shift, dims=(2, 3)).to(device).float() / 255
        loss = F.cross_entropy(network(batch), y[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
