"""Draws the Laplacian pyramid of one image: the bands, the image re-summed from each prefix of them, and the error."""

import numpy as np
import torch
from PIL import Image

import config
from config import UserError
from pyramid import PYRAMIDS, decompose, reconstruct
from run.pictures import pyplot


def read(file: str | None) -> torch.Tensor:
    """An image (1, 3, H, W) in [-1, 1]; without a file, a photograph that comes with scikit-learn."""
    from sklearn.datasets import load_sample_image

    try:
        pixels = np.array(Image.open(file).convert("RGB")) if file else load_sample_image("flower.jpg")
    except (OSError, ValueError, Image.DecompressionBombError) as problem:
        raise UserError(f"cannot read the image {file}: {problem}") from None
    return torch.tensor(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def main() -> None:
    parser = config.parser(__doc__, "python -m extras.split [IMAGE] [--num-scales K] [--pyramid NAME] [--out FILE]")
    parser.add_argument("image", nargs="?", help="an image file [a photograph that comes with scikit-learn]")
    parser.add_argument("--num-scales", type=int, default=3, help="number of bands K, 1 to 8 [3]")
    parser.add_argument("--pyramid", choices=PYRAMIDS, default="haar", help="how the image is split [haar]")
    parser.add_argument("--out", default="pyramid.png", help="the picture to write [pyramid.png]")
    args = parser.parse_args()
    if not 1 <= args.num_scales <= 8:
        raise UserError(f"--num-scales must be between 1 and 8, not {args.num_scales}")
    x, side = read(args.image), 2 ** (args.num_scales - 1)
    height, width = (length // side * side for length in x.shape[-2:])          # leaves out what does not divide
    if not height or not width:
        raise UserError(f"{args.image} is smaller than {side} pixels, too small for {args.num_scales} scales")
    x = x[..., :height, :width]
    bands = decompose(x, args.num_scales, args.pyramid)
    sums = [reconstruct(bands[: i + 1], args.pyramid) for i in range(args.num_scales)]
    figure, axes = pyplot().subplots(2, args.num_scales, squeeze=False, layout="constrained",
                                     figsize=(3.6 * args.num_scales, 7.4 * height / width + 0.6))
    for i, band in enumerate(bands):
        for axis, image in zip(axes[:, i], (2 * band if i else band, sums[i]), strict=True):    # around mid-grey
            axis.imshow((image[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_axis_off()
        axes[0, i].set_title(f"band {i}: {band.shape[-1]} x {band.shape[-2]}, std {band.std():.3f}")
        axes[1, i].set_title(f"bands 0..{i} summed" if i else "= band 0")
    try:
        figure.savefig(args.out, dpi=110)
    except (OSError, ValueError) as problem:
        raise UserError(f"cannot write {args.out}: {problem}") from None
    noise = decompose(torch.randn(1, 3, 512, 512), args.num_scales, args.pyramid)
    print(f"image      {width} x {height}, in bands {[tuple(band.shape[-2:]) for band in bands]}, coarse to fine\n"
          f"exactness  largest reconstruction error {(sums[-1] - x).abs().max():.1e} (pixels in [-1, 1])\n"
          f"noise      standard deviation of the bands of white noise {[round(n.std().item(), 3) for n in noise]}\n"
          f"picture    {args.out}")


if __name__ == "__main__":
    config.run(main)
