"""The first two pictures of README.md: images as sums of their bands, and a generation in motion."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import sample
from data import batches
from data.conditions import choose
from docs.sheet import SMALL, TEXT, TITLE, WIDTH, box, picture, pixels, plot, save, say, sheet, tile
from extras import causal
from pyramid import decompose, reconstruct
from run import pictures
from run.load import Run
from run.pictures import FAINT, INK, QUIET, band_colour, band_name
from run.solver import solver_settings

GAIN = 2                                                    # fine bands are small: contrast around mid-grey, doubled


def crops(side: int, count: int = 2, seed: int = 1) -> torch.Tensor:
    """Crops of scikit-learn's two photographs in turn, in [-1, 1] (count, 3, side, side)."""
    images, places = [], batches.philox(seed, 0).random((10, 3))[-count:]
    for image, (_, row, column) in zip(load_sample_images().images, places, strict=True):
        size = [round(length * min(1, 3 * side / 427)) for length in image.shape[1::-1]]
        small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)).transpose(2, 0, 1)
        top, left = (int(u * (length - side + 1)) for u, length in zip((row, column), small.shape[1:], strict=True))
        images.append(small[:, top : top + side, left : left + side])
    return torch.from_numpy(np.stack(images)).float() / 127.5 - 1


def generated(run: Run, count: int, seed: int = 0) -> list[torch.Tensor]:
    """Generated bands of the classes in turn, each (count, C, H_i, W_i)."""
    noise, y = causal.noise_of(run, seed, range(count)), choose(run.condition, count)
    return causal.draw_bands(run, noise, y, **solver_settings(run.cfg))[0]


def hero(path: Path, run: Run) -> None:
    """Two photographs split into three bands; one generated image of each class, band by band."""
    bands_of, top, small = generated(run, 10), 440, 62
    count, side, pitch = len(bands_of), 168, 206
    figure, axis = sheet(top + (count + 1) * (small + 14) + 4)
    for row, x in enumerate(crops(128)):
        bands, y = decompose(x[None], 3), 34 + row * (side + 16)
        tile(axis, 32, y, side, x)
        for i, band in enumerate(bands):
            left = 32 + (i + 1) * pitch
            say(axis, left - (pitch - side) / 2, y + side / 2, "=+"[i > 0], size=17, color=QUIET)
            tile(axis, left, y, side, band[0], band_colour(i, 3), GAIN if i else 1)
            if row == 0:
                say(axis, left + side / 2, 18, f"{band_name(i, 3)}, {band.shape[-1]} × {band.shape[-1]}",
                    color=band_colour(i, 3), weight="bold")
    say(axis, 32 + side / 2, 18, f"real crop, {x.shape[-1]} × {x.shape[-1]}")
    say(axis, WIDTH / 2, top - 24, "generated: the coarse band starts, finer ones join it; their sum is the image",
        size=TITLE)
    for row, images in enumerate([*bands_of, reconstruct(bands_of)]):
        color, y = band_colour(row, count) if row < count else INK, top + row * (small + 14)
        say(axis, 84, y + small / 2, sign(row, count), color=color, weight="bold", ha="right")
        for column, image in enumerate(images):
            tile(axis, 98 + column * (small + 10.5), y, small, image, color if row < count else None)
    save(figure, path)


def sign(row: int, count: int) -> str:
    """What a row of bands, coarse to fine, or of their sum is called."""
    return "= sum" if row == count else f"{'+ ' * (row > 0)}{band_name(row, count)}"


def mosaic(bands: list[torch.Tensor], whole: int, num_scales: int) -> np.ndarray:
    """Rows coarse to fine and the sum; a column for each image; uint8, about 64 for each image, with white between."""
    cell = whole * max(1, 64 // whole)
    canvas = np.full(((num_scales + 1) * (cell + 6), len(bands[0]) * (cell + 6), 3), 255, np.uint8)
    for r, images in enumerate([*bands, *[None] * (num_scales - len(bands)), reconstruct(bands)]):
        for c in range(len(bands[0])):
            y, x = r * (cell + 6) + 3, c * (cell + 6) + 3
            canvas[y - 1 : y + cell + 1, x - 1 : x + cell + 1] = 200            # a frame: noise can be white
            canvas[y : y + cell, x : x + cell] = 242 if images is None else pixels(images[c]).repeat(
                cell // images.shape[-1], axis=0).repeat(cell // images.shape[-1], axis=1)
    return canvas


def palette(num_scales: int) -> Image.Image:
    """Few colours, chosen: greys, and the bands' own colours on white. A GIF of any others is five times as large."""
    from matplotlib.colors import to_rgb

    greys = [(v, v, v) for v in (*range(0, 250, 10), 255)]
    colours, weights = [band_colour(i, num_scales) for i in range(num_scales)], np.arange(1, 9) / 8
    tints = [[round(255 * (1 - w * (1 - c))) for c in to_rgb(color)] for color in colours for w in weights]
    image = Image.new("P", (1, 1))
    image.putpalette(sum(map(list, [*greys, *tints]), []))
    return image


def generation(path: Path, run: Run, count: int = 10, steps: int = 48) -> None:
    """An animation: t runs from 0 to 1, the coarse band forms, finer ones join it at T_i, and the sum of all."""
    states = pictures.watch(run, sample.Guided(run.model), sample.solve, choose(run.condition, count),
                            numbers=range(count), steps=steps)
    starts, left = run.cfg.starts, 84
    bars, rows, width = 13 * len(starts), len(starts) + 1, WIDTH - 84 - 34
    first, colours = mosaic(states[0][1], run.cfg.res, len(starts)), palette(len(starts))
    tall = (width + 6) * first.shape[0] / first.shape[1]
    figure, axis = sheet(76 + bars + tall)
    for row in range(rows):
        color = band_colour(row, len(starts)) if row < len(starts) else INK
        say(axis, left - 12, 62 + bars + (row + 0.5) * tall / rows, sign(row, len(starts)), color=color, weight="bold",
            ha="right")
    grown = []
    for row, begin in enumerate(starts):
        color, y = band_colour(row, len(starts)), 34 + 13 * row
        box(axis, left, y, width, 8, fill=FAINT)
        box(axis, left + begin * width, y, (1 - begin) * width, 8, fill=color, alpha=0.28)
        grown.append(axis.barh(y + 4, 0, 8, left=left + begin * width, color=color)[0])
    for t in (*starts, 1):
        say(axis, left + t * width, 42 + bars, f"{t:.2g}", size=SMALL, color=QUIET)
    clock = axis.text(left, 18, "", fontsize=TEXT, ha="center", va="center", weight="bold")
    bands_axis = plot(figure, left - 3, 62 + bars, width + 6, tall)
    bands_axis.set_axis_off()
    image = bands_axis.imshow(first, interpolation="nearest", aspect="auto")
    frames = []
    for t, bands in states:
        image.set_data(mosaic(bands, run.cfg.res, len(starts)))
        clock.set(text=f"t = {t:.2f}", x=left + t * width)
        for bar, begin in zip(grown, starts, strict=True):
            bar.set_width(max(0.0, t - begin) * width)
        frames.append(picture(figure, 920).quantize(palette=colours, dither=Image.Dither.NONE))
    pause = [800, *[110] * (len(frames) - 2), 3500]        # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=pause, loop=0, optimize=True, disposal=1)
