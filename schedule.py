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
shifted and squeezed so that band i leaves pure noise, sigma(T_i) x_0, at T_i and arrives at clean data at 1.
With the local time tau = (t - T_i) / (1 - T_i) the linear path is tau x_1 + (1 - tau)(1 - T_i) x_0: ordinary rectified
flow whose noise shrinks with the scale.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import CHOICES, UserError, check_choice
from pyramid import PYRAMIDS, decompose, reconstruct

PATHS = ("linear", "quadratic", "cubic", "gvp")


@dataclass(frozen=True)
class Schedule:
    """Start times T_i, path and pyramid of the bands, and how training visits them.

    noise    pyramid: x_0 is the pyramid of ONE white image, so the re-summed state is data plus white noise.
             independent: unit noise in each band.  # not in paper: it leaves this open; both can be measured
    stages   batch: one stage for a whole batch, as the paper. stratified: every batch is shared out over the stages,
             row g to stage g mod K when they are equally frequent; less variance at the same cost.  # not in paper
    full_range   stage s trains on [T_s, 1], as the paper; False: on its segment [T_s, T_(s+1)].  # not in paper
    times    of training within these: uniform, as the paper, or logit-normal (Esser et al. 2024).  # not in paper
    stage_weights   how often each stage is trained, relative to the others; (): equally, as the paper.  # not in paper
    noise_scale     of each band's noise, for sampling only; (): 1, as the paper.  # not in paper

    Raises UserError when the starts do not increase from 0 to below 1, and for an unknown option.
    """

    starts: tuple[float, ...] = (0.0, 0.5)
    path: str = "linear"
    pyramid: str = "haar"
    noise: str = "pyramid"
    stages: str = "batch"
    full_range: bool = True
    times: str = "uniform"
    stage_weights: tuple[float, ...] = ()
    noise_scale: tuple[float, ...] = ()

    def __post_init__(self):
        starts = tuple(self.starts)
        if starts[:1] != (0,) or not all(a < b for a, b in zip(starts, starts[1:] + (1.0,), strict=False)):
            raise UserError(f"starts must increase from 0 to below 1, like 0,0.5; got {starts}")
        for name in ("noise", "stages", "times"):
            check_choice(name, getattr(self, name), CHOICES[name])
        check_choice("path", self.path, PATHS)
        check_choice("pyramid", self.pyramid, PYRAMIDS)

    @property
    def num_scales(self) -> int:
        return len(self.starts)

    @property
    def segments(self) -> list[tuple[float, float]]:
        """[(t_start, t_end), ...], one per stage: segment j runs bands 0..j together."""
        return list(zip(self.starts, tuple(self.starts[1:]) + (1.0,), strict=True))

    @property
    def shares(self) -> list[float]:
        """How often each stage is trained."""
        weights = self.stage_weights or [1.0] * self.num_scales
        return [weight / sum(weights) for weight in weights]

    def split(self, x: Tensor) -> list[Tensor]:
        return decompose(x, self.num_scales, self.pyramid)

    def image(self, bands: list[Tensor]) -> Tensor:
        return reconstruct(bands, self.pyramid)

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
        """The state as segment j begins: band j joins as sigma(T_j) x_0, its law at T_j (Haar bands: independent)."""
        return [*bands, self.coefficients(j, self.starts[j])[1].to(x0) * x0]

    def interpolate(self, x1: list[Tensor], x0: list[Tensor], t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """State xt and target velocity v of bands 0..len(x1)-1 (any prefix) at the times t (B,), one per example."""
        xt, v = [], []
        for i, (data, noise) in enumerate(zip(x1, x0, strict=True)):
            alpha, sigma, d_alpha, d_sigma = (c.view(-1, 1, 1, 1) for c in self.coefficients(i, t))
            xt.append(alpha * data + sigma * noise)         # (B, C, H_i, W_i)
            v.append(d_alpha * data + d_sigma * noise)
        return xt, v

    def draw_noise(self, rng, shape: tuple[int, int, int]) -> list[Tensor]:
        """x_0 as bands, for images (C, H, W); rng is a source of Gaussians, rng.randn(*shape) -> (B, *shape)."""
        if self.noise == "pyramid":
            return self.split(rng.randn(*shape))
        c, h, w = shape
        return [rng.randn(c, h >> k, w >> k) for k in reversed(range(self.num_scales))]

    def scaled(self, x0: list[Tensor]) -> list[Tensor]:
        """The noise of the first few bands, or of all, as sampling starts from it."""
        return [scale * band for scale, band in zip(self.noise_scale, x0, strict=False)] if self.noise_scale else x0

    def draw_times(self, rng) -> Tensor:
        """Where in its interval each row trains, (B,) in [0, 1]."""
        return rng.rand() if self.times == "uniform" else rng.randn().sigmoid()

    def stage_of_rows(self, rng) -> np.ndarray:
        """The stage (B,) that each row of this process trains; rng is a `data.batches.BatchRandom`."""
        if self.stages == "batch":                          # one draw for the whole batch
            return np.full(rng.batch, rng.choice(self.shares))[rng.rows]
        # stage s is due at (n + 1/2) / share_s, n = 0, 1, ...; the rows take the stages in the order they are due
        due = (np.arange(rng.batch) + 0.5) / np.array(self.shares)[:, None]         # (K, B)
        return (np.argsort(due, axis=None, kind="stable")[: rng.batch] // rng.batch)[rng.rows]


def rows_by_stage(stage: np.ndarray, device: torch.device) -> list[tuple[int, Tensor | slice]]:
    """[(s, the rows that train stage s), ...] for the stages that a batch has."""
    rows = {s: torch.from_numpy(np.flatnonzero(stage == s)) for s in np.unique(stage).tolist()}
    return [(s, slice(None) if len(rows) == 1 else places.to(device, non_blocking=True)) for s, places in rows.items()]


def loss(model: Callable, x1: Tensor, y: Tensor | None, schedule: Schedule,
         rng) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Algorithm 1: the LapFlow training loss of images x1 (B, C, H, W) with conditions y (B, ...), or None.

    model(bands, t, y) -> velocities; rng is a `data.batches.BatchRandom` for these rows. Baselines whose state is one
    image train with it too: of stage s their `interpolate` gives the image of scale s alone.
    Returns the mean over the rows of the squared error, summed over bands, and for each active band (t, squared error),
    one number per example."""
    x0 = schedule.draw_noise(rng, x1.shape[1:])             # K bands
    x1 = schedule.split(x1)
    stage, u = schedule.stage_of_rows(rng), schedule.draw_times(rng)            # (B,) each
    total, errors = 0.0, [[(u[:0], u[:0])] for _ in range(stage.max() + 1)]
    for s, rows in rows_by_stage(stage, u.device):
        start, end = schedule.segments[s]
        t = start + ((1.0 if schedule.full_range else end) - start) * u[rows]   # (B_s,)
        xt, v = schedule.interpolate([band[rows] for band in x1[: s + 1]], [band[rows] for band in x0[: s + 1]], t)
        v_pred = model(xt, t, None if y is None else y[rows])
        first = s + 1 - len(v)                              # 0, or s where the state is one image
        for i in range(len(v)):
            error = (v_pred[i].float() - v[i]).square().mean(dim=(1, 2, 3))     # (B_s,)
            total = total + error.sum() / len(u)
            errors[first + i].append((t, error.detach()))
    return total, [tuple(torch.cat(part) for part in zip(*band, strict=True)) for band in errors]
