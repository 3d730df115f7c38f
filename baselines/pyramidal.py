"""Pyramidal Flow (Jin et al., ICLR 2025, arXiv 2410.05954), its spatial pyramid: one image at a time, ever larger.

Stage i (coarse to fine) works at its own resolution, on x^i = D^(K-1-i) x_1. It goes from the data weight s_i to e_i on
a straight line, with the SAME noise n ~ N(0, I) at both ends (in stage 0 X_s = n):

    end    X_e = e_i x^i + (1 - e_i) n
    start  X_s = s_i U x^(i-1) + (1 - s_i) n
    state  X = tau X_e + (1 - tau) X_s, tau in [0, 1];    target  X_e - X_s

The jump to the next resolution keeps the law of the state exactly. With z ~ N(0, I) at the finer resolution

    X_s = a U X_e + b (z - U D z)

(z - U D z is orthogonal to U X_e, so the sum can be made white; scaled by sqrt(4/3) it is the paper's corrective noise
of gamma = -1/3.) Three forms, by --method:

    pyramidal                the original: s rolls back, s_i = e / (2 - e) with e = e_(i-1), a = (1 + s) / 2, b = 1 - s
    pyramidal-zero-overlap   as LapFlow's appendix F presents it, s_i = e_(i-1), a = 1. With unit noise in each stage no
                             noise can repair the law; with pooled noise, std 2^-(K-1-i), b = (1 - s) 2^-(K-1-i) does
    pixelflow                PixelFlow (Chen et al. 2025, arXiv 2504.07963): the original's equations; in training,
                             fresh noise at the stage's own resolution in place of pooled noise of the largest. One
                             stage of one example sees either as N(0, I): the same method in law, which a test shows

The network sees a global time, in which the interval of each stage is proportional to e_i - s_i (the paper's clock).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from baselines import trunk
from config import Config
from pyramid import down, up


def levels(x: Tensor, num_scales: int) -> list[Tensor]:
    """Images of all scales, coarse to fine: D^(K-1-i) x."""
    images = [x]
    while len(images) < num_scales:
        images.insert(0, down(images[0]))
    return images


@dataclass(frozen=True)
class Pyramidal(trunk.OneImage):
    """Boundaries e_0 < e_1 < ... are starts[1:] and 1, the paper's are i/K; form: a name in the table above."""

    form: str = "pyramidal"

    @property
    def windows(self) -> list[tuple[float, float]]:
        """[(s_i, e_i), ...]: data weights at start and end of every stage."""
        rolled = [e if self.form == "pyramidal-zero-overlap" else e / (2 - e) for e in self.starts]
        return list(zip(rolled, (*self.starts[1:], 1.0), strict=True))

    @property
    def segments(self) -> list[tuple[float, float]]:
        """The clock: an interval of [0, 1] for each stage, in proportion to e_i - s_i."""
        edges, total = [0.0], sum(e - s for s, e in self.windows)
        for s, e in self.windows:
            edges.append(edges[-1] + (e - s) / total)
        return list(zip(edges[:-1], [*edges[1:-1], 1.0], strict=True))

    def noise_std(self, i: int) -> float:
        return super().noise_std(i) if self.form == "pyramidal-zero-overlap" else 1.0

    def interpolate(self, x: Tensor, coarser: Tensor | None, n: Tensor, i: int, tau: Tensor) -> tuple[Tensor, Tensor]:
        """State and target (B, C, H_i, W_i) of stage i at the local times tau (B,): x is the image of this scale,
        coarser that of the scale below (None in stage 0), n unit noise."""
        (s, e), tau, n = self.windows[i], tau.view(-1, 1, 1, 1), self.noise_std(i) * n
        end = e * x + (1 - e) * n
        start = (1 - s) * n + (s * up(coarser) if i else 0)
        return tau * end + (1 - tau) * start, end - start

    def enter(self, i: int, bands: list[Tensor], z: Tensor) -> list[Tensor]:
        """The jump to stage i; z is unit noise of its resolution."""
        if i == 0:
            return [self.noise_std(0) * z]
        s, _ = self.windows[i]
        a = 1.0 if self.form == "pyramidal-zero-overlap" else (1 + s) / 2
        return [a * up(bands[0]) + (1 - s) * self.noise_std(i) * (z - up(down(z)))]


def network(cfg: Config, channels: int, condition: Callable | None, side: int) -> trunk.ScaleDiT:
    return trunk.ScaleDiT(cfg.size, channels, side, cfg.num_scales, condition, cfg.condition_tokens, own_patches=False,
                          block=cfg.block, patches=cfg.patches)


def schedule(cfg: Config) -> Pyramidal:
    return Pyramidal(cfg.starts, stages=cfg.stages, times=cfg.times, stage_weights=cfg.stage_weights, form=cfg.method)


def loss(model: Callable, x1: Tensor, y: Tensor | None, schedule: Pyramidal, rng) -> tuple[Tensor, list]:
    """Mean squared error of X_e - X_s, each example in one stage (the paper mixes them in a batch: stratified)."""
    num_scales, u, shape = schedule.num_scales, schedule.draw_times(rng), x1.shape[1:]          # u (B,)
    images = levels(x1, num_scales)                                                 # x^i
    if schedule.form == "pixelflow":
        noise = schedule.draw_noise(rng, shape)
    else:                                                   # pooled from the largest, scaled to unit variance again
        noise = [2.0 ** (num_scales - 1 - i) * n for i, n in enumerate(levels(rng.randn(*shape), num_scales))]

    def state(i, rows, tau):
        coarser = images[i - 1][rows] if i else None
        start, end = schedule.segments[i]
        xt, v = schedule.interpolate(images[i][rows], coarser, noise[i][rows], i, tau)
        return xt, v, start + (end - start) * tau                                   # the clock

    return trunk.one_image_loss(model, y, u, schedule, rng, state)


def sample(model: Callable, rng, y: Tensor | None, schedule: Pyramidal, shape: tuple, solve: Callable,
           **solver) -> Tensor:
    """Draws x1 (B, C, H, W). The network gives d X / d tau; the solver runs on the clock."""
    sides = [shape[-1] >> k for k in reversed(range(schedule.num_scales))]

    def on_the_clock(bands, t, y):
        start, end = schedule.segments[sides.index(bands[0].shape[-1])]
        return [v / (end - start) for v in model(bands, t, y)]

    return trunk.sample(on_the_clock, rng, y, schedule, shape, solve, **solver)
