"""What the page of extras/demo.py asks for: work that shows how far it is and can be stopped, and its results as HTML.

The work itself is that of extras/causal.py, on any run that has previews.
"""

import base64
import copy
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from html import escape
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import config
import sample
from config import UserError
from data import conditions, sources
from data.batches import to_images
from extras import causal
from pyramid import decompose, reconstruct
from run import checkpoint, pictures
from run.load import Run
from run.ranks import within_memory
from run.solver import solver_settings

VARIATIONS, ENLARGED = 8, 4                                 # images of one click
FILM_STEPS, FILM_SIDE = 48, 128                             # of an animation: Euler steps; pixels of a frame at most
PHOTO = 256                                                 # side of the photograph whose pyramid is shown
POLL = 0.15                                                 # seconds between two looks at work in progress
LEAVING = []                                                # stopped trainings that still save

# ---------------------------------------------------------------------------------------------------------------------
# work that shows how far it is, and can be stopped


class Stopped(Exception):
    """Ends work that nobody waits for any more."""


class Watched:
    """A network that counts its calls and knows the time of the last. Once `stopped`, the next call ends the work."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.calls, self.t, self.stopped = model, 0, 0.0, False

    def go_on(self) -> None:
        if self.stopped:
            raise Stopped

    def __call__(self, bands: list[Tensor], t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        self.go_on()
        self.calls, self.t = self.calls + 1, t[0].item()
        return self.model(bands, t, y)

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)


def follow(run: Run, work: Callable[[Run], object], what: str, status: object) -> Iterator[dict]:
    """Does work(run) in a thread: yields {status: progress bar}, returns its result and the seconds it took. To close
    this generator is to stop the work."""
    run, began, future = copy.copy(run), time.perf_counter(), Future()
    run.model = Watched(run.model)

    def do():
        try:
            with torch.no_grad(), within_memory(run.device):
                future.set_result((work(run), time.perf_counter() - began))
        except BaseException as problem:
            future.set_exception(problem)

    Thread(target=do, daemon=True).start()
    try:
        while not wait([future], POLL).done:
            seconds = time.perf_counter() - began
            text = f"{what}: t = {run.model.t:.2f}, {run.model.calls} calls, {seconds:.1f} s"
            yield {status: bar(run.model.t, text)}
    finally:
        run.model.stopped = True
    return future.result()


def train(out: Path, flags: list[str]) -> Iterator[tuple[str, str]]:
    """Runs train.py: yields progress bars with the loss curve so far. Closing this stops it, and it saves."""
    lines, curve = [], ""
    program = Path(__file__).resolve().parent.parent / "train.py"
    while any(process.poll() is None for process in LEAVING):
        yield bar(0, "the training before this one still saves"), curve
        time.sleep(POLL)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output.txt", "w+") as output:
        process = subprocess.Popen([sys.executable, program, "--out", out, *flags], stdout=output, stderr=output)
        try:
            while process.poll() is None:
                before, lines = len(lines), checkpoint.read_lines(out.glob("metrics.jsonl"))
                if len(lines) > max(1, before):
                    pictures.draw_loss(out, picture := Path(folder) / "loss.png")
                    curve = figures([np.asarray(Image.open(picture).convert("RGB"))], ["loss of each band"])
                step, left = (lines[-1]["step"], lines[-1]["seconds_left"]) if lines else (0, 0)
                steps = (checkpoint.read_json(out / "config.json", "configuration") or {}).get("steps", 1)
                text = f"step {step} of {steps}, {left:.0f} s left" if step else "the training starts"
                yield bar(step / steps, text if left or not step else "trained; samples are drawn and scored"), curve
                time.sleep(1)
        finally:
            process.terminate()                             # it ends its step and saves
            LEAVING.append(process)
        if process.returncode:
            output.seek(0)
            raise UserError(f"the training failed: {(output.read().strip().splitlines() or ['it said nothing'])[-1]}")


# ---------------------------------------------------------------------------------------------------------------------
# what the page asks for; every function takes the run that `follow` gives it


@dataclass
class Wish:
    """How images are drawn: kept with the thumbnails, so that a click on one finishes that one."""

    y: Tensor | None                                        # conditions (N, ...)
    num: int
    seed: int
    settings: dict                                          # of the solver, see run.solver.solver_settings
    coarse: Tensor | None = None                            # the thumbnails (N, C, h, w)

    def of(self, number: int, count: int = 1) -> Tensor | None:
        """The condition of one image, `count` times."""
        return None if self.y is None else self.y[[number] * count]


def read_wish(run: Run, classes: list[str], vectors: str, num: float, seed: float | None, guidance: float, name: str,
              steps: float) -> Wish:
    """From the page's controls. Raises UserError for what the run cannot do."""
    args = SimpleNamespace(num=int(num), batch=int(num), seed=int(seed or 0), solver=name, cfg=guidance,
                           steps=None if name == "dopri5" else int(steps or 0))
    config.check_sampling_flags(args, least=1)
    settings = solver_settings(run.cfg, args)
    conditions.check_guidance(run.condition, run.cfg.label_drop, settings["cfg_scale"])
    given = read_vectors(run.condition, vectors) if vectors.strip() else None
    y = conditions.choose(run.condition, args.num, classes or None, given)          # neither: what the run has, in turn
    return Wish(None if y is None else y.to(run.device), args.num, args.seed, settings)


def read_vectors(condition: conditions.Vectors, text: str) -> Tensor:
    """"0.1 0.2; 0.3 0.4" as vectors (2, 2)."""
    dim = condition.examples.shape[1]
    try:
        rows = torch.tensor([[float(n) for n in row.replace(",", " ").split()] for row in text.split(";")])
    except ValueError:                                      # no numbers, or rows of several lengths
        rows = torch.empty(0)
    if rows.ndim != 2 or rows.shape[1] != dim or not rows.isfinite().all():
        raise UserError(f"a vector of this run is {dim} numbers with spaces between them; write ; between two vectors")
    return rows


def captions(run: Run, wish: Wish) -> list[str]:
    """The conditions of the images, or their numbers."""
    return run.condition.describe(wish.y) if wish.y is not None else [str(i) for i in range(wish.num)]


def preview(run: Run, wish: Wish) -> tuple[np.ndarray, int]:
    """Thumbnails uint8 (N, h, w, C), from the coarse band alone, and NFE."""
    wish.coarse, nfe = causal.preview(run, range(wish.num), wish.y, wish.seed, **wish.settings)
    return run.decode(wish.coarse), nfe


def finish(run: Run, wish: Wish, number: int) -> tuple[np.ndarray, int, float]:
    """Image and thumbnail, NFE, and the largest difference between the image's coarse band and the thumbnail."""
    noise = causal.noise_of(run, wish.seed, [number])
    bands, nfe = causal.draw_bands(run, noise, wish.of(number), **wish.settings)
    thumbnail = wish.coarse[number : number + 1]
    images = [*run.decode(thumbnail), *run.decode(run.schedule.image(bands))]
    return images, nfe, (bands[0] - thumbnail).abs().max().item()


def vary(run: Run, wish: Wish, number: int) -> tuple[np.ndarray, int]:
    x1, nfe = causal.vary(run, number, VARIATIONS, wish.of(number, VARIATIONS), wish.seed, **wish.settings)
    return run.decode(x1), nfe


def film(run: Run, wish: Wish, number: int) -> str:
    """The bands of an image and their sum from t = 0 to 1, as an animation with a slider."""
    model = sample.Guided(run.model, *(wish.settings[name] for name in ("cfg_scale", "interval", "precision")))
    states = pictures.watch(run, model, sample.solve, wish.of(number), wish.seed, [number], FILM_STEPS)
    rolls = [[] for _ in run.cfg.starts] + [[]]             # the frames of each band, and of the sum
    for _, bands in states:
        run.model.go_on()                                   # decoding latents takes a while
        for i in range(run.cfg.num_scales):
            rolls[i].append(pictures.band_pixels(run, i, bands[i][0]) if i < len(bands) else None)
        rolls[-1].append(run.decode(run.schedule.image(bands))[0])
    return player([t for t, _ in states], rolls, run.cfg.starts)


def read_upload(file: str | None, side: int) -> np.ndarray:
    """uint8 (3, side, side), by the one decoder of this project. Raises UserError."""
    if not file:
        raise UserError("choose a picture first")
    name = Path(file).name
    try:
        return sources.read_image(Path(file), side, name)
    except UserError as problem:                            # no visitor learns where files lie
        raise UserError(str(problem).replace(file, name)) from None


def split(file: str | None, num_scales: int) -> str:
    """The bands of a photograph and their sums."""
    if file:
        pixels = read_upload(file, PHOTO)
    else:
        from sklearn.datasets import load_sample_image

        pixels = sources.crop(Image.fromarray(load_sample_image("china.jpg")), PHOTO)
    bands = decompose(torch.tensor(pixels)[None].float() / 127.5 - 1, num_scales)
    sides = [f"{band.shape[-1]} × {band.shape[-1]}" for band in bands]
    colours = [pictures.band_colour(i, num_scales) for i in range(num_scales)]
    shown = [to_images((2 if i else 1) * band)[0] for i, band in enumerate(bands)]          # fine: contrast doubled
    sums = [to_images(reconstruct(bands[: i + 1]))[0] for i in range(num_scales)]
    names = [f"band {i}, {side}" for i, side in enumerate(sides)]
    totals = ["sum of band 0"] + [f"sum of bands 0 to {i}" for i in range(1, num_scales)]
    return figures(shown, names, colours) + figures(sums, totals)


# ---------------------------------------------------------------------------------------------------------------------
# HTML; whatever comes from a file or a person is escaped


def bar(share: float, text: str) -> str:
    return f'<div class="status"><progress value="{share:.3f}"></progress><span>{escape(text)}</span></div>'


def note(text: str, kind: str = "") -> str:
    return f'<div class="status {kind}"><span>{escape(text)}</span></div>'


def png(image: np.ndarray) -> str:
    """uint8 (H, W, C) as a data URL, pixel by pixel."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def figures(images: list[np.ndarray], captions: list[str], colours: list[str] | None = None) -> str:
    """Images uint8 (H, W, C) in rows, all equally large, with captions."""
    cells = []
    for image, caption, colour in zip(images, captions, colours or ["inherit"] * len(images), strict=True):
        kind = "blocks" if image.shape[0] <= FILM_SIDE else ""
        cells.append(f'<figure><img class="{kind}" src="{png(image)}" alt="{escape(caption)}">'
                     f'<figcaption style="color: {colour}">{escape(caption)}</figcaption></figure>')
    return f'<div class="figures" style="--count: {len(cells)}">{"".join(cells)}</div>'


def player(times: list[float], rolls: list[list], starts: tuple[float, ...]) -> str:
    """An animation with a slider. rolls: of each band and of the sum, frames uint8 (h, w, C), None before its start."""
    reels, tracks = [], []
    for i, roll in enumerate(rolls):
        side, grey = len(roll[-1]), np.full_like(roll[-1], 235)
        frames = [grey if frame is None else frame.repeat(side // len(frame), 0).repeat(side // len(frame), 1)
                  for frame in roll]                        # a sum grows as bands join it
        strip, step = np.concatenate(frames), max(1, side // FILM_SIDE)
        name, colour = "sum", "inherit"
        if i < len(starts):
            name, colour = f"band {i}", pictures.band_colour(i, len(starts))
            tracks.append(f'<div class="track" style="margin-left: {100 * starts[i]:.1f}%; background: {colour}">'
                          f"{name} from t = {starts[i]:.2g}</div>")
        reels.append(f'<figure><div class="reel" style="background-size: 100% {100 * len(roll)}%; background-image: '
                     f'url({png(strip[::step, ::step])})"></div><figcaption style="color: {colour}">{name}</figcaption>'
                     '</figure>')
    clock = '<div class="clock"><button onclick="filmPlay(this)">Play / stop</button><output>t = 0.00</output></div>'
    slider = '<input type="range" min="0" max="1" step="0.001" value="0" aria-label="time" oninput="filmSeek(this)">'
    row = f'<div class="figures" style="--count: {len(reels)}">{"".join(reels)}</div>'
    return (f'<div class="film playing" data-frame="0" data-times="{" ".join(f"{t:.3f}" for t in times)}">'
            f'{row}{clock}{slider}{"".join(tracks)}</div>')
