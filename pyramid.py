"""The Laplacian pyramid: an image as a list of bands, coarse to fine (paper, Eq. 1).

    band 0     = D^(K-1) x                          a thumbnail
    band i     = D^(K-1-i) x  -  U D^(K-i) x        what the next coarser level cannot show, i = 1..K-1
    image x    = sum_i U^(K-1-i) band i             exact, up to rounding

D is 2x2 average pooling and U is nearest-neighbour doubling. Two facts of this pyramid are used:

* D U = identity. So D band_i = 0 for i > 0: in a fine band every 2x2 block has mean zero, three of four numbers are
  free, and the pyramid is an unnormalised Haar transform.
* D halves the standard deviation of white noise. The bands of n ~ N(0, I) have standard deviation
  0.5 and 0.866 for K = 2, and 0.25, 0.433 and 0.866 for K = 3.

The paper counts scales from the finest (k = 0); this code counts bands from the coarsest: i = K-1-k.
"""

import torch
import torch.nn.functional as F


def down(x: torch.Tensor) -> torch.Tensor:
    """D: 2x2 average pooling, (B, C, H, W) -> (B, C, H/2, W/2). H and W must be even."""
    return F.avg_pool2d(x, 2)


def up(x: torch.Tensor) -> torch.Tensor:
    """U: nearest-neighbour doubling, (B, C, H, W) -> (B, C, 2H, 2W)."""
    return x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


PYRAMIDS = {"haar": (down, up)}                             # name -> D, U; any D and U reconstruct exactly


def decompose(x: torch.Tensor, num_scales: int, pyramid: str = "haar") -> list[torch.Tensor]:
    """Splits x (B, C, H, W) into K = num_scales bands; band i is (B, C, H/2^(K-1-i), W/2^(K-1-i)) (Eq. 1).

    Raises ValueError when H or W is not divisible by 2^(K-1).
    """
    side = 2 ** (num_scales - 1)
    if num_scales < 1 or x.shape[-2] % side or x.shape[-1] % side:
        raise ValueError(f"a pyramid of {num_scales} scales needs a height and a width divisible by {side}, but the "
                         f"image is {x.shape[-2]} x {x.shape[-1]}")
    shrink, enlarge = PYRAMIDS[pyramid]
    bands = []
    for _ in range(num_scales - 1):
        coarse = shrink(x)                                  # (B, C, H/2, W/2)
        bands.append(x - enlarge(coarse))                   # (B, C, H, W)
        x = coarse
    return [x] + bands[::-1]


def reconstruct(bands: list[torch.Tensor], pyramid: str = "haar") -> torch.Tensor:
    """Sums the bands back up: the inverse of `decompose`. A prefix of the bands gives the smaller image."""
    _, enlarge = PYRAMIDS[pyramid]
    x = bands[0]
    for band in bands[1:]:
        x = enlarge(x) + band
    return x
