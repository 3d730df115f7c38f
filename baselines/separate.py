"""LapFlow with one network for each segment in place of one mixture of transformers: an ablation of the paper.

Network j sees bands 0..j and works in the segment [T_j, T_(j+1)] alone; it trains there and nowhere else. The rest,
from the noise to the solver, is LapFlow's.
"""

from collections.abc import Callable

from torch import Tensor, nn

from baselines.trunk import sample
from config import Config
from model import MoTDiT
from schedule import Schedule, loss

__all__ = ["network", "schedule", "loss", "sample"]


class Separate(MoTDiT):
    """K MoT-DiTs: this one for all bands, and one for each shorter prefix."""

    def __init__(self, cfg: Config, channels: int, condition: Callable | None, side: int):
        options = dict(mask=cfg.mask, condition_tokens=cfg.condition_tokens, condition=condition, block=cfg.block)
        super().__init__(cfg.size, channels, side, cfg.num_scales, **options)
        self.coarser = nn.ModuleList(MoTDiT(cfg.size, channels, side >> (cfg.num_scales - k), k, **options)
                                     for k in range(1, cfg.num_scales))

    def forward(self, bands: list[Tensor], t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        if len(bands) == self.num_scales:
            return super().forward(bands, t, y)
        return self.coarser[len(bands) - 1](bands, t, y)


network = Separate                                          # (cfg, channels, condition, side)


def schedule(cfg: Config) -> Schedule:
    return Schedule(cfg.starts, cfg.path, cfg.pyramid, stages=cfg.stages, full_range=False, times=cfg.times,
                    stage_weights=cfg.stage_weights)
