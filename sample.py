"""Sampling: one ODE solve for each segment, coarse bands first, no noise added in between (Algorithm 2).

    python sample.py                                         40 images of the newest run
    python sample.py --num 500 --labels balanced --seed 3 --out DIR
    python sample.py --labels 7 --cfg 1.5 --solver heun --steps 20

Writes DIR/grid.png and DIR/samples.npz (`images` uint8 (N, H, W, C), `labels` (N,), -1 when unconditional).
Image i depends on the seed and on i alone. The fixed-step solvers keep that up to float rounding; dopri5 chooses its
steps for a whole batch at once, so there an image also depends, within the tolerance, on its batch.
"""

import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import config

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python sample.py [--run DIR] [--num N] [options]")
    config.add_sampling_flags(PARSER)
    PARSER.add_argument("--num", type=int, default=40, help="number of images [40]")
    PARSER.add_argument("--out", help="directory to write [RUN/samples]")
    PARSER.add_argument("--export", metavar="DIR", help="write the weights to share, safetensors, and no images")
    ARGUMENTS = PARSER.parse_args()

import numpy as np
import torch
from torchdiffeq import odeint
from tqdm import tqdm

import data
import pictures
import runs
from config import Config, UserError
from pyramid import reconstruct
from runs import Run, load_run
from schedule import Schedule, noise_bands

FIXED = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk2": "heun2", "rk4": "rk4"}  # torchdiffeq's names

# ---------------------------------------------------------------------------------------------------------------------
# the method


def pack(bands: list) -> torch.Tensor:
    """Bands, each (B, C, H_i, W_i), as one ODE state (B, M)."""
    return torch.cat([band.flatten(1) for band in bands], dim=1)


def unpack(state: torch.Tensor, shapes: list) -> list:
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


def solve(velocity, noise, schedule, solver="dopri5", rtol=1e-5, atol=1e-5, steps=None, norm="batch"):
    """Algorithm 2: integrates all bands from t = 0 to 1. Returns the bands at t = 1 and the number of velocity calls.

    velocity(bands, t) -> velocities of those bands; t is a scalar tensor, and the bands are 0..j in segment j
    noise       K bands (B, C, H_i, W_i) at unit scale; band j enters at T_j as sigma(T_j) noise_j, its exact law there
    solver      dopri5, or with `steps` (shared out over the segments): euler, midpoint, heun (= rk2), rk4
    norm        what dopri5 holds below the tolerance: "batch", the root mean square over all images as torchdiffeq and
                so the paper's code base do (the default: NFE stay comparable), or "sample", that of the worst image:
                no image then pays for an easy batch, at more NFE

    The solver never crosses a start time, where the field jumps. State and time are float32 or better whatever the
    network computes in. Raises UserError for arguments that do not fit and for velocities that are not finite.
    """
    check_solver(solver, steps)
    device, bands, nfe = noise[0].device, [], 0
    time_dtype = torch.float32 if device.type == "mps" else torch.float64
    for j, (start, end) in enumerate(schedule.segments):
        x0 = noise[j].to(torch.promote_types(noise[j].dtype, torch.float32))
        bands.append(schedule.coefficients(j, start)[1].to(x0) * x0)
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
                                f"{len(noise)}: these weights have diverged; sample an earlier checkpoint")
            return v

        if solver == "dopri5":
            times = torch.tensor([start, end], dtype=time_dtype, device=device)
            # a step ends at the end of the segment: torchdiffeq would overshoot and interpolate back
            options = {"dtype": time_dtype, "step_t": times[1:], "max_num_steps": 10_000}
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

    Nothing is doubled when w is 1 or there are no labels. `calls` counts the calls by number of active bands.
    """

    def __init__(self, model, cfg_scale: float = 1.0):
        self.model, self.cfg_scale, self.calls = model, cfg_scale, Counter()

    @torch.no_grad()
    def __call__(self, bands, t, y):
        self.calls[len(bands)] += 1
        if y is None or self.cfg_scale == 1:
            return [v.float() for v in self.model(bands, t, y)]
        null = torch.full_like(y, self.model.num_classes)
        both = self.model([torch.cat([band, band]) for band in bands], torch.cat([t, t]), torch.cat([y, null]))
        halves = [v.float().chunk(2) for v in both]
        return [v_null + self.cfg_scale * (v_cond - v_null) for v_cond, v_null in halves]


def sample(model, n, y, schedule, shape, noise="pyramid", solve=solve, **solver) -> torch.Tensor:
    """Draws x1 (B, C, H, W) with C, H, W = shape.

    model(bands, t, y) -> velocities with t (B,); n is a source of Gaussians such as `data.ImageRandom`; y (B,) or None;
    `solver` goes to `solve`.
    """
    def velocity(bands, t):
        return model(bands, t.expand(len(bands[0])), y)

    bands, _ = solve(velocity, noise_bands(n, shape, schedule.num_scales, noise), schedule, **solver)
    return reconstruct(bands)


# ---------------------------------------------------------------------------------------------------------------------
# images of a trained run


def check_guidance(cfg: Config, cfg_scale: float, classes: list[str]) -> None:
    """Raises UserError for guidance that the training of this run does not support."""
    if cfg_scale != 1 and not classes:
        raise UserError("guidance needs labels, but this run was trained without classes: leave out the guidance scale")
    if cfg_scale != 1 and cfg.label_drop == 0:
        raise UserError("guidance needs a null label, but this run has --label-drop 0: leave out the guidance scale")


def solver_settings(cfg: Config, args=None) -> dict:
    """Solver, tolerances, steps and guidance: those of the run, unless the command line gives others."""
    given = {} if args is None else {k: v for k, v in vars(args).items() if v is not None}
    solver = given.get("solver", cfg.solver)
    for name in ("rtol", "atol", "cfg"):
        if name in given and not (math.isfinite(given[name]) and (name == "cfg" or given[name] > 0)):
            raise UserError(f"--{name} must be a {'' if name == 'cfg' else 'positive '}number, not {given[name]}")
    settings = {"solver": solver, "norm": given.get("norm", "batch"), "cfg_scale": given.get("cfg", cfg.cfg_scale)}
    if solver == "dopri5":
        settings.update(rtol=given.get("rtol", cfg.rtol), atol=given.get("atol", cfg.atol), steps=given.get("steps"))
    else:
        settings["steps"] = given.get("steps", cfg.solver_steps)
        if "rtol" in given or "atol" in given:
            raise UserError(f"the solver {solver} has no tolerance: leave out --rtol and --atol, or use dopri5")
    return settings


def choose_labels(text: str, num: int, classes: list[str]) -> np.ndarray | None:
    """Labels (num,) for "balanced" (classes in turn), a label or a class name; None for an unconditional model."""
    if not classes:
        if text != "balanced":
            raise UserError(f"--labels {text} asks for a class, but this run was trained without classes")
        return None
    if text == "balanced":
        return np.arange(num) % len(classes)
    if text in classes:
        return np.full(num, classes.index(text))
    named = any(name.isdecimal() for name in classes)       # classes named by numbers are asked for by name only
    label = int(text) if text.isdecimal() and not named else -1
    if not 0 <= label < len(classes):
        known = f"the names {classes[0]!r} to {classes[-1]!r}" if named else f"0 to {len(classes) - 1}, or a name"
        raise UserError(f"there is no label {text!r}: use {known}")
    return np.full(num, label)


def generate(run: Run, num: int, labels: np.ndarray | None, seed=0, batch=250, cfg_scale=1.0, progress=True, **solver):
    """Images 0..num-1 of a seed: uint8 (num, H, W, C), and a report of what they cost."""
    check_guidance(run.cfg, cfg_scale, run.classes)
    torch.set_float32_matmul_precision("highest")           # TF32 is noise to dopri5, which then takes more steps
    model, schedule = Guided(run.model, cfg_scale), Schedule(run.cfg.starts, run.cfg.path)
    images, began = [], time.perf_counter()
    with tqdm(total=num, desc="sampling", unit="img", disable=not progress, leave=False) as bar:
        for first in range(0, num, batch):
            numbers = range(first, min(first + batch, num))
            n = data.ImageRandom(seed, numbers, run.device)
            y = None if labels is None else torch.as_tensor(labels[first : numbers.stop], device=run.device)
            x1 = sample(model, n, y, schedule, run.shape, run.cfg.noise, **solver)
            images.append(run.decode(x1))
            bar.update(len(numbers))
    batches = -(-num // batch)
    nfe = [model.calls[j + 1] / batches for j in range(schedule.num_scales)]    # mean over the batches, by segment
    report = {"num": num, "seed": seed, "batch": batch, "cfg_scale": cfg_scale, **solver,
              "nfe_segments": nfe, "nfe": sum(nfe),
              "forwards": sum(nfe) * (2 if labels is not None and cfg_scale != 1 else 1),
              "seconds_per_image": (time.perf_counter() - began) / num,
              "device": str(run.device), "weights": run.weights, "step": run.step, "run": str(run.folder)}
    return np.concatenate(images), report


def describe(report: dict) -> str:
    """NFE, cost and provenance of generated images, in lines for people."""
    settings = [f"{key} {report[key]:g}" for key in ("rtol", "atol", "steps") if report.get(key)]
    if report["solver"] == "dopri5":
        settings.append(f"norm over the {report['norm']}")
    segments = " + ".join(f"{n:g}" for n in report["nfe_segments"])
    return (f"weights    {report['weights']} at step {report['step']} of {report['run']}\n"
            f"solver     {report['solver']}, {', '.join(settings)}, {report['batch']} images at a time\n"
            f"guidance   {report['cfg_scale']:g}\n"
            f"NFE        {segments} = {report['nfe']:g} by segment ({report['forwards']:g} network passes per image)\n"
            f"time       {report['seconds_per_image']:.4f} s per image on {report['device']}")


def draw_trajectory(path: Path, run: Run, labels: np.ndarray | None, seed: int = 0, count: int = 3) -> None:
    """Each band and their sum at several times, from noise to image, for a few images (Euler, 80 steps)."""
    schedule, states = Schedule(run.cfg.starts, run.cfg.path), []
    y = None if labels is None else torch.as_tensor(labels[:count], device=run.device)
    model = Guided(run.model, run.cfg.cfg_scale)

    def velocity(bands, t):
        states.append((t.item(), bands))                                        # Euler calls once for each step
        return model(bands, t.expand(count), y)

    n = data.ImageRandom(seed, range(count), run.device)
    noise = noise_bands(n, run.shape, schedule.num_scales, run.cfg.noise)
    bands, _ = solve(velocity, noise, schedule, "euler", steps=80)
    states.append((1.0, bands))

    contrast = 1 if run.facts.get("latent") is None else 0.4                    # latents: three channels, as they are

    def pixels(x):
        return data.to_uint8(contrast * x[:3]).permute(1, 2, 0).cpu().numpy()

    shown = [min(states, key=lambda state: abs(state[0] - t)) for t in np.linspace(0, 1, 9)]
    rows, names = [], []
    for image in range(count):
        for i, start in enumerate(schedule.starts):
            gain = 1 if i == 0 else 2                                           # fine bands: residuals around mid-grey
            rows.append([pixels(gain * bands[i][image]) if i < len(bands) else f"from\nt = {start:.2g}"
                         for _, bands in shown])
            names.append(f"band {i}")
        rows.append([run.decode(reconstruct(bands)[image : image + 1])[0] for _, bands in shown])
        names.append("sum")
    pictures.draw_images(path, rows, [], [f"t = {t:.2f}" for t, _ in shown], names)


def main(args) -> None:
    config.check_sampling_flags(args, least=1)
    run = load_run(args.run, args.raw, args.device, args.vae)
    if args.export:
        runs.export(run, Path(args.export))
        print(f"wrote      {args.export}/model.safetensors, config.json: {run.weights} weights at step {run.step}; "
              f"python sample.py --run {args.export}")
        return
    labels, settings = choose_labels(args.labels, args.num, run.classes), solver_settings(run.cfg, args)
    named = args.run is None or Path(args.run).exists()     # and not in the cache of the hub
    out = Path(args.out or (run.folder / "samples" if named else "samples"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"the directory {out} cannot be written: {problem}; choose another with --out") from None
    images, report = generate(run, args.num, labels, args.seed, args.batch, **settings)
    np.savez_compressed(out / "samples.npz", images=images, labels=np.full(args.num, -1) if labels is None else labels)
    (out / "report.json").write_text(json.dumps(report, indent=2))
    pictures.draw_grid(out / "grid.png", images, labels, run.classes)
    print(describe(report))
    print(f"wrote      {out}/grid.png, samples.npz, report.json")


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except UserError as problem:
        sys.exit(f"error: {problem}")
