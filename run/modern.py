"""Parts of the block that users of diffusion transformers have moved to since DiT (Yao et al. 2025, LightningDiT).

# not in paper: it keeps DiT's block. What these parts are worth is in docs/results.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def over_grid(axis: Tensor) -> Tensor:
    """Features (grid, n) of one axis -> (grid^2, 2n) of every token of a square: of its row, then of its column."""
    if torch.get_default_device().type == "meta":           # shapes are all that is asked for
        axis = axis.to("meta")
    grid = len(axis)
    rows, columns = axis[:, None].expand(grid, grid, -1), axis[None].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).float()


def rotary_angles(head_dim: int, grid: int, finest: int) -> Tensor:
    """2-D rotary angles of every token of a grid x grid band, (grid^2, hd/2): half for rows, half for columns.

    The place of a token is the middle of what it covers in the finest grid, so bands agree on where things are.
    """
    place, steps = (torch.arange(n, dtype=torch.float64, device="cpu") for n in (grid, head_dim // 4))
    return over_grid((place[:, None] + 0.5) * (finest / grid) * 100 ** (-steps / (head_dim // 4)))  # of (grid, hd/4)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns pairs of the last dimension of x (B, nh, N, hd) by the angles (N, hd/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class SwiGLU(nn.Module):
    """Shazeer (2020), with as many FLOPs as DiT's feed-forward network."""

    def __init__(self, d: int):
        super().__init__()
        inner = -(-d // 3) * 8                              # 8/3 d, rounded up to a multiple of 8
        self.gate, self.up, self.down = nn.Linear(d, inner), nn.Linear(d, inner), nn.Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
