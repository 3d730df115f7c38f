"""What several systems share: a sampler, and the parts of those that see one image at a time, of any of K sizes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config
from model import MoTDiT, patchify, unpatchify
from schedule import Schedule


def sample(model: Callable, rng, y: Tensor | None, schedule: Schedule, shape: tuple[int, int, int], solve: Callable,
           **solver) -> Tensor:
    """Draws x1 (B, C, H, W) with C, H, W = shape: one solve in each segment.

    model(bands, t (B,), y) -> d bands / dt; rng: a source of Gaussians such as `data.batches.ImageRandom`; y (B, ...)
    or None; solve: `sample.solve`, which takes `solver`.
    """
    def velocity(bands, t):
        return model(bands, t.expand(len(bands[0])), y)

    bands, _ = solve(velocity, schedule.scaled(schedule.draw_noise(rng, shape)), schedule, **solver)
    return schedule.image(bands)


@dataclass(frozen=True)
class OneImage(Schedule):
    """A schedule whose state is a list of one image; `starts` has an entry for each scale, coarse to fine."""

    noise: str = "independent"                              # unit noise at each resolution
    full_range: bool = False                                # scale i trains in its window alone

    def noise_std(self, i: int) -> float:
        """Of white noise of the largest scale, pooled to scale i."""
        return 0.5 ** (self.num_scales - 1 - i)


class ScaleDiT(MoTDiT):
    """model.py's blocks with one set of weights; a pass has the tokens of one scale, known by the size of its image.

    own_patches   each scale has its own patch embedding and output layer, as with `patches`; otherwise all scales share
                  one of each, and the parameters are those of a plain DiT
    """

    def __init__(self, cfg: Config, channels: int, condition: Callable | None, side: int, own_patches: bool):
        super().__init__(cfg.size, channels, side, cfg.num_scales, experts="none", condition=condition,
                         condition_tokens=cfg.condition_tokens, block=cfg.block, patches=cfg.patches)
        if not own_patches and not cfg.patches:
            del self.patch_in[1:], self.patch_out[1:]

    def forward(self, bands: list[Tensor], t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """[x] -> [v]: one image x (B, C, H_i, W_i) of any scale i, at t (B,)."""
        (x,) = bands
        i = self.sides.index(x.shape[-1])
        p = self.patches[i]
        layer = i % len(self.patch_in)                      # scale i's, or 0: the one that all share
        tokens = self.patch_in[layer](patchify(x, p)) + getattr(self, f"positions_{i}")     # (B, N_i, D)
        (tokens,), c = self.trunk([tokens], self.time(t), y, first=i)
        return [unpatchify(self.patch_out[layer](tokens, c), p, *x.shape[-2:])]

    def tokens(self, stage: int) -> int:
        return self.num_tokens[stage]

    def stage_inputs(self, stage: int, batch: int, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor]:
        bands, t = super().stage_inputs(stage, batch, device)
        return bands[-1:], t
