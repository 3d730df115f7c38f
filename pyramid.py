"""The Laplacian pyramid: an image as a list of bands, coarse to fine (paper, Eq. 1).

    band 0     = D^(K-1) x                          a thumbnail
    band i     = D^(K-1-i) x  -  U D^(K-i) x        what the next coarser level cannot show, i = 1..K-1
    image x    = sum_i U^(K-1-i) band i             exact, up to rounding

D is 2x2 average pooling and U is nearest-neighbour doubling. Two facts carry the whole method:

* D U = identity. So D band_i = 0 for i > 0: in a fine band every 2x2 block has mean zero, three of four numbers are
  free, and the pyramid is an unnormalised Haar transform.
* D halves the standard deviation of white noise. The bands of n ~ N(0, I) have standard deviation
  0.5 and 0.866 for K = 2, and 0.25, 0.433 and 0.866 for K = 3.

The paper counts scales from the finest (k = 0); this code counts bands from the coarsest: i = K-1-k.

    python pyramid.py [IMAGE]     draws the bands of an image and the exact reconstruction
"""

import torch
import torch.nn.functional as F


def down(x: torch.Tensor) -> torch.Tensor:
    """D: 2x2 average pooling, (B, C, H, W) -> (B, C, H/2, W/2). H and W must be even."""
    return F.avg_pool2d(x, 2)


def up(x: torch.Tensor) -> torch.Tensor:
    """U: nearest-neighbour doubling, (B, C, H, W) -> (B, C, 2H, 2W)."""
    return x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def decompose(x: torch.Tensor, num_scales: int) -> list[torch.Tensor]:
    """Splits x (B, C, H, W) into K = num_scales bands; band i is (B, C, H/2^(K-1-i), W/2^(K-1-i)) (Eq. 1).

    Raises ValueError when H or W is not divisible by 2^(K-1).
    """
    side = 2 ** (num_scales - 1)
    if num_scales < 1 or x.shape[-2] % side or x.shape[-1] % side:
        raise ValueError(
            f"a pyramid of {num_scales} scales needs a height and a width divisible by {side}, "
            f"but the image is {x.shape[-2]} x {x.shape[-1]}"
        )
    bands = []
    for _ in range(num_scales - 1):
        coarse = down(x)                                    # (B, C, H/2, W/2)
        bands.append(x - up(coarse))                        # (B, C, H, W)
        x = coarse
    return [x] + bands[::-1]


def reconstruct(bands: list[torch.Tensor]) -> torch.Tensor:
    """Sums the bands back up: the inverse of `decompose`. A prefix of the bands gives the smaller image."""
    x = bands[0]
    for band in bands[1:]:
        x = up(x) + band
    return x


def main() -> None:
    """Draws the pyramid of one image: the bands, the image re-summed from each prefix of them, and the error."""
    import argparse

    import numpy as np
    from PIL import Image

    from pictures import pyplot

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("image", nargs="?", help="an image file (default: a photograph that comes with scikit-learn)")
    parser.add_argument("--num-scales", type=int, default=3, help="number of bands K (default: 3)")
    parser.add_argument("--out", default="pyramid.png", help="the picture to write (default: pyramid.png)")
    args = parser.parse_args()
    if not 1 <= args.num_scales <= 8:
        raise SystemExit(f"error: --num-scales must be between 1 and 8, not {args.num_scales}")
    try:
        if args.image is None:
            from sklearn.datasets import load_sample_image

            picture = Image.fromarray(load_sample_image("flower.jpg"))
        else:
            picture = Image.open(args.image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as problem:
        raise SystemExit(f"error: cannot read the image {args.image}: {problem}") from None

    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1    # (1, 3, H, W) in [-1, 1]
    side = 2 ** (args.num_scales - 1)
    height, width = x.shape[-2] // side * side, x.shape[-1] // side * side
    if not height or not width:
        raise SystemExit(f"error: {args.image} is smaller than {side} pixels, too small for {args.num_scales} scales")
    x = x[..., :height, :width]                             # drop the few rows and columns that do not divide
    bands = decompose(x, args.num_scales)
    error = (reconstruct(bands) - x).abs().max().item()

    figure, axes = pyplot().subplots(2, args.num_scales, squeeze=False, layout="constrained",
                                figsize=(3.6 * args.num_scales, 7.4 * height / width + 0.6))
    for i, band in enumerate(bands):
        # a fine band is a small signed residual around zero: show it around mid-grey, contrast times two
        shown = band if i == 0 else 2 * band
        prefix = reconstruct(bands[: i + 1])
        for axis, image in zip(axes[:, i], (shown, prefix), strict=True):
            axis.imshow((image[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_axis_off()
        axes[0, i].set_title(f"band {i}: {band.shape[-1]} x {band.shape[-2]}, std {band.std():.3f}")
        axes[1, i].set_title("= band 0" if i == 0 else f"bands 0..{i} summed")
    figure.suptitle(f"reconstruction error: at most {error:.1e} (pixels in [-1, 1])")
    try:
        figure.savefig(args.out, dpi=110)
    except (OSError, ValueError) as problem:
        raise SystemExit(f"error: cannot write {args.out}: {problem}") from None
    noise = [round(band.std().item(), 3) for band in decompose(torch.randn(1, 3, 512, 512), args.num_scales)]
    print(f"image      {width} x {height} -> bands {[tuple(band.shape[-2:]) for band in bands]}, coarse to fine")
    print(f"exactness  largest reconstruction error {error:.1e}")
    print(f"noise      the bands of unit white noise have standard deviation {noise}")
    print(f"picture    {args.out}")


if __name__ == "__main__":
    main()
