"""One image at a time, of any of K sizes: what Pyramidal Flow and EdifyImage have in common.

ScaleDiT is their network: model.py's blocks with one set of weights. A pass sees the tokens of its own scale alone; the
size of the image says which scale that is.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from model import MoTDiT, patchify, unpatchify
from pyramid import reconstruct
from schedule import stage_groups


@dataclass(frozen=True)
class OneImage:
    """A schedule whose state is a list of one image; `starts` has an entry for each scale, coarse to fine."""

    starts: tuple[float, ...] = (0.0, 0.5)
    image = staticmethod(reconstruct)                       # of a list of one

    @property
    def num_scales(self) -> int:
        return len(self.starts)

    def noise_std(self, i: int) -> float:
        """Of white noise of the largest scale, pooled to scale i."""
        return 0.5 ** (self.num_scales - 1 - i)


def loss_of(model: Callable, y: Tensor | None, u: Tensor, num_scales: int, rng, stages: str,
            state: Callable) -> tuple[Tensor, list]:
    """Mean squared error of d X / dt, each example at one scale, as schedule.loss returns it.

    u (B,) is uniform; state(i, rows, u) gives xt, its velocity and the time (B_i,) for some rows and their u.
    rng is a `data.BatchRandom`.
    """
    total, errors = 0.0, [(u[:0], u[:0])] * num_scales
    groups = stage_groups(rng, stages, num_scales)
    for i, rows, share in groups:
        if not len(u[rows]):
            continue
        xt, v, t = state(i, rows, u[rows])
        (v_pred,) = model([xt], t, None if y is None else y[rows])
        error = (v_pred.float() - v).square().mean(dim=(1, 2, 3))                   # (B_i,)
        total = total + error.sum() / share
        errors[i] = (t, error.detach())
    return total, errors[: groups[-1][0] + 1]


class ScaleDiT(MoTDiT):
    """size, in_channels, resolution (of the finest scale), num_classes, condition_tokens: as MoTDiT.

    own_patches   each scale has its own patch embedding and output layer; otherwise all scales share one of each, and
                  the parameters are those of a plain DiT
    """

    def __init__(self, size: str | tuple, in_channels: int, resolution: int, num_scales: int, num_classes: int,
                 condition_tokens: bool, own_patches: bool):
        super().__init__(size, in_channels, resolution, num_scales, num_classes, "none", "causal", condition_tokens)
        if not own_patches:
            del self.patch_in[1:], self.patch_out[1:]

    def forward(self, bands: list[Tensor], t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """[x] -> [v]: one image x (B, C, H_i, W_i) of any scale i, at t (B,)."""
        (x,), p = bands, self.patch_size
        i = self.num_tokens.index(x.shape[-1] * x.shape[-2] // p**2)
        mine = i % len(self.patch_in)
        tokens = self.patch_in[mine](patchify(x, p)) + getattr(self, f"positions_{i}")  # (B, N_i, D)
        (tokens,), c = self.trunk([tokens], self.time(t), y)
        return [unpatchify(self.patch_out[mine](tokens, c), p, *x.shape[-2:])]

    def tokens(self, stage: int) -> int:
        return self.num_tokens[stage]

    def attention_pairs(self, stage: int) -> int:
        return (self.num_tokens[stage] + self.num_cond) ** 2

    def flops(self, stage: int) -> int:
        return self.count_flops(self.tokens(stage), self.attention_pairs(stage), 1)
