"""Pictures: grids of small images and the loss curves. matplotlib is loaded when the first one is drawn."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np


def pyplot() -> ModuleType:
    """matplotlib.pyplot, set to write files: no window, no display needed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_images(path: Path, rows: list, labels: list, columns: list | None = None, names: list | None = None) -> None:
    """A table of small images, enlarged. rows: lists of uint8 (H, W, C) or of text for an empty cell; labels above
    each cell (or None), titles of the columns and names of the rows. All images become the size of the largest."""
    plt = pyplot()
    side = max(cell.shape[0] for row in rows for cell in row if not isinstance(cell, str))
    pitch, width = side * 1.15, max(len(row) for row in rows)
    gap = pitch * (1.3 if any(labels) else 1.0)
    letters = max((len(line) for name in names or [] for line in name.split("\n")), default=0)
    left = side * (0.1 + 0.085 * letters)                   # room for the names
    figure = plt.figure(figsize=(0.95 * (width + left / pitch), 0.95 * len(rows) * gap / pitch + 0.4))
    axis = figure.add_axes((0, 0, 1, 1))
    for r, row in enumerate(rows):
        top = r * gap
        for c, cell in enumerate(row):
            box = (c * pitch, c * pitch + side, top + side, top)
            middle = c * pitch + side / 2
            if isinstance(cell, str):
                axis.text(middle, top + side / 2, cell, ha="center", va="center", fontsize=7, color="gray")
            else:
                axis.imshow(cell.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=box)
            if labels and labels[r]:
                axis.text(middle, top - 0.04 * side, labels[r][c], ha="center", va="bottom", fontsize=9)
        if names:
            axis.text(-0.08 * side, top + side / 2, names[r], ha="right", va="center", fontsize=9)
    for c, title in enumerate(columns or []):
        axis.text(c * pitch + side / 2, -0.1 * side, title, ha="center", va="bottom", fontsize=9)
    axis.set(xlim=(-left, width * pitch), ylim=((len(rows) - 1) * gap + 1.1 * side, -0.4 * side))
    axis.set_aspect("equal")
    axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_grid(path: Path, images: np.ndarray, labels: np.ndarray | None, classes: list[str], columns: int = 10) -> None:
    """The first images (at most 100), enlarged, with their labels above them."""
    images = images[:100]
    rows = [list(images[i : i + columns]) for i in range(0, len(images), columns)]
    text = [None if labels is None else [classes[y] for y in labels[i : i + columns]]
            for i in range(0, len(images), columns)]
    draw_images(path, rows, text)


def draw_loss(out: Path) -> None:
    """loss.png: the loss of every band, from metrics.jsonl."""
    plt = pyplot()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    if not lines:
        return
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for i in range(len(lines[0]["loss_bands"])):
        points = [(line["step"], line["loss_bands"][i]) for line in lines if line["loss_bands"][i] is not None]
        axis.plot(*zip(*points, strict=True), label=f"band {i}" + (" (coarsest)" if i == 0 else ""))
    axis.set(xlabel="step", ylabel="mean squared error of the velocity", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(out / "loss.png", dpi=100)
    plt.close(figure)
