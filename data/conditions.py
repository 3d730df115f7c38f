"""What an image is asked to be: a class label, or a vector such as a text embedding.

A condition is a small module with an embedding (forward), a null (for label dropout and guidance), values for a grid of
samples (draw), and captions (describe). A network takes any module with these four; nothing else knows what y is.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from config import UserError, explain


class Labels(nn.Module):
    """Class labels: y (B,) long. The null label is the number of classes."""

    def __init__(self, classes: list[str], hidden_size: int):
        super().__init__()
        self.classes = list(classes)
        self.table = nn.Embedding(len(classes) + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.table(y)                                                        # (B, D)

    def null(self, y: Tensor) -> Tensor:
        return torch.full_like(y, len(self.classes))

    def draw(self, num: int) -> Tensor:
        """The classes in turn (num,)."""
        return torch.arange(num) % len(self.classes)

    def describe(self, y: Tensor) -> list[str]:
        return [self.classes[label] for label in y.tolist()]


class Vectors(nn.Module):
    """Continuous conditions such as text embeddings: y (B, dim) float; a row of NaN is the null condition.

    examples (M, dim): conditions of training images. They set the scale of the input, and grids draw from them.
    """

    def __init__(self, dim: int, hidden_size: int, examples: Tensor):
        super().__init__()
        self.register_buffer("examples", examples)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.absent = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, y: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.examples, dim=0, correction=0)              # (dim,) each
        scaled = (y.nan_to_num() - mean) / torch.where(std > 1e-6, std, 1.0)        # a constant keeps its scale
        return torch.where(y.isnan().any(dim=1, keepdim=True), self.absent, self.mlp(scaled))       # (B, D)

    def null(self, y: Tensor) -> Tensor:
        return torch.full_like(y, torch.nan)

    def draw(self, num: int) -> Tensor:
        """The examples in turn (num, dim)."""
        return self.examples[torch.arange(num, device=self.examples.device) % len(self.examples)]

    def describe(self, y: Tensor) -> list[str]:
        """A single number as it is; longer vectors by their place."""
        return [f"{row[0]:.2f}" if len(row) == 1 else str(i) for i, row in enumerate(y.tolist())]


def condition_of(facts: dict, examples: Tensor | None = None) -> Callable[[int], nn.Module] | None:
    """hidden_size -> Vectors or Labels; None: unconditional. Without examples there is room for those of a file."""
    if facts.get("vectors"):
        rows, dim = facts["vectors"]
        return lambda hidden_size: Vectors(dim, hidden_size, torch.zeros(rows, dim) if examples is None else examples)
    return (lambda hidden_size: Labels(facts["classes"], hidden_size)) if facts["classes"] else None


def check_guidance(condition: nn.Module | None, label_drop: float, cfg_scale: float) -> None:
    """Raises UserError for guidance that the training of a run does not support."""
    problem = ("a condition, but this run was trained without classes" if condition is None else
               "a null condition, but this run has --label-drop 0" if label_drop == 0 else "")
    if cfg_scale != 1 and problem:
        raise UserError(f"guidance needs {problem}: leave out the guidance scale")


def choose(condition: nn.Module | None, num: int | None, labels: list | str | int | None = None,
           vectors: np.ndarray | Tensor | str | None = None) -> Tensor | None:
    """The conditions y (N, ...) asked for, None for an unconditional run; N is num, else their number or 40.

    labels: names or numbers of classes, or one of them; vectors: (n, dim), or a .npy file of them. Both are taken in
    turn. Neither, or "balanced": what the run has, in turn. Raises UserError for what it does not have.
    """
    if num is not None and num < 1:
        raise UserError(f"the number of images must be at least 1, not {num}")
    labels = None if isinstance(labels, str) and labels == "balanced" else labels
    for given, kind, name in ((labels, Labels, "labels"), (vectors, Vectors, "vectors")):
        if given is not None and not isinstance(condition, kind):
            trained = "without classes" if condition is None else f"on {type(condition).__name__.lower()}"
            raise UserError(f"this run was trained {trained}: leave out the {name}")
    if labels is not None:
        labels = [labels] if np.ndim(labels) == 0 else labels
        rows = torch.tensor([find_label(condition.classes, label) for label in labels], dtype=torch.long)
        if not len(rows):
            raise UserError("the list of labels is empty: name one class at least, or leave it out")
    elif vectors is not None:
        rows = read_vectors(condition.examples.shape[1], vectors)
    else:
        return None if condition is None else condition.draw(num or 40).cpu()
    return rows[torch.arange(num or len(rows)) % len(rows)]


def read_vectors(dim: int, vectors: np.ndarray | Tensor | str) -> Tensor:
    """Vectors (n, dim) or a .npy file of them, as float32. Raises UserError."""
    name = f"the vectors in {vectors}" if isinstance(vectors, str) else "vectors"
    with explain(f"{name} cannot be read"):
        array = np.load(vectors, allow_pickle=False) if isinstance(vectors, str) else vectors
        rows = torch.as_tensor(array, dtype=torch.float32).cpu()
    if rows.ndim != 2 or rows.shape[1] != dim or not len(rows) or not rows.isfinite().all():
        raise UserError(f"{name} must be finite, of shape (n, {dim}), not {tuple(rows.shape)}")
    return rows


def find_label(classes: list[str], text: str | int) -> int:
    """The number of a class, by name or number; texts of classes named by numbers are names. Raises UserError."""
    if not isinstance(text, str):
        if text not in range(len(classes)):
            raise UserError(f"there is no class number {text}: this run has 0 to {len(classes) - 1}")
        return int(text)
    if text in classes:
        return classes.index(text)
    names_are_numbers = any(name.isdecimal() for name in classes)
    if not names_are_numbers and text.isdecimal() and len(text) < 10 and int(text) < len(classes):
        return int(text)
    known = f"{classes[0]!r} to {classes[-1]!r}" if names_are_numbers else f"0 to {len(classes) - 1}, or a name"
    raise UserError(f"there is no label {text!r}: use {known}")
