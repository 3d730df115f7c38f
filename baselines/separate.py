"""LapFlow with one network for each segment in place of one mixture of transformers: an ablation of the paper.

Network j sees bands 0..j and works in the segment [T_j, T_(j+1)] alone; it trains there and nowhere else. The rest,
from the noise to the solver, is LapFlow's.
"""

from collections.abc import Callable

from torch import Tensor, nn

import schedule as lapflow
from config import Config
from model import MoTDiT
from schedule import Schedule, noise_bands


class Separate(MoTDiT):
    """K MoT-DiTs: this one for all bands, and one for each shorter prefix."""

    def __init__(self, cfg: Config, channels: int, num_classes: int, side: int):
        def settings(num_scales):
            return (cfg.size, channels, side >> (cfg.num_scales - num_scales), num_scales, num_classes, "full",
                    cfg.mask, cfg.condition_tokens)

        super().__init__(*settings(cfg.num_scales))
        self.coarser = nn.ModuleList(MoTDiT(*settings(j + 1)) for j in range(cfg.num_scales - 1))

    def forward(self, bands: list[Tensor], t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        if len(bands) == self.num_scales:
            return super().forward(bands, t, y)
        return self.coarser[len(bands) - 1](bands, t, y)

    def flops(self, stage: int) -> int:
        return super().flops(stage) if stage == self.num_scales - 1 else self.coarser[stage].flops(stage)

    def count_parameters(self) -> int:
        return super().count_parameters() + sum(network.count_parameters() for network in self.coarser)


def network(cfg: Config, channels: int, num_classes: int, side: int) -> Separate:
    return Separate(cfg, channels, num_classes, side)


def schedule(cfg: Config) -> Schedule:
    return Schedule(cfg.starts, cfg.path)


def loss(model: Callable, x1: Tensor, y: Tensor | None, schedule: Schedule, rng,
         stages: str = "batch") -> tuple[Tensor, list]:
    """LapFlow's, with the times of each stage from its own segment."""
    return lapflow.loss(model, x1, y, schedule, rng, "pyramid", stages, full_range=False)


def sample(model: Callable, n, y: Tensor | None, schedule: Schedule, shape: tuple, solve: Callable, **solver) -> Tensor:
    def velocity(bands, t):
        return model(bands, t.expand(len(bands[0])), y)

    bands, _ = solve(velocity, noise_bands(n, shape, schedule.num_scales), schedule, **solver)
    return schedule.image(bands)
