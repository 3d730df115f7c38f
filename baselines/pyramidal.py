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

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from baselines import trunk
from config import Config
from pyramid import down, up
from schedule import loss as flow_loss


@dataclass(frozen=True)
class Pyramidal(trunk.OneImage):
    """Boundaries e_0 < e_1 < ... are starts[1:] and 1, the paper's are i/K; form: a name in the table above."""

    form: str = "pyramidal"
    pooled: bool = False                                    # noise of all scales from one image: see loss

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

    def split(self, x: Tensor) -> list[Tensor]:
        """Images of all scales, coarse to fine: D^(K-1-i) x."""
        images = [x]
        while len(images) < self.num_scales:
            images.insert(0, down(images[0]))
        return images

    def draw_noise(self, rng, shape: tuple[int, int, int]) -> list[Tensor]:
        if not self.pooled:
            return super().draw_noise(rng, shape)
        return [2.0 ** (self.num_scales - 1 - i) * n for i, n in enumerate(self.split(rng.randn(*shape)))]

    def interpolate(self, x1: list[Tensor], x0: list[Tensor], t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """[state] and [target] (B, C, H_i, W_i) of the finest scale i of x1 at the times t (B,) of the clock; x1: the
        images x^0..x^i, x0: unit noise of each resolution."""
        i = len(x1) - 1
        (s, e), (start, end), n = self.windows[i], self.segments[i], self.noise_std(i) * x0[i]
        tau = ((t - start) / (end - start)).view(-1, 1, 1, 1)
        last = e * x1[i] + (1 - e) * n
        first = (1 - s) * n + (s * up(x1[i - 1]) if i else 0)
        return [tau * last + (1 - tau) * first], [last - first]

    def enter(self, i: int, bands: list[Tensor], z: Tensor) -> list[Tensor]:
        """The jump to stage i; z is unit noise of its resolution."""
        if i == 0:
            return [self.noise_std(0) * z]
        s, _ = self.windows[i]
        a = 1.0 if self.form == "pyramidal-zero-overlap" else (1 + s) / 2
        return [a * up(bands[0]) + (1 - s) * self.noise_std(i) * (z - up(down(z)))]


def network(cfg: Config, channels: int, condition: Callable | None, side: int) -> trunk.ScaleDiT:
    return trunk.ScaleDiT(cfg, channels, condition, side, own_patches=False)


def schedule(cfg: Config) -> Pyramidal:
    return Pyramidal(cfg.starts, stages=cfg.stages, times=cfg.times, stage_weights=cfg.stage_weights, form=cfg.method)


def loss(model: Callable, x1: Tensor, y: Tensor | None, schedule: Pyramidal, rng) -> tuple[Tensor, list]:
    """schedule.loss, each example in one stage (the paper mixes them in a batch: stratified). The original pools its
    noise from the largest image, scaled to unit variance again."""
    return flow_loss(model, x1, y, dataclasses.replace(schedule, pooled=schedule.form != "pixelflow"), rng)


def sample(model: Callable, rng, y: Tensor | None, schedule: Pyramidal, shape: tuple, solve: Callable,
           **solver) -> Tensor:
    """Draws x1 (B, C, H, W). The network gives d X / d tau; the solver runs on the clock."""
    sides = [shape[-1] >> k for k in reversed(range(schedule.num_scales))]

    def on_the_clock(bands, t, y):
        start, end = schedule.segments[sides.index(bands[0].shape[-1])]
        return [v / (end - start) for v in model(bands, t, y)]

    return trunk.sample(on_the_clock, rng, y, schedule, shape, solve, **solver)
