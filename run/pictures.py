"""Pictures: one style for all, grids of small images, the loss curves. matplotlib is loaded when one is drawn."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
from torch import Tensor

from data.batches import ImageRandom, to_uint8
from run import checkpoint

INK, QUIET, FAINT = "#222222", "#6b6b6b", "#e4e4e4"         # text, small print, empty places
COARSE, MIDDLE, FINE = "#0072b2", "#009e73", "#d55e00"      # the bands, in every picture: colours that the colour-blind
OTHERS = ("#cc79a7", "#e69f00", "#56b4e9", "#7b4fa3", "#8c8c8c")                # tell apart (Okabe and Ito)


def band_colour(i: int, num_scales: int) -> str:
    """Of band i of K: the coarsest and the finest always look the same."""
    return COARSE if i == 0 else FINE if i == num_scales - 1 else (MIDDLE, *OTHERS)[(i - 1) % 6]


def band_name(i: int, num_scales: int) -> str:
    return "coarse" if i == 0 else "fine" if i == num_scales - 1 else "middle" if num_scales == 3 else f"band {i}"


def pyplot() -> ModuleType:
    """matplotlib.pyplot, set to write files without a display, in one style; opaque white, for pages in dark mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8.5,
        "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "grid.color": "#b0b0b0", "legend.frameon": False, "lines.linewidth": 1.6, "lines.markersize": 5,
        "figure.facecolor": "white", "savefig.facecolor": "white", "savefig.transparent": False,
        "axes.prop_cycle": matplotlib.cycler(color=[COARSE, FINE, MIDDLE, *OTHERS])})
    return plt


def plain_ticks(axis) -> None:
    """Plain numbers on logarithmic axes: 1, 2 and 5 of each decade, or all ticks of less than one decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for side in (axis.xaxis, axis.yaxis):
        if side.get_scale() != "log":
            continue
        (low, high), plain = side.get_view_interval(), FuncFormatter(lambda value, _: f"{value:g}")
        if high >= 10 * low:
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter(plain)
        side.set_minor_formatter(NullFormatter() if high >= 10 * low else plain)


def plot(path: Path, curves: list[tuple], size: tuple = (8, 5), **axes) -> None:
    """curves: (x, y, matplotlib's keywords) of each; axes: what is set of the axis, labels and scales."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    for x, y, style in curves:
        axis.plot(x, y, **style)
    axis.set(**axes)
    axis.grid(which="both", alpha=0.3)
    plain_ticks(axis)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_images(path: Path, rows: list, labels: list, columns: list | None = None, names: list | None = None) -> None:
    """A table of small images, enlarged to the size of the largest. rows: lists of uint8 (H, W, C), or of text for an
    empty cell; labels above each cell, titles of the columns and names of the rows."""
    plt = pyplot()
    side = max(cell.shape[0] for row in rows for cell in row if not isinstance(cell, str))
    pitch, width = side * 1.15, max(len(row) for row in rows)
    gap = pitch * (1.3 if any(labels) else 1.0)
    letters = max((len(line) for name in names or [] for line in name.split("\n")), default=0)
    left = side * (0.16 + 0.09 * letters)                   # room for the names
    figure = plt.figure(figsize=(0.95 * (width + left / pitch), 0.95 * len(rows) * gap / pitch + 0.4))
    axis = figure.add_axes((0, 0, 1, 1))
    text = partial(axis.text, fontsize=9, parse_math=False)                         # a class may be called 5$ to 10$
    for r, row in enumerate(rows):
        top = r * gap
        for c, cell in enumerate(row):
            box = (c * pitch, c * pitch + side, top + side, top)
            middle = c * pitch + side / 2
            if isinstance(cell, str):
                text(middle, top + side / 2, cell, ha="center", va="center", fontsize=8, color=QUIET)
            else:
                axis.imshow(cell.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=box)
                axis.plot([box[k] for k in (0, 1, 1, 0, 0)], [box[k] for k in (3, 3, 2, 2, 3)], color="#c8c8c8",
                          linewidth=0.6)                    # white noise on white paper
            if labels and labels[r]:
                text(middle, top - 0.04 * side, labels[r][c], ha="center", va="bottom")
        if names:
            text(-0.08 * side, top + side / 2, names[r], ha="right", va="center")
    for c, title in enumerate(columns or []):
        text(c * pitch + side / 2, -0.1 * side, title, ha="center", va="bottom")
    axis.set(xlim=(-left, width * pitch), ylim=((len(rows) - 1) * gap + 1.1 * side, -0.4 * side))
    axis.set_aspect("equal")
    axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_grid(path: Path, images: np.ndarray, y: Tensor | None, condition: object | None) -> None:
    """The first images (at most 100) with their conditions above them."""
    captions, starts = None if y is None else condition.describe(y[:100]), range(0, min(len(images), 100), 10)
    draw_images(path, [list(images[i : i + 10]) for i in starts], [captions and captions[i : i + 10] for i in starts])


def watch(run: object, model: Callable, solve: Callable, y: Tensor | None, seed: int = 0,
          numbers: Sequence[int] = range(3), steps: int = 80) -> list:
    """The states of the images with these numbers: [(t, bands)] at each Euler step and at t = 1.

    run: a run.load.Run; model(bands, t, y) and solve: as in sample.py; y: their conditions, perhaps more."""
    states = []

    def watched(velocity, noise, schedule, **solver):
        def recorded(bands, t):
            states.append((t.item(), bands))                                    # Euler calls once for each step
            return velocity(bands, t)

        bands, nfe = solve(recorded, noise, schedule, **solver)
        states.append((1.0, bands))
        return bands, nfe

    rng = ImageRandom(seed, numbers if y is None else numbers[: len(y)], run.device)
    y = None if y is None else y[: len(numbers)].to(run.device)
    with run.eager():
        run.system.sample(model, rng, y, run.schedule, run.shape, watched, solver="euler", steps=steps)
    return states


def band_pixels(run: object, i: int, band: Tensor) -> np.ndarray:
    """Band i of one image (C, H, W) as uint8 (H, W, C): fine ones around mid-grey, contrast doubled; of latents three
    channels as they are."""
    contrast = (1 if run.facts.get("latent") is None else 0.4) * (2 if i else 1)
    return to_uint8(contrast * band[:3]).permute(1, 2, 0).cpu().numpy()


def draw_trajectory(path: Path, run: object, states: list, columns: int = 9) -> None:
    """Each band and their sum at several times, from noise to image; states: of `watch`."""
    chosen = [min(states, key=lambda state: abs(state[0] - t)) for t in np.linspace(0, 1, columns)]
    parts, rows, names = len(states[-1][1]), [], []
    for image in range(len(states[-1][1][0])):
        for i in range(parts if parts > 1 else 0):          # some systems flow whole images: no bands to draw
            start = run.schedule.segments[i][0]
            rows.append([band_pixels(run, i, bands[i][image]) if i < len(bands) else f"from\nt = {start:.2g}"
                         for _, bands in chosen])
            names.append(f"band {i}")
        rows.append([run.decode(run.schedule.image(bands)[image : image + 1])[0] for _, bands in chosen])
        names.append("sum" if parts > 1 else f"image {image}")
    draw_images(path, rows, [], [f"t = {t:.2f}" for t, _ in chosen], names)


def draw_loss(out: Path, path: Path | None = None) -> None:
    """The loss of every band, from OUT/metrics.jsonl: OUT/loss.png, or another path."""
    lines = checkpoint.read_lines([out / "metrics.jsonl"])
    bands, curves = len(lines[0]["loss_bands"]) if lines else 0, []
    for i in range(bands):
        points = [(line["step"], line["loss_bands"][i]) for line in lines if line["loss_bands"][i] is not None]
        label = f"band {i}" + (f", {band_name(i, bands)}" if bands > 1 else "")
        if points:
            curves.append((*zip(*points, strict=True), dict(color=band_colour(i, bands), label=label)))
    if curves:
        plot(path or out / "loss.png", curves, (7, 4), xlabel="step", ylabel="mean squared error of the velocity",
             yscale="log")
