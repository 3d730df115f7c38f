"""DFM, Decomposable Flow Matching (Haji-Ali et al., NeurIPS 2025, arXiv 2506.19839): a time of its own for each band.

    bands  of a Laplacian pyramid with bilinear upsampling; each with independent noise and its own time t_i:
           X_i = t_i x_1^i + (1 - t_i) n_i,    v_i = x_1^i - n_i
    train  draw the active stage Q (p = 0.9 for the first, the rest for the others); t_Q ~ sigmoid(N(0, 1)); for the
           coarser bands t_i ~ sigmoid(N(1.5, 1)); finer bands are not there: t_i = 0, input zero, no loss (Alg. 1)
    net    patch sizes such that all bands have the SAME number of tokens, and these are summed, not joined: cost and
           sequence of one plain DiT. Own patch embedding, time embedding and output layer for each band
    sample in phase j band j goes from 0 to tau while the coarser ones go on, and in the last phase all go to 1

With two bands that is the paper's sampler: t_0 runs to tau alone, then t_1 from 0 to 1 and t_0 from tau to 1. For more,
the paper only says "different rates". Here starts[j] is the share of its remaining way that each active band has gone
when band j enters; # not in paper: for K = 2 the one share is tau (0.9, the default of its appendix A.5).
Left out, for the same trunk for all: rotary positions, EDM's pre-conditioning, an embedding of the stage.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, UserError
from model import FinalLayer, MoTDiT, TimestepEmbedder, patchify, unpatchify
from pyramid import down
from schedule import noise_bands


def widen(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W), bilinear: DFM's upsampling."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def decompose(x: Tensor, num_scales: int) -> list[Tensor]:
    """Bands, coarse to fine: band i is D^(K-1-i) x less its coarser version upsampled."""
    bands = []
    for _ in range(num_scales - 1):
        bands.insert(0, x - widen(down(x)))
        x = down(x)
    return [x, *bands]


def reconstruct(bands: list) -> Tensor:
    x = bands[0]
    for band in bands[1:]:
        x = widen(x) + band
    return x


class SumDiT(MoTDiT):
    """One plain DiT whose tokens are sums over the bands. The patch size of `size` is that of the finest band."""

    def __init__(self, size: str | tuple, in_channels: int, resolution: int, num_scales: int, num_classes: int,
                 condition_tokens: bool):
        super().__init__(size, in_channels, resolution, 1, num_classes, "none", "causal", condition_tokens)
        d, p, self.num_scales = self.hidden_size, self.patch_size, num_scales
        if p % 2 ** (num_scales - 1):
            raise UserError(f"DFM cuts all {num_scales} bands into the same number of patches, so the patch size must "
                            f"be divisible by {2 ** (num_scales - 1)}, not {p}: choose another --size")
        self.patches = [p >> k for k in reversed(range(num_scales))]
        self.num_tokens = [(resolution // p) ** 2] * num_scales
        self.patch_in = nn.ModuleList(nn.Linear(in_channels * q * q, d) for q in self.patches)
        self.patch_out = nn.ModuleList(FinalLayer(d, in_channels * q * q) for q in self.patches)
        self.times = nn.ModuleList(TimestepEmbedder(d) for _ in range(num_scales - 1))  # of the finer bands
        self.initialize()
        for times in self.times:
            for layer in (times.mlp[0], times.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, bands: list[Tensor], t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """Velocities of bands 0..Q at the times t (B, Q + 1); the finer ones are not there, which is t = 0."""
        x, time = 0, 0
        for i, (p, embed) in enumerate(zip(self.patches, [self.time, *self.times], strict=True)):
            there = i < len(bands)
            x = x + (self.patch_in[i](patchify(bands[i], p)) if there else self.patch_in[i].bias)   # (B, N, D)
            time = time + embed(t[:, i] if there else torch.zeros_like(t[:, 0]))                    # (B, D)
        (x,), c = self.trunk([x + self.positions_0], time, y)
        return [unpatchify(self.patch_out[i](x, c), self.patches[i], *band.shape[-2:]) for i, band in enumerate(bands)]

    def tokens(self, stage: int) -> int:
        return self.num_tokens[0]

    def attention_pairs(self, stage: int) -> int:
        return (self.num_tokens[0] + self.num_cond) ** 2

    def flops(self, stage: int) -> int:
        d, tokens = self.hidden_size, self.tokens(stage)
        patches = sum(self.in_channels * p * p for p in self.patches[: stage + 1])
        blocks = self.count_flops(tokens, self.attention_pairs(stage), 1) - 4 * tokens * d * self.in_channels * (
            self.patch_size**2)
        return blocks + 4 * tokens * d * patches + 4 * stage * d * d + 2 * (self.num_scales - 1) * (256 * d + d * d)

    def mean_flops(self) -> float:
        return sum(share * self.flops(s) for s, share in enumerate(shares(self.num_scales)))

    def count_parameters(self) -> int:
        d, c = self.hidden_size, self.in_channels
        coarser = self.patches[:-1]
        one = super().count_parameters() - len(coarser) * (2 * c * self.patch_size**2 * d + c * self.patch_size**2)
        return one + sum(2 * c * p * p * d + c * p * p for p in coarser) + len(coarser) * (257 * d + d * d + d)


def shares(num_scales: int) -> list[float]:
    """How often each stage is trained. The paper: 0.9 and 0.1. # not in paper: with more, the finer ones share 0.1."""
    return [1.0] if num_scales == 1 else [0.9] + [0.1 / (num_scales - 1)] * (num_scales - 1)


@dataclass(frozen=True)
class Decomposable:
    """starts[j]: share of their remaining way that the active bands have gone when band j enters; starts[0] = 0."""

    starts: tuple[float, ...] = (0.0, 0.9)
    image = staticmethod(reconstruct)

    @property
    def num_scales(self) -> int:
        return len(self.starts)

    @property
    def segments(self) -> list[tuple[float, float]]:
        """The clock of the sampler: its first phase is three times as long as each other one (the paper: 30 and 10)."""
        edges = [0.0, *((3 + j) / (2 + self.num_scales) for j in range(self.num_scales))]
        return list(zip(edges[:-1], edges[1:], strict=True)) if self.num_scales > 1 else [(0.0, 1.0)]

    def times(self, clock: float | Tensor, phase: int) -> tuple[list, list]:
        """t_i of bands 0..phase at a moment of the clock, and their rates."""
        start, end = self.segments[phase]
        levels, ends = [], []                               # of each active band, as the phase begins and ends
        for j in range(phase + 1):
            levels.append(0.0)
            share = (*self.starts[1:], 1.0)[j]
            ends = [level + share * (1 - level) for level in levels]
            levels = ends if j < phase else levels
        part = (clock - start) / (end - start)
        return ([a + (b - a) * part for a, b in zip(levels, ends, strict=True)],
                [(b - a) / (end - start) for a, b in zip(levels, ends, strict=True)])

    def enter(self, j: int, bands: list, x0: Tensor) -> list:
        return [*bands, x0]                                 # at t_j = 0 the band is its noise


def network(cfg: Config, channels: int, num_classes: int, side: int) -> SumDiT:
    return SumDiT(cfg.size, channels, side, cfg.num_scales, num_classes, cfg.condition_tokens)


def schedule(cfg: Config) -> Decomposable:
    if cfg.starts[0] != 0 or not all(0 < share <= 1 for share in cfg.starts[1:]):
        raise UserError(f"the starts of DFM are 0, then shares above 0 and at most 1, like 0,0.9; not {cfg.starts}")
    return Decomposable(cfg.starts)


def stage_rows(rng, stages: str, num_scales: int) -> list:
    """As schedule.stage_groups, with this method's shares: [(stage, rows of this process, rows it stands for)]."""
    if stages == "batch":                                   # one draw for the whole batch
        return [(rng.choice(shares(num_scales)), slice(None), rng.batch)]
    place = (np.arange(rng.batch) + 0.5) * shares(num_scales)[-1] % 1
    stage = np.searchsorted(np.cumsum(shares(num_scales)), place)                   # of every row of the batch
    groups = []
    for s, share in enumerate(shares(num_scales)):
        rows = torch.from_numpy(np.flatnonzero(stage[rng.rows] == s)).to(rng.device)
        if len(rows):
            groups.append((s, rows, (stage == s).sum() / share))
    return groups


def loss(model: Callable, x1: Tensor, y: Tensor | None, schedule: Decomposable, rng,
         stages: str = "batch") -> tuple[Tensor, list]:
    """Algorithm 1: mean squared error of each active band, summed over the bands."""
    num_scales = schedule.num_scales
    noise, data = noise_bands(rng, x1.shape[1:], num_scales, "independent"), decompose(x1, num_scales)
    normal = rng.randn(num_scales)                                                  # (B, K)
    total, errors = 0.0, [[(x1.new_empty(0), x1.new_empty(0))] for _ in range(num_scales)]
    groups = stage_rows(rng, stages, num_scales)
    for s, rows, share in groups:
        location = 1.5 * (torch.arange(s + 1, device=x1.device) < s)                # later in time for coarser bands
        t = torch.sigmoid(normal[rows][:, : s + 1] + location)                      # (B_s, s + 1)
        at = [t[:, i].view(-1, 1, 1, 1) for i in range(s + 1)]
        xt = [at[i] * data[i][rows] + (1 - at[i]) * noise[i][rows] for i in range(s + 1)]
        v_pred = model(xt, t, None if y is None else y[rows])
        for i in range(s + 1):
            error = (v_pred[i].float() - (data[i][rows] - noise[i][rows])).square().mean(dim=(1, 2, 3))     # (B_s,)
            total = total + error.sum() / share
            errors[i].append((t[:, i], error.detach()))
    pairs = [tuple(torch.cat(part) for part in zip(*band, strict=True)) for band in errors]
    return total, pairs[: groups[0][0] + 1] if stages == "batch" else pairs


def sample(model: Callable, n, y: Tensor | None, schedule: Decomposable, shape: tuple, solve: Callable,
           **solver) -> Tensor:
    """Draws x1 (B, C, H, W). The solver runs on the clock; each band moves at its own rate."""
    def velocity(bands, clock):
        times, rates = schedule.times(clock, len(bands) - 1)
        t = torch.stack([torch.as_tensor(time).to(bands[0]).expand(len(bands[0])) for time in times], dim=1)
        return [rate * v for rate, v in zip(rates, model(bands, t, y), strict=True)]

    bands, _ = solve(velocity, noise_bands(n, shape, schedule.num_scales, "independent"), schedule, **solver)
    return reconstruct(bands)
