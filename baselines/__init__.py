"""The systems LapFlow is compared with, one file each, on the same blocks (model.py), data, solver and scores.

Every file has the same four names:

    network(cfg, channels, num_classes, side)       what is trained
    schedule(cfg)                                   times and states; what `sample.solve` needs of it:
                                                    segments; enter(j, bands, x0), the state as segment j begins;
                                                    image(bands), what the state shows
    loss(model, x1, y, schedule, rng, stages)       as schedule.loss; rng is a data.BatchRandom
    sample(model, n, y, schedule, shape, solve)     as sample.sample; n is a source of Gaussians, solve is sample.solve

Time runs from noise at 0 to data at 1, scales are counted from the coarsest, i = 0..K-1, in all of them.
"""

from importlib import import_module
from types import ModuleType

FILES = {"lfm": "lfm", "pyramidal": "pyramidal", "pyramidal-zero-overlap": "pyramidal", "pixelflow": "pyramidal",
         "edify": "edify", "edify-plain": "edify", "dfm": "dfm", "separate": "separate"}


def load(method: str) -> ModuleType:
    """The file of a method."""
    return import_module(f"baselines.{FILES[method]}")
