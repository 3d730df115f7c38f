"""LapFlow itself, in the four names of a system. The method is in schedule.py, model.py and sample.solve."""

from collections.abc import Callable

from baselines.trunk import sample
from config import Config
from model import MoTDiT
from schedule import Schedule, loss

__all__ = ["network", "schedule", "loss", "sample"]


def network(cfg: Config, channels: int, condition: Callable | None, side: int) -> MoTDiT:
    return MoTDiT(cfg.size, channels, side, cfg.num_scales, experts=cfg.experts, mask=cfg.mask,
                  condition_tokens=cfg.condition_tokens, condition=condition, block=cfg.block,
                  concat_coarse=cfg.concat_coarse, pyramid=cfg.pyramid, patches=cfg.patches)


def schedule(cfg: Config) -> Schedule:
    return Schedule(cfg.starts, cfg.path, cfg.pyramid, cfg.noise, cfg.stages, cfg.full_range, cfg.times,
                    cfg.stage_weights)
