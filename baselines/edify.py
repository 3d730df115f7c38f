"""EdifyImage (Atzmon et al. 2024, arXiv 2411.07126) as flow matching, after appendix E of the LapFlow paper.

Edify is a diffusion model whose state is an image of growing resolution: the bands of the Laplacian pyramid of the data
are faded in one after the other. Scale i (coarse to fine) works in the window [T_i, T_(i+1)]:

    gate   a_j(t) = clip((t - T_j) / (1 - T_j), 0, 1), and a_0 = 1
    mean   m_i(t) = sum over bands j <= i of a_j(t) U^(i-j) x_1^(j)
    state  X_i(t) = t m_i(t) + (1 - t) s_i n,   n ~ N(0, I), s_i = 2^-(K-1-i): the law of pooled noise
    target d X_i / dt = m_i - s_i n + t m_i'(t);   the last term because the mean itself moves

and at T_i the next scale takes over, exactly in law, because its new band is still gated off there:

    X_i = U X_(i-1) + (1 - T_i) s_i (z - U D z),   z ~ N(0, I)

The original's curves are not published, and the appendix has no formulas: this is a reconstruction.
`edify-plain` weights band j with a_j alone, and a_0 = t, in place of t a_j: its state is LapFlow's, bands summed up (a
test shows it); the difference that remains is that one image, and not its bands, passes the network. The original has
one network for each resolution; here all scales share the blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from baselines.trunk import OneImage, ScaleDiT, sample
from config import Config
from pyramid import down, up
from schedule import loss

__all__ = ["network", "schedule", "loss", "sample"]


@dataclass(frozen=True)
class Edify(OneImage):
    """starts: T_i, the time at which scale i takes over; product: band weights t a_j, else a_j (edify-plain)."""

    product: bool = True

    def weight(self, j: int, t: Tensor) -> tuple[Tensor, Tensor]:
        """Weight of band j in the state at times t, and its derivative."""
        slope = 1 / (1 - self.starts[j])
        gate = ((t - self.starts[j]) * slope).clamp(0, 1)   # a_j; of band 0 t a_0 = t
        opens = slope * (t >= self.starts[j])
        if not self.product or j == 0:
            return gate, opens
        return t * gate, gate + t * opens

    def interpolate(self, x1: list[Tensor], x0: list[Tensor], t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """[state] and [target] (B, C, H_i, W_i) of the finest scale i of x1 at the times t (B,); x1: bands 0..i of the
        data, x0: unit noise of each resolution."""
        i, t = len(x1) - 1, t.view(-1, 1, 1, 1)
        weights = [self.weight(j, t) for j in range(i + 1)]
        data, moving = (self.image([w[k] * band for w, band in zip(weights, x1, strict=True)]) for k in (0, 1))
        n = self.noise_std(i) * x0[i]
        return [data + (1 - t) * n], [moving - n]

    def enter(self, i: int, bands: list[Tensor], z: Tensor) -> list[Tensor]:
        """The switch to scale i; z is unit noise of its resolution."""
        if i == 0:
            return [self.noise_std(0) * z]
        return [up(bands[0]) + (1 - self.starts[i]) * self.noise_std(i) * (z - up(down(z)))]


def network(cfg: Config, channels: int, condition: Callable | None, side: int) -> ScaleDiT:
    return ScaleDiT(cfg, channels, condition, side, own_patches=True)


def schedule(cfg: Config) -> Edify:
    return Edify(cfg.starts, stages=cfg.stages, times=cfg.times, stage_weights=cfg.stage_weights,
                 product=cfg.method == "edify")
