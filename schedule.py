"""The per-scale schedule of LapFlow: when each band starts, how noisy it is at time t, and the training loss.

Notation, the same in every file of this repository:

    t in [0, 1]      time; t = 0 is noise, t = 1 is data
    x1, x0           data and noise, as images (B, C, H, W) or as lists of bands
    xt, v            state at time t, and its velocity d xt / dt: the training target
    K, i             number of scales; band i = 0..K-1, coarse to fine (the paper's superscript is k = K-1-i)
    T_i, starts[i]   time at which band i becomes active: 0 = T_0 < T_1 < ... < 1
    alpha, sigma     weights of data and noise
    stage s          which bands one training example uses: 0..s
    segment j        the interval [T_j, T_(j+1)] of sampling, in which bands 0..j are active

Band i follows   x_t = alpha_i(t) x_1 + sigma(t) x_0   for t in [T_i, 1].   sigma is shared by all bands; alpha is
shifted and stretched so that band i leaves pure noise, sigma(T_i) x_0, at T_i and arrives at clean data at 1.
With the local time tau = (t - T_i) / (1 - T_i) the linear path is tau x_1 + (1 - tau)(1 - T_i) x_0: ordinary rectified
flow whose noise shrinks with the scale.

    python schedule.py            prints the coefficients and draws them
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from config import NOISES, STAGES, UserError
from pyramid import decompose, reconstruct

PATHS = ("linear", "quadratic", "cubic", "gvp")


@dataclass(frozen=True)
class Schedule:
    """Start times T_i and path of every band. Raises UserError when the starts do not increase from 0 to below 1."""

    starts: tuple[float, ...] = (0.0, 0.5)
    path: str = "linear"
    image = staticmethod(reconstruct)                       # bands -> image; a baseline has its own

    def __post_init__(self):
        starts = tuple(self.starts)
        increasing = all(a < b for a, b in zip(starts, starts[1:] + (1.0,), strict=False))
        if not starts or starts[0] != 0 or not increasing:
            raise UserError(f"starts must increase from 0 to below 1, like 0,0.5; got {starts}")
        if self.path not in PATHS:
            raise UserError(f"unknown path {self.path!r}; choose one of {', '.join(PATHS)}")

    @property
    def num_scales(self) -> int:
        return len(self.starts)

    @property
    def segments(self) -> list[tuple[float, float]]:
        """[(t_start, t_end), ...], one per stage: segment j runs bands 0..j together."""
        return list(zip(self.starts, tuple(self.starts[1:]) + (1.0,), strict=True))

    def coefficients(self, i: int, t: float | Tensor) -> tuple[Tensor, ...]:
        """alpha, sigma, d alpha/dt, d sigma/dt of band i at t in [T_i, 1]: tensors of the shape of t.

        linear (the paper's choice) has straight noise; quadratic and cubic bend sigma; gvp is the trigonometric path.
        """
        t = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
        rate = 1 / (1 - self.starts[i])                     # d tau / dt
        tau = (t - self.starts[i]) * rate                   # 0 at T_i, 1 at the end
        if self.path == "gvp":
            h = math.pi / 2
            return torch.sin(h * tau), torch.cos(h * t), h * rate * torch.cos(h * tau), -h * torch.sin(h * t)
        p = {"linear": 1, "quadratic": 2, "cubic": 3}[self.path]
        return tau, (1 - t) ** p, torch.full_like(t, rate), -p * (1 - t) ** (p - 1)

    def enter(self, j: int, bands: list[Tensor], x0: Tensor) -> list[Tensor]:
        """The state as segment j begins: band j joins the others as sigma(T_j) x_0, its exact law at T_j."""
        return [*bands, self.coefficients(j, self.starts[j])[1].to(x0) * x0]

    def interpolate(self, x1: list[Tensor], x0: list[Tensor], t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """State xt and target velocity v of bands 0..len(x1)-1 (any prefix) at the times t (B,), one per example."""
        xt, v = [], []
        for i, (data, noise) in enumerate(zip(x1, x0, strict=True)):
            alpha, sigma, d_alpha, d_sigma = (c.view(-1, 1, 1, 1) for c in self.coefficients(i, t))
            xt.append(alpha * data + sigma * noise)         # (B, C, H_i, W_i)
            v.append(d_alpha * data + d_sigma * noise)
        return xt, v


def noise_bands(n, shape: tuple[int, int, int], num_scales: int, kind: str = "pyramid") -> list[Tensor]:
    """x_0 as bands, for images of shape (C, H, W); n is a source of Gaussians, n.randn(*shape) -> (B, *shape).

    pyramid: the bands of ONE white image, so the re-summed state is sum_i alpha_i U..U x_1 + sigma(t) white noise.
    independent: unit noise in each band.  # not in paper: it leaves this open; both can be measured
    """
    if kind not in NOISES:
        raise UserError(f"unknown noise {kind!r}; choose one of {', '.join(NOISES)}")
    if kind == "pyramid":
        return decompose(n.randn(*shape), num_scales)
    c, h, w = shape
    return [n.randn(c, h >> k, w >> k) for k in reversed(range(num_scales))]


def stage_groups(rng, stages: str, num_scales: int) -> list:
    """Which rows train which stage: [(stage, rows of this process, what to divide the sum of their errors by)].

    stages="batch" draws one stage for the whole batch, as the paper does. # not in paper: "stratified" gives every
    stage its share of each batch, row g of the whole batch stage g mod K: the same cost, less variance. With K = 2 and
    a batch of 8, a process with rows 3..5 gets (0, row 4, 8) and (1, rows 3 and 5, 8). rng is a `data.BatchRandom`.
    """
    if stages not in STAGES:
        raise UserError(f"unknown stages {stages!r}; choose one of {', '.join(STAGES)}")
    if stages == "batch":
        return [(rng.randint(num_scales), slice(None), rng.batch)]
    return [(s, slice((s - rng.rows.start) % num_scales, None, num_scales),
             num_scales * len(range(s, rng.batch, num_scales))) for s in range(num_scales)]


def loss(model: Callable, x1: Tensor, y: Tensor | None, schedule: Schedule, rng, noise: str = "pyramid",
         stages: str = "batch", full_range: bool = True) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Algorithm 1: the LapFlow training loss of images x1 (B, C, H, W) with labels y (B,), or None.

    rng is a `data.BatchRandom`; x1 may be a part of its batch, and the loss is that part's share: shares add up to the
    loss of the whole batch. stages: see `stage_groups`.
    # not in paper: full_range=False draws t from the segment [T_s, T_(s+1)] in place of [T_s, 1].

    Returns the scalar loss, summed over bands, and for each active band (t, squared error), one number per example.
    """
    num_scales = schedule.num_scales
    x0 = noise_bands(rng, x1.shape[1:], num_scales, noise)
    x1 = decompose(x1, num_scales)
    u = rng.rand()                                          # (B,)
    total, errors = 0.0, [[] for _ in range(num_scales)]
    for s, rows, share in stage_groups(rng, stages, num_scales):
        if not len(u[rows]):
            continue
        start, end = schedule.segments[s]
        t = start + ((1.0 if full_range else end) - start) * u[rows]            # (B_s,)
        active = range(s + 1)
        xt, v = schedule.interpolate([x1[i][rows] for i in active], [x0[i][rows] for i in active], t)
        v_pred = model(xt, t, None if y is None else y[rows])
        for i in active:
            error = (v_pred[i].float() - v[i]).square().mean(dim=(1, 2, 3))     # (B_s,)
            total = total + error.sum() / share
            errors[i].append((t, error.detach()))
    pairs = [tuple(torch.cat(part) for part in zip(*band, strict=True)) for band in errors if band]
    return total, pairs


def main() -> None:
    """Prints alpha of both bands of a two-scale schedule on every path; draws alpha and sigma to schedule.png."""
    from pictures import pyplot

    figure, axes = pyplot().subplots(1, len(PATHS), figsize=(14, 3.4), sharey=True, layout="constrained")
    for axis, path in zip(axes, PATHS, strict=True):
        schedule = Schedule((0.0, 0.5), path)
        print(f"{path:10s}  t     " + "  ".join(f"{t:5.2f}" for t in torch.linspace(0.5, 1, 6)))
        for i, start in enumerate(schedule.starts):
            t = torch.linspace(start, 1, 101)
            alpha, sigma, _, _ = schedule.coefficients(i, t)
            axis.plot(t, alpha, color=f"C{i}", label=f"alpha of band {i}")
            row = schedule.coefficients(i, torch.linspace(0.5, 1, 6))[0]
            print(f"{'':10s}  alpha_{i}" + "  ".join(f"{a:5.2f}" for a in row))
        t = torch.linspace(0, 1, 101)
        axis.plot(t, schedule.coefficients(0, t)[1], "k--", label="sigma, shared")
        axis.set(title=path, xlabel="t (0 noise, 1 data)")
    axes[0].legend()
    figure.savefig("schedule.png", dpi=110)
    print("picture: schedule.png")


if __name__ == "__main__":
    main()
