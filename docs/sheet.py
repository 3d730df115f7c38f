"""A sheet for drawings: one axis whose units are the pixels of a page 850 wide, y downwards; tiles of real pixels,
text, plots at given places. Everything in docs/ that is no plain plot is drawn on one, so sizes and type agree."""

import io
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from data.batches import to_uint8
from run import pictures

WIDTH, FILE_WIDTH = 850, 1400                               # of a README's column, and of the file
TITLE, TEXT, SMALL = 10.5, 9, 8                             # points, in that column


def sheet(height: float) -> tuple[Figure, Axes]:
    """An empty page: (figure, axis)."""
    figure = pictures.pyplot().figure(figsize=(WIDTH / 96, height / 96))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0), autoscale_on=False)
    axis.set_axis_off()
    return figure, axis


def plot(figure, x: float, y: float, width: float, height: float, **settings) -> Axes:
    """A plot at a place of the page."""
    w, h = figure.get_size_inches() * 96
    return figure.add_axes((x / w, 1 - (y + height) / h, width / w, height / h), **settings)


def say(axis, x: float, y: float, text: str, size: float = TEXT, color: str = pictures.INK, ha: str = "center",
        va: str = "center", **more) -> None:
    axis.text(x, y, text, fontsize=size, color=color, ha=ha, va=va, **more)


def box(axis, x: float, y: float, width: float, height: float, fill: str = "none", edge: str = "none",
        line: float = 1, **more) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=line, **more))


def arrow(axis, start: tuple, end: tuple, color: str = pictures.QUIET) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.1, "shrinkA": 0,
                                              "shrinkB": 0, "mutation_scale": 9})


def pixels(x: torch.Tensor, gain: float = 1.0) -> np.ndarray:
    """One image or band (C, H, W) in [-1, 1] as uint8 (H, W, 3); 0 is mid-grey."""
    return to_uint8(gain * x).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def tile(axis, x: float, y: float, side: float, image: torch.Tensor | np.ndarray | None, color: str | None = None,
         gain: float = 1.0) -> None:
    """An image, enlarged without smoothing, in a frame of the colour of its band; None: a place still empty."""
    if image is None:
        box(axis, x, y, side, side, fill="#f6f6f6", edge=pictures.FAINT)
        return
    shown = pixels(image, gain) if isinstance(image, torch.Tensor) else image
    axis.imshow(shown, extent=(x, x + side, y + side, y), interpolation="nearest", aspect="auto")
    if color:
        box(axis, x - 1, y - 1, side + 2, side + 2, edge=color, line=1.6)


def picture(figure, width: int = FILE_WIDTH) -> Image.Image:
    """The page as pixels."""
    file = io.BytesIO()
    figure.savefig(file, dpi=96 * width / WIDTH, format="png")
    return Image.open(file).convert("RGB")


def save(figure, path: Path) -> None:
    """Writes the page with 256 colours, a third of the bytes; what is nearly grey becomes grey."""
    few = picture(figure).quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    colours = np.array(few.getpalette()).reshape(-1, 3)
    plain = np.ptp(colours, axis=1) < 10
    colours[plain] = colours[plain].mean(axis=1, keepdims=True).round()
    few.putpalette(colours.flatten().tolist())
    few.save(path, optimize=True)
    pictures.pyplot().close(figure)
