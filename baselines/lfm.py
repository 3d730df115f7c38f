"""LFM, Flow Matching in Latent Space (Dao et al. 2023, arXiv 2307.08698): one scale, the plain DiT.

    x_t = t x_1 + (1 - t) n        v = x_1 - n        t ~ U[0, 1] for each example

It is LapFlow with one band, so schedule.loss trains it. Not taken over: LFM adds 1e-5 of noise at t = 1, feeds t itself
to the embedding, and trained an ADM U-Net, not a DiT, at 512 and 1024 pixels.
"""

from collections.abc import Callable

from baselines.trunk import sample
from config import Config
from model import MoTDiT
from schedule import Schedule, loss

__all__ = ["network", "schedule", "loss", "sample"]


def network(cfg: Config, channels: int, condition: Callable | None, side: int) -> MoTDiT:
    return MoTDiT(cfg.size, channels, side, 1, condition_tokens=cfg.condition_tokens, condition=condition,
                  block=cfg.block)


def schedule(cfg: Config) -> Schedule:
    return Schedule((0.0,), stages=cfg.stages, times=cfg.times)
