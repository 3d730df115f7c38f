"""The ODE solvers: what they may be asked for, and how torchdiffeq is told."""

import argparse
import math

import torch
from torch import Tensor

from config import Config, UserError, check_solver

FIXED = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk2": "heun2", "rk4": "rk4"}  # torchdiffeq's names


def solver_settings(cfg: Config, args: argparse.Namespace | None = None) -> dict:
    """Solver, tolerances, steps and guidance: those of the run, unless the command line gives others."""
    given = {} if args is None else {k: v for k, v in vars(args).items() if v is not None}
    solver = given.get("solver", cfg.solver)
    for name in ("rtol", "atol", "cfg"):
        if name in given and not (math.isfinite(given[name]) and (name == "cfg" or given[name] > 0)):
            raise UserError(f"--{name} must be a {'' if name == 'cfg' else 'positive '}number, not {given[name]}")
    interval = given.get("cfg_interval", (0.0, 1.0))
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(f"--cfg-interval takes two increasing times in [0, 1], like 0.1,0.8; not {interval}")
    if cfg.method == "dfm" and interval != (0.0, 1.0):
        raise UserError("DFM has a time for each band, so an interval of guidance means nothing: leave out "
                        "--cfg-interval")
    settings = {"solver": solver, "norm": given.get("norm", "batch"), "cfg_scale": given.get("cfg", cfg.cfg_scale),
                "interval": interval, "precision": given.get("precision", "float32")}
    if solver == "dopri5":
        settings.update(rtol=given.get("rtol", cfg.rtol), atol=given.get("atol", cfg.atol), steps=given.get("steps"))
    else:
        settings["steps"] = given.get("steps", cfg.solver_steps)
        if "rtol" in given or "atol" in given:
            raise UserError(f"the solver {solver} has no tolerance: leave out --rtol and --atol, or use dopri5")
    check_solver(solver, settings["steps"])
    return settings


def solver_options(segments: list, j: int, solver: str, steps: int | None, norm: str, jumps: tuple,
                   device: torch.device) -> tuple[Tensor, dict]:
    """Start and end time of segment j, and torchdiffeq's method and options for it."""
    start, end = segments[j]
    if solver != "dopri5":
        grid = torch.linspace(start, end, share_steps(steps, segments)[j] + 1, device=device)
        for t in jumps:
            grid[(grid - t).abs() < 1e-6] = t               # not a rounding beside it
        return grid[[0, -1]], {"method": FIXED[solver], "options": {
            "grid_constructor": lambda func, y0, t: grid, "perturb": any(0 < t < 1 for t in jumps)}}
    dtype = torch.float32 if device.type == "mps" else torch.float64
    times = torch.tensor([start, end], dtype=dtype, device=device)
    # a step ends at the end of the segment: torchdiffeq would overshoot and interpolate back
    options = {"dtype": dtype, "step_t": times[1:], "max_num_steps": 10_000}
    if inside := [t for t in jumps if start < t < end]:
        options["jump_t"] = torch.tensor(inside, dtype=dtype, device=device)
    if norm == "sample":
        options["norm"] = lambda state: state.square().mean(dim=1).sqrt().max()
    return times, {"method": solver, "options": options}


def share_steps(steps: int, segments: list) -> list[int]:
    """Fixed steps of every segment, in proportion to its length; each gets one at least."""
    return [max(1, round(steps * end) - round(steps * start)) for start, end in segments]
