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
from pyramid import decompose, reconstruct, up
from run import pictures
from run.load import Run
from run.pictures import COARSE, FAINT, FINE, INK, QUIET, band_colour, band_name
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


def digits(run: Run, count: int, seed: int = 0) -> list[torch.Tensor]:
    """Generated bands of the digits 0, 1, ...: [(count, 1, 4, 4), (count, 1, 8, 8)]."""
    noise, y = causal.noise_of(run, seed, range(count)), choose(run.condition, count)
    return causal.draw_bands(run, noise, y, **solver_settings(run.cfg))[0]


def hero(path: Path, run: Run) -> None:
    """Two photographs split into three bands; ten digits generated in two."""
    height, side, pitch = 672, 168, 206
    figure, axis = sheet(height)
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
    bands, top, small = digits(run, 10), 440, 62
    total = reconstruct(bands)
    title = "generated: the coarse band starts, the fine one joins it; their sum is the image"
    say(axis, WIDTH / 2, top - 24, title, size=TITLE)
    for row, (name, color, images) in enumerate((("coarse", COARSE, bands[0]), ("+ fine", FINE, bands[1]),
                                                 ("= digit", INK, total))):
        y = top + row * (small + 14)
        say(axis, 84, y + small / 2, name, color=color, weight="bold", ha="right")
        for column, image in enumerate(images):
            tile(axis, 98 + column * (small + 10.5), y, small, image, color if row < 2 else None)
    save(figure, path)


def mosaic(bands: list[torch.Tensor], whole: int) -> np.ndarray:
    """Rows coarse, fine, sum; a column for each image; uint8, 6 for each pixel, with white between the images."""
    rows = [up(bands[0]), bands[1] if len(bands) > 1 else None, reconstruct(bands) if len(bands) > 1 else up(bands[0])]
    count, cell = len(bands[0]), whole * 6
    canvas = np.full((3 * (cell + 6), count * (cell + 6), 3), 255, np.uint8)
    for r, images in enumerate(rows):
        for c in range(count):
            y, x = r * (cell + 6) + 3, c * (cell + 6) + 3
            canvas[y - 1 : y + cell + 1, x - 1 : x + cell + 1] = 200            # a frame: noise can be white
            canvas[y : y + cell, x : x + cell] = 242 if images is None else pixels(images[c]).repeat(
                6, axis=0).repeat(6, axis=1)
    return canvas


def palette() -> Image.Image:
    """Few colours, chosen: greys, and the bands' own colours on white. A GIF of any others is five times as large."""
    from matplotlib.colors import to_rgb

    greys = [(v, v, v) for v in (*range(0, 250, 10), 255)]
    weights = np.arange(1, 9) / 8
    tints = [[round(255 * (1 - w * (1 - c))) for c in to_rgb(color)] for color in (COARSE, FINE) for w in weights]
    image = Image.new("P", (1, 1))
    image.putpalette(sum(map(list, [*greys, *tints]), []))
    return image


def generation(path: Path, run: Run, count: int = 12, steps: int = 80) -> None:
    """An animation: t runs from 0 to 1, the coarse band forms, the fine one joins at T_1, and the sum of both."""
    states = pictures.watch(run, sample.Guided(run.model), sample.solve, choose(run.condition, count),
                            numbers=range(count), steps=steps)
    start, height, left = run.cfg.starts[1], 290, 84
    figure, axis = sheet(height)
    for row, (name, color) in enumerate((("coarse", COARSE), ("+ fine", FINE), ("= sum", INK))):
        say(axis, left - 12, 116 + row * 62.5, name, color=color, weight="bold", ha="right")
    width = WIDTH - left - 34
    for row, (color, begin) in enumerate(((COARSE, 0.0), (FINE, start))):
        box(axis, left, 34 + 13 * row, width, 8, fill=FAINT)
        box(axis, left + begin * width, 34 + 13 * row, (1 - begin) * width, 8, fill=color, alpha=0.28)
    grown = [axis.barh(38 + 13 * row, 0, 8, left=left + begin * width, color=color)[0]
             for row, (color, begin) in enumerate(((COARSE, 0.0), (FINE, start)))]
    for t in (0, start, 1):
        say(axis, left + t * width, 66, f"{t:g}", size=SMALL, color=QUIET)
    clock = axis.text(left, 18, "", fontsize=TEXT, ha="center", va="center", weight="bold")
    bands_axis = plot(figure, left - 3, 85, width + 6, 62.5 * 3)
    bands_axis.set_axis_off()
    image = bands_axis.imshow(mosaic(states[0][1], run.cfg.res), interpolation="nearest", aspect="auto")
    frames = []
    for t, bands in states:
        image.set_data(mosaic(bands, run.cfg.res))
        clock.set(text=f"t = {t:.2f}", x=left + t * width)
        for bar, begin in zip(grown, (0.0, start), strict=True):
            bar.set_width(max(0.0, t - begin) * width)
        frames.append(picture(figure, 920).quantize(palette=palette(), dither=Image.Dither.NONE))
    pause = [800, *[80] * (len(frames) - 2), 3500]         # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=pause, loop=0, optimize=True, disposal=1)
