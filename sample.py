"""Sampling: one ODE solve for each segment, coarse bands first, no noise added in between (Algorithm 2).

    python sample.py                                         40 images of the newest run
    python sample.py --num 500 --labels balanced --seed 3 --out DIR
    python sample.py --labels 7 --cfg 1.5 --solver heun --steps 20

    torchrun --nproc_per_node=8 sample.py -n 50000 --format shards      as one process would; goes on when stopped

Writes DIR/grid.png and DIR/samples.npz (`images` uint8 (N, H, W, C), `labels` (N,), -1 when unconditional). What only a
causal pyramid can do is in causal.py: --preview, --refine, --vary, --upsample.
Image i depends on the seed and on i alone. The fixed-step solvers keep that up to float rounding; dopri5 chooses its
steps for a whole batch at once, so there an image also depends, within the tolerance, on its batch.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import config

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python sample.py [RUN] [-n N] [options]")
    PARSER.add_argument("run", nargs="?", help="run directory, export, or OWNER/NAME on the hub [the newest in out/]")
    config.add_sampling_flags(PARSER)
    PARSER.add_argument("-n", "--num", type=int, default=40, help="number of images [40]")
    PARSER.add_argument("--out", help="directory to write [RUN/samples]")
    PARSER.add_argument("--format", choices=("npz", "shards", "png"), default="npz",
                        help="samples.npz; a shard for each batch; or a folder of PNG [npz]")
    PARSER.add_argument("--preview", action="store_true", help="only the coarsest band(s): thumbnails, much faster")
    PARSER.add_argument("--refine", metavar="I,J,..", help="finish these previews of the same seed")
    PARSER.add_argument("--vary", metavar="I", type=int, help="--num variations of image I: new details")
    PARSER.add_argument("--upsample", metavar="IMAGE", help="--num images with this one as their coarse band(s)")
    PARSER.add_argument("--bands", type=int, default=1, help="number of coarse bands of these four [1]")
    PARSER.add_argument("--record", metavar="FILE", help="append what these four measured to a .jsonl file")
    PARSER.add_argument("--export", metavar="DIR", help="write the weights to share, safetensors, and no images")
    ARGUMENTS = PARSER.parse_args()

import numpy as np
import torch
from torch import Tensor
from torchdiffeq import odeint
from tqdm import tqdm

import baselines
import data
import gallery
import runs
from config import Config, UserError
from ranks import Ranks
from runs import Run, load_run
from schedule import Schedule, loss, noise_bands

FIXED = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk2": "heun2", "rk4": "rk4"}  # torchdiffeq's names

# ---------------------------------------------------------------------------------------------------------------------
# the method


def pack(bands: list[Tensor]) -> Tensor:
    """Bands, each (B, C, H_i, W_i), as one ODE state (B, M)."""
    return torch.cat([band.flatten(1) for band in bands], dim=1)


def unpack(state: Tensor, shapes: list) -> list[Tensor]:
    """The inverse of `pack`; shapes (C, H_i, W_i)."""
    parts = state.split([s.numel() for s in shapes], dim=1)
    return [part.reshape(len(state), *shape) for part, shape in zip(parts, shapes, strict=True)]


def share_steps(steps: int, segments: list) -> list[int]:
    """Fixed steps of every segment, in proportion to its length; each gets one at least."""
    return [max(1, round(steps * end) - round(steps * start)) for start, end in segments]


def check_solver(solver: str, steps: int | None, flag: str = "--steps") -> None:
    """Raises UserError for an unknown solver, for steps of an adaptive one, and for a fixed-step one without."""
    if solver not in FIXED and solver != "dopri5":
        raise UserError(f"unknown solver {solver!r}; choose one of {', '.join(config.SOLVERS)}")
    if steps is not None and steps < 0:
        raise UserError(f"a solver cannot take {steps} steps")
    if solver == "dopri5" and steps:
        raise UserError(f"dopri5 chooses its own steps: leave out {flag}, or set its tolerances with --rtol and --atol")
    if solver != "dopri5" and not steps:
        raise UserError(f"the solver {solver} needs a number of steps: add {flag}, for example {flag} 40")


def solve(velocity: Callable, noise: list[Tensor], schedule, solver: str = "dopri5", rtol: float = 1e-5,
          atol: float = 1e-5, steps: int | None = None, norm: str = "batch", jumps: tuple = ()) -> tuple[list, int]:
    """Algorithm 2: integrates all bands from t = 0 to 1. Returns the bands at t = 1 and the number of velocity calls.

    velocity(bands, t) -> velocities of those bands; t is a scalar tensor, and the bands are 0..j in segment j
    noise       K bands (B, C, H_i, W_i) at unit scale; band j enters at T_j as sigma(T_j) noise_j, its exact law there.
                The first few bands only: the same segments with those, a preview (causal.py)
    schedule    segments, and enter(j, bands, noise_j), the state as segment j begins: a Schedule, or a baseline's
    solver      dopri5, or with `steps` (shared out over the segments): euler, midpoint, heun (= rk2), rk4
    norm        what dopri5 holds below the tolerance: "batch", the root mean square over all images as torchdiffeq and
                so the paper's code base do (the default: NFE stay comparable), or "sample", that of the worst image:
                no image then pays for an easy batch, at more NFE
    jumps       times at which the velocity jumps, such as the ends of an interval of guidance; dopri5 stops there

    The solver never crosses a start time, where the field jumps too. State and time are float32 or better whatever the
    network computes in. Raises UserError for arguments that do not fit and for velocities that are not finite.
    """
    check_solver(solver, steps)
    device, bands, nfe = noise[0].device, [], 0
    time_dtype = torch.float32 if device.type == "mps" else torch.float64
    for j, (start, end) in enumerate(schedule.segments):
        if j < len(noise):                                  # a preview has no noise for the finer bands
            bands = schedule.enter(j, bands, noise[j].to(torch.promote_types(noise[j].dtype, torch.float32)))
        shapes = [band.shape[1:] for band in bands]

        def field(t, state, j=j, end=end, shapes=shapes):
            nonlocal nfe
            nfe += 1
            if not t.isfinite():
                raise AssertionError("its first step is not finite")
            t = t.clamp(max=end)                            # the probe for a first step may look too far
            v = pack(velocity(unpack(state, shapes), t)).to(state)
            if not v.isfinite().all():
                raise UserError(f"the velocity is not finite at t = {t.item():.4f}, in segment {j} of "
                                f"{schedule.num_scales}: these weights have diverged; sample an earlier checkpoint")
            return v

        if solver == "dopri5":
            times = torch.tensor([start, end], dtype=time_dtype, device=device)
            # a step ends at the end of the segment: torchdiffeq would overshoot and interpolate back
            options = {"dtype": time_dtype, "step_t": times[1:], "max_num_steps": 10_000}
            if inside := [t for t in jumps if start < t < end]:
                options["jump_t"] = torch.tensor(inside, dtype=time_dtype, device=device)
            if norm == "sample":
                options["norm"] = lambda state: state.square().mean(dim=1).sqrt().max()
        else:
            grid = torch.linspace(start, end, share_steps(steps, schedule.segments)[j] + 1, device=device)
            times, options = grid[[0, -1]], {"grid_constructor": lambda func, y0, t, grid=grid: grid}
        method = FIXED.get(solver, solver)
        try:
            state = odeint(field, pack(bands), times, rtol=rtol, atol=atol, method=method, options=options)[-1]
        except AssertionError as problem:                   # how torchdiffeq says that no step is small enough
            if solver != "dopri5":
                raise
            raise UserError(f"dopri5 cannot meet rtol {rtol:g} and atol {atol:g} in segment {j} ({problem}); "
                            "choose larger tolerances") from None
        bands = unpack(state, shapes)
    return bands, nfe


class Guided:
    """A model whose velocity is v_null + w (v_cond - v_null), on all channels and all bands, in one doubled batch.

    Nothing is doubled when w is 1, without labels, or at times outside the interval (Kynkaanniemi et al. 2024).
    calls[side]: velocity calls while the finest active band had that side; passes: all, a doubled one counted twice.
    """

    def __init__(self, model: Callable, cfg_scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0),
                 precision: str = "float32"):
        self.model, self.cfg_scale, self.interval, self.precision = model, cfg_scale, interval, precision
        self.calls, self.passes = Counter(), 0

    def jumps(self, y: Tensor | None) -> tuple:
        """Times at which this velocity jumps, for `solve`."""
        return self.interval if y is not None and self.cfg_scale != 1 else ()

    @torch.no_grad()
    def __call__(self, bands: list[Tensor], t: Tensor, y: Tensor | None) -> list[Tensor]:
        self.calls[bands[-1].shape[-1]] += 1
        with torch.autocast(t.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            if y is None or self.cfg_scale == 1 or not self.interval[0] <= t.flatten()[0] <= self.interval[1]:
                self.passes += 1
                return [v.float() for v in self.model(bands, t, y)]
            self.passes += 2
            null = torch.full_like(y, self.model.num_classes)
            both = self.model([torch.cat([band, band]) for band in bands], torch.cat([t, t]), torch.cat([y, null]))
        halves = [v.float().chunk(2) for v in both]
        return [v_null + self.cfg_scale * (v_cond - v_null) for v_cond, v_null in halves]


def method(cfg: Config) -> tuple:
    """The system of a configuration: its schedule, and its loss(model, x1, y, schedule, rng) and
    sample(model, n, y, schedule, shape, **solver): LapFlow's, or those of a file in baselines/."""
    if cfg.method == "lapflow":
        return (Schedule(cfg.starts, cfg.path), partial(loss, noise=cfg.noise, stages=cfg.stages,
                full_range=cfg.full_range), partial(sample, noise=cfg.noise))
    other = baselines.load(cfg.method)
    return other.schedule(cfg), partial(other.loss, stages=cfg.stages), partial(other.sample, solve=solve)


def sample(model: Callable, n, y: Tensor | None, schedule: Schedule, shape: tuple[int, int, int],
           noise: str = "pyramid", solve: Callable = solve, **solver) -> Tensor:
    """Draws x1 (B, C, H, W) with C, H, W = shape.

    model(bands, t, y) -> velocities with t (B,); n is a source of Gaussians such as `data.ImageRandom`; y (B,) or None;
    `solver` goes to `solve`.
    """
    def velocity(bands, t):
        return model(bands, t.expand(len(bands[0])), y)

    bands, _ = solve(velocity, noise_bands(n, shape, schedule.num_scales, noise), schedule, **solver)
    return schedule.image(bands)


# ---------------------------------------------------------------------------------------------------------------------
# images of a trained run


def batches(run: Run, chunks: list[range], labels: np.ndarray | None, seed: int = 0, cfg_scale: float = 1.0,
            interval: tuple[float, float] = (0.0, 1.0), precision: str = "float32", **solver) -> Iterator[tuple]:
    """Draws the images with the numbers of each chunk; yields (numbers, images uint8 (B, H, W, C), what they cost)."""
    runs.check_guidance(run.cfg, cfg_scale, run.classes)
    runs.full_float32()
    schedule, _, draw = method(run.cfg)
    run.ready()                                             # so that loading does not count
    for numbers in chunks:
        model, began = Guided(run.model, cfg_scale, interval, precision), time.perf_counter()
        y = None if labels is None else torch.as_tensor(labels[numbers.start : numbers.stop], device=run.device)
        n = data.ImageRandom(seed, numbers, run.device)
        x1 = draw(model, n, y, schedule, run.shape, jumps=model.jumps(y), **solver)
        images = run.decode(x1)
        nfe = [model.calls[run.shape[1] >> k] for k in reversed(range(schedule.num_scales))]
        yield numbers, images, {"first": numbers.start, "count": len(numbers), "nfe": nfe, "forwards": model.passes,
                                "seconds": time.perf_counter() - began}


def chunks_of(num: int, batch: int) -> list[range]:
    """Images 0..num-1 in batches. Which images share a batch does not depend on the number of processes."""
    return [range(first, min(first + batch, num)) for first in range(0, num, batch)]


def generate(run: Run, num: int, labels: np.ndarray | None, seed: int = 0, batch: int = 250, progress: bool = True,
             **settings) -> tuple[np.ndarray, dict]:
    """Images 0..num-1 of a seed: uint8 (num, H, W, C), and a report of what they cost."""
    images, notes = [], []
    with tqdm(total=num, desc="sampling", unit="img", disable=not progress, leave=False) as bar:
        for numbers, drawn, note in batches(run, chunks_of(num, batch), labels, seed, **settings):
            images.append(drawn)
            notes.append(note)
            bar.update(len(numbers))
    return np.concatenate(images), gallery.report_of(run, notes, seed, batch, settings)


def main(args: argparse.Namespace) -> None:
    config.check_sampling_flags(args, least=1)
    ranks = Ranks.start(args.device)
    try:
        run = load_run(args.run, args.raw, str(ranks.device), args.vae)
        causal_flags = [args.preview, args.refine is not None, args.vary is not None, args.upsample is not None]
        if sum(causal_flags) > 1:
            raise UserError("--preview, --refine, --vary and --upsample are one at a time")
        if ranks.world > 1 and (args.export or any(causal_flags)):
            raise UserError("exports, previews and their like are made by one process: start it with python")
        if args.compile:
            runs.compile_blocks(run.model)
        if args.export:
            runs.export(run, Path(args.export))
            print(f"wrote      {args.export}/model.safetensors, config.json: {run.weights} weights at step {run.step}; "
                  f"python sample.py {args.export}")
            return
        named = args.run is None or Path(args.run).exists()                     # and not in the cache of the hub
        out = Path(args.out or (run.folder / "samples" if named else "samples"))
        if any(causal_flags):
            import causal  # built on this file

            causal.main(run, args, out)
            return
        labels, settings = runs.choose_labels(args.labels, args.num, run.classes), runs.solver_settings(run.cfg, args)
        job = {"run": str(run.folder), "step": run.step, "weights": run.weights,
               "fingerprint": run.fingerprint, "num": args.num, "seed": args.seed,
               "batch": args.batch, "labels": args.labels, **settings}
        samples = gallery.Gallery(out, job, args.format, ranks)
        todo = samples.prepare(chunks_of(args.num, args.batch))
        with tqdm(total=args.num, initial=args.num - sum(map(len, todo)), desc="sampling", unit="img", leave=False,
                  disable=not ranks.first) as bar:
            for numbers, images, note in batches(run, todo[ranks.rank :: ranks.world], labels, args.seed, **settings):
                samples.write(numbers, images, None if labels is None else labels[numbers.start : numbers.stop], note)
                bar.update(min(len(numbers) * ranks.world, bar.total - bar.n))
        ranks.barrier()

        def finish():
            report = gallery.report_of(run, samples.notes(), args.seed, args.batch, settings)
            return f"{gallery.describe(report)}\nwrote      {samples.finish(report, labels, run.classes)}"

        ranks.say(ranks.first_does(finish))
    finally:
        ranks.stop()


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except UserError as problem:
        sys.exit(f"error: {problem}")
