"""DFM, Decomposable Flow Matching (Haji-Ali et al., NeurIPS 2025, arXiv 2506.19839): a time of its own for each band.

    bands  of a Laplacian pyramid with bilinear upsampling; each with independent noise and its own time t_i:
           X_i = t_i x_1^i + (1 - t_i) n_i,    v_i = x_1^i - n_i
    train  draw the active stage Q (p = 0.9 for the first, the rest for the others); t_Q ~ sigmoid(N(0, 1)); for the
           coarser bands t_i ~ sigmoid(N(1.5, 1)); finer bands are absent: t_i = 0, input zero, no loss (Alg. 1)
    net    patch sizes such that all bands have the SAME number of tokens, and these are summed, not joined: cost and
           sequence of one plain DiT. Own patch embedding, time embedding and output layer for each band
    sample in phase j band j goes from 0 to tau while the coarser ones go on, and in the last phase all go to 1

With two bands that is the paper's sampler: t_0 runs to tau alone, then t_1 from 0 to 1 and t_0 from tau to 1. For more,
the paper only says "different rates". Here starts[j] is the fraction of its remaining way that each active band has
gone when band j enters; # not in paper: for K = 2 that is tau (0.9, the default of its appendix A.5).
Left out, so that all systems share one trunk: rotary positions, EDM's pre-conditioning, an embedding of the stage.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines import trunk
from config import Config, UserError
from model import FinalLayer, MoTDiT, TimestepEmbedder, patchify, unpatchify
from pyramid import PYRAMIDS, down
from schedule import Schedule, rows_by_stage


def widen(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W), bilinear: DFM's upsampling."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


PYRAMIDS["bilinear"] = (down, widen)


@dataclass(frozen=True)
class Decomposable(Schedule):
    """starts[j]: fraction of their remaining way that the active bands have gone when band j enters; starts[0] = 0.

    coarse_share    how often stage 0 trains.  # not in paper: it has 0.9; on the digits 0.5 is far better (LOG.md)
    """

    starts: tuple[float, ...] = (0.0, 0.9)
    pyramid: str = "bilinear"
    noise: str = "independent"
    coarse_share: float = 0.5

    def __post_init__(self):
        if self.starts[0] != 0 or not all(0 < start <= 1 for start in self.starts[1:]):
            raise UserError(f"the starts of DFM are 0, then fractions in (0, 1], like 0,0.9; not {self.starts}")

    @property
    def segments(self) -> list[tuple[float, float]]:
        """The clock of the sampler: its first phase is three times as long as each other one (the paper: 30 and 10)."""
        edges = [0.0, *((3 + j) / (2 + self.num_scales) for j in range(self.num_scales))]
        return list(zip(edges[:-1], edges[1:], strict=True)) if self.num_scales > 1 else [(0.0, 1.0)]

    @property
    def shares(self) -> list[float]:
        """How often each stage is trained. # not in paper: with more than two, the finer ones divide the rest."""
        finer = self.num_scales - 1
        return [self.coarse_share, *[(1 - self.coarse_share) / finer] * finer] if finer else [1.0]

    def band_times(self, clock: float | Tensor, phase: int) -> tuple[list, list]:
        """t_i of bands 0..phase at a moment of the clock, and their rates."""
        start, end = self.segments[phase]
        levels, ends = [], []                               # of each active band, as the phase begins and ends
        for fraction in (*self.starts[1:], 1.0)[: phase + 1]:
            levels = [*ends, 0.0]
            ends = [level + fraction * (1 - level) for level in levels]
        part = (clock - start) / (end - start)
        return ([a + (b - a) * part for a, b in zip(levels, ends, strict=True)],
                [(b - a) / (end - start) for a, b in zip(levels, ends, strict=True)])

    def enter(self, j: int, bands: list[Tensor], x0: Tensor) -> list[Tensor]:
        return [*bands, x0]                                 # at t_j = 0 the band is its noise


class SumDiT(MoTDiT):
    """One plain DiT whose tokens are sums over the bands. The patch size of `size` is that of the finest band."""

    def __init__(self, cfg: Config, channels: int, condition: Callable | None, side: int):
        super().__init__(cfg.size, channels, side, 1, experts="none", condition_tokens=cfg.condition_tokens,
                         condition=condition, block=cfg.block)
        num_scales = self.num_scales = cfg.num_scales
        d, (p,) = self.hidden_size, self.patches
        if p % 2 ** (num_scales - 1):
            raise UserError(f"DFM cuts all {num_scales} bands into the same number of patches, so the patch size must "
                            f"be divisible by {2 ** (num_scales - 1)}, not {p}: choose another --size")
        self.patches, self.sides = ([n >> k for k in reversed(range(num_scales))] for n in (p, side))
        self.num_tokens = [(side // p) ** 2] * num_scales
        self.patch_in = nn.ModuleList(nn.Linear(channels * q * q, d) for q in self.patches)
        self.patch_out = nn.ModuleList(FinalLayer(d, channels * q * q) for q in self.patches)
        self.times = nn.ModuleList(TimestepEmbedder(d) for _ in range(num_scales - 1))  # of the finer bands
        self.initialize()
        for layer in (times.mlp[i] for times in self.times for i in (0, 2)):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, bands: list[Tensor], t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """Velocities of bands 0..Q at the times t (B, Q + 1); the finer ones are absent, which is zeros at t = 0."""
        x, time = 0, 0
        for i, (p, embed) in enumerate(zip(self.patches, [self.time, *self.times], strict=True)):
            active = i < len(bands)
            x = x + (self.patch_in[i](patchify(bands[i], p)) if active else self.patch_in[i].bias)  # (B, N, D)
            time = time + embed(t[:, i] if active else torch.zeros_like(t[:, 0]))                   # (B, D)
        (x,), c = self.trunk([x + self.positions_0], time, y)
        return [unpatchify(self.patch_out[i](x, c), self.patches[i], *band.shape[-2:]) for i, band in enumerate(bands)]

    def tokens(self, stage: int) -> int:
        return self.num_tokens[stage]

    def stage_inputs(self, stage: int, batch: int, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor]:
        bands, t = super().stage_inputs(stage, batch, device)
        return bands, t[:, None].expand(-1, stage + 1)


network = SumDiT                                            # (cfg, channels, condition, side)


def schedule(cfg: Config) -> Decomposable:
    return Decomposable(cfg.starts, stages=cfg.stages)


def loss(model: Callable, x1: Tensor, y: Tensor | None, schedule: Decomposable, rng) -> tuple[Tensor, list]:
    """Algorithm 1: mean squared error of each active band, summed over the bands."""
    noise, data = schedule.draw_noise(rng, x1.shape[1:]), schedule.split(x1)
    stage, normal = schedule.stage_of_rows(rng), rng.randn(schedule.num_scales)     # (B,), (B, K)
    total, errors = 0.0, [[] for _ in schedule.starts]
    for s, rows in rows_by_stage(stage, x1.device):
        location = 1.5 * (torch.arange(s + 1, device=x1.device) < s)                # coarser bands are ahead
        t = torch.sigmoid(normal[rows][:, : s + 1] + location)                      # (B_s, s + 1)
        at = [t[:, i].view(-1, 1, 1, 1) for i in range(s + 1)]
        xt = [at[i] * data[i][rows] + (1 - at[i]) * noise[i][rows] for i in range(s + 1)]
        v_pred = model(xt, t, None if y is None else y[rows])
        for i in range(s + 1):
            error = (v_pred[i].float() - (data[i][rows] - noise[i][rows])).square().mean(dim=(1, 2, 3))     # (B_s,)
            total = total + error.sum() / len(stage)
            errors[i].append((t[:, i], error.detach()))
    return total, [tuple(torch.cat(part) for part in zip(*band, strict=True)) for band in errors if band]


def sample(model: Callable, rng, y: Tensor | None, schedule: Decomposable, shape: tuple, solve: Callable,
           **solver) -> Tensor:
    """Draws x1 (B, C, H, W). The solver runs on the clock; each band moves at its own rate."""
    def on_the_clock(bands, clock, y):
        times, rates = schedule.band_times(clock, len(bands) - 1)
        return [rate * v for rate, v in zip(rates, model(bands, torch.stack(times, dim=1), y), strict=True)]

    return trunk.sample(on_the_clock, rng, y, schedule, shape, solve, **solver)
