"""Sampling: one ODE solve for each segment, coarse bands first, no noise added in between (Algorithm 2).

    python sample.py                                         40 images of the newest run
    python sample.py --num 500 --labels balanced --seed 3 --out DIR
    python sample.py --labels 7 --cfg 1.5 --solver heun --steps 20

    torchrun --nproc_per_node=8 sample.py -n 50000 --format shards      as one process would; resumes after a stop

Writes DIR/grid.png, report.json and samples.npz (`images` uint8 (N, H, W, C), `labels` (N,), -1 when unconditional).
What only a causal pyramid can do (previews, variations, super-resolution) is in extras/causal.py.
The noise of image i depends on the seed and on i alone. So does the image, up to float rounding, with the fixed-step
solvers; dopri5 chooses its steps for a whole batch, on which an image then depends, within the tolerance.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torchdiffeq import odeint
from tqdm import tqdm

import config
from config import UserError, check_solver
from data import conditions
from data.batches import ImageRandom
from data.sources import chunks_of
from run import card, gallery, graphs, load
from run.load import Run
from run.ranks import Ranks
from run.solver import solver_options

# ---------------------------------------------------------------------------------------------------------------------
# the method


def pack(bands: list[Tensor]) -> Tensor:
    """Bands, each (B, C, H_i, W_i), as one ODE state (B, M)."""
    return torch.cat([band.flatten(1) for band in bands], dim=1)


def unpack(state: Tensor, shapes: list) -> list[Tensor]:
    """The inverse of `pack`; shapes (C, H_i, W_i)."""
    parts = state.split([s.numel() for s in shapes], dim=1)
    return [part.reshape(len(state), *shape) for part, shape in zip(parts, shapes, strict=True)]


def solve(velocity: Callable, noise: list[Tensor], schedule, solver: str = "dopri5", rtol: float = 1e-5,
          atol: float = 1e-5, steps: int | None = None, norm: str = "batch", jumps: tuple = ()) -> tuple[list, int]:
    """Algorithm 2: integrates all bands from t = 0 to 1. Returns the bands at t = 1 and the number of velocity calls.

    velocity(bands, t) -> velocities of those bands; t is a scalar tensor, and the bands are 0..j in segment j
    noise       K bands (B, C, H_i, W_i) at unit scale; band j enters at T_j as sigma(T_j) noise_j, its exact law there.
                The first few bands only: the same segments with those, a preview (extras/causal.py)
    schedule    segments, and enter(j, bands, noise_j), the state as segment j begins: a Schedule, or a baseline's
    solver      dopri5, or with `steps` (shared out over the segments): euler, midpoint, heun (= rk2), rk4
    norm        what dopri5 holds below the tolerance: "batch", the root mean square over all images, as torchdiffeq, or
                "sample", that of the worst image, at more NFE
    jumps       times at which the velocity jumps, such as the ends of an interval of guidance; dopri5 stops there

    The solver never crosses a start time, where the field jumps too. State and time are float32 or better whatever the
    network computes in. Raises UserError for arguments that do not fit and for velocities that are not finite.
    """
    check_solver(solver, steps)
    bands, nfe = [], 0
    noise = [x0.to(torch.promote_types(x0.dtype, torch.float32)) for x0 in noise]
    for j in range(schedule.num_scales):
        if j < len(noise):
            bands = schedule.enter(j, bands, noise[j])      # the next band joins
        field = Field(velocity, bands, j, schedule)
        times, options = solver_options(schedule.segments, j, solver, steps, norm, jumps, noise[0].device)
        try:
            state = odeint(field, pack(bands), times, rtol=rtol, atol=atol, **options)[-1]
        except AssertionError as problem:                   # how torchdiffeq reports that no step is small enough
            raise UserError(f"{solver} cannot meet rtol {rtol:g} and atol {atol:g} in segment {j} ({problem}); "
                            "choose larger tolerances") from None
        finally:
            field.check()
        bands, nfe = unpack(state, field.shapes), nfe + field.calls
    return bands, nfe


class Field:
    """The velocity in segment j as torchdiffeq calls it, on one packed state; counts its calls."""

    def __init__(self, velocity: Callable, bands: list[Tensor], j: int, schedule):
        self.velocity, self.shapes, self.calls = velocity, [band.shape[1:] for band in bands], 0
        self.end, self.name = schedule.segments[j][1], f"segment {j} of {schedule.num_scales}"
        self.failed = torch.tensor(math.inf, device=bands[0].device)                # first time that is not finite

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        self.calls += 1
        t = t.clamp(max=self.end)                           # the probe for a first step may look too far
        v = pack(self.velocity(unpack(state, self.shapes), t)).to(state)
        self.failed = torch.where(v.isfinite().all(), self.failed, self.failed.fmin(t))           # t may be no number
        return v

    def check(self) -> None:
        """Once for a segment, not for each call: a GPU is waited for."""
        if not self.failed.isinf():
            raise UserError(f"the velocity is not finite at t = {self.failed:.4f}, in {self.name}: these weights have "
                            "diverged; sample an earlier checkpoint")


class Guided:
    """A model whose velocity is v_null + w (v_cond - v_null), on all channels and all bands, in one doubled batch.

    Nothing is doubled when w is 1, without conditions, or at times outside the interval (Kynkaanniemi et al. 2024).
    calls[side]: velocity calls while the finest active band had that side; passes: all, a doubled one counted twice.
    """

    def __init__(self, model: Callable, cfg_scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0),
                 precision: str = "float32"):
        self.model, self.cfg_scale, self.interval, self.precision = model, cfg_scale, interval, precision
        self.calls, self.passes = Counter(), 0

    def jumps(self, y: Tensor | None) -> tuple:
        """For `solve`: the ends of the interval, where this velocity jumps; () when nothing is guided."""
        return self.interval if y is not None and self.cfg_scale != 1 else ()

    @torch.no_grad()
    def __call__(self, bands: list[Tensor], t: Tensor, y: Tensor | None) -> list[Tensor]:
        self.calls[bands[-1].shape[-1]] += 1
        low, high = self.interval
        end = math.inf if high == 1 else high               # the end itself belongs to it at t = 1 only
        always = (low, high) == (0, 1)                      # t is not read then: a GPU would be waited for
        guided = self.jumps(y) != () and (always or low <= t.max() < end)
        with torch.autocast(t.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            if not guided:
                self.passes += 1
                return [v.float() for v in self.model(bands, t, y)]
            self.passes += 2
            null = self.model.condition.null(y)
            both = self.model([torch.cat([band, band]) for band in bands], torch.cat([t, t]), torch.cat([y, null]))
        halves = [v.float().chunk(2) for v in both]
        return [v_null + self.cfg_scale * (v_cond - v_null) for v_cond, v_null in halves]


# ---------------------------------------------------------------------------------------------------------------------
# images of a trained run


def draw_batches(run: Run, chunks: list[range], y: Tensor | None, seed: int = 0, cfg_scale: float = 1.0,
                 interval: tuple[float, float] = (0.0, 1.0), precision: str = "float32", **solver) -> Iterator[tuple]:
    """Draws the images with the numbers of each chunk; yields (numbers, images uint8 (B, H, W, C), what they cost).

    y (N, ...): the condition of image i is y[i]. `solver` goes to `solve`."""
    conditions.check_guidance(run.condition, run.cfg.label_drop, cfg_scale)
    load.full_float32()
    run.ready()                                             # so that loading does not count
    for numbers in chunks:
        model, began = Guided(run.model, cfg_scale, interval, precision), time.perf_counter()
        y_batch = None if y is None else y[numbers.start : numbers.stop].to(run.device)
        with graphs.explained(run.device, len(numbers)):
            x1 = run.system.sample(model, ImageRandom(seed, numbers, run.device), y_batch, run.schedule, run.shape,
                                   solve, jumps=model.jumps(y_batch), **solver)
            images = run.decode(x1)
        nfe = [model.calls[run.shape[1] >> k] for k in reversed(range(run.cfg.num_scales))]
        yield numbers, images, {"first": numbers.start, "count": len(numbers), "nfe": nfe, "forwards": model.passes,
                                "seconds": time.perf_counter() - began}


def generate(run: Run, num: int, y: Tensor | None, seed: int = 0, batch: int = 250, progress: bool = True,
             **settings) -> tuple[np.ndarray, dict]:
    """Images 0..num-1 of a seed: uint8 (num, H, W, C), and a report of what they cost."""
    images, notes = [], []
    with tqdm(total=num, desc="sampling", unit="img", disable=not progress or None, leave=False) as bar:
        for numbers, drawn, note in draw_batches(run, chunks_of(num, batch), y, seed, **settings):
            images.append(drawn)
            notes.append(note)
            bar.update(len(numbers))
    return np.concatenate(images), gallery.report_of(run, notes, seed, batch, settings)


def main() -> None:
    parser = config.parser(__doc__, "python sample.py [RUN] [-n N] [options]")
    parser.add_argument("run", nargs="?", help="run, step-N.pt, export, or OWNER/NAME on the hub [newest in out/]")
    config.add_sampling_flags(parser)
    parser.add_argument("-n", "--num", type=int, default=40, help="number of images [40]")
    parser.add_argument("--out", help="directory to write [RUN/samples]")
    parser.add_argument("--format", choices=("npz", "shards"), default="npz",
                        help="samples.npz, or a shard for each batch [npz]")
    parser.add_argument("--export", metavar="DIR", help="write what is to be shared: safetensors and a model card")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the export to the hub, after a question")
    parser.add_argument("--yes", action="store_true", help="answer that question")
    args = parser.parse_args()
    config.check_sampling_flags(args, least=1)
    card.check_push(args)
    with Ranks.start(args.device) as ranks:
        run = load.load_run(args.run, args.raw, str(ranks.device), args.vae, args.noise_scale)
        if args.export:
            return card.share(run, args, ranks)
        y = conditions.choose(run.condition, args.num, args.labels, args.vectors)
        settings = graphs.speed_up(run, load.solver_settings(run.cfg, args), args.graphs, args.compile)
        conditions.check_guidance(run.condition, run.cfg.label_drop, settings["cfg_scale"])    # before a file is there
        samples = gallery.Gallery(gallery.folder_of(run, args), gallery.job_of(run, args, settings), args.format, ranks)
        samples.fill(run, chunks_of(args.num, args.batch), partial(draw_batches, run, y=y, seed=args.seed, **settings),
                     y, settings)


if __name__ == "__main__":
    config.run(main)
