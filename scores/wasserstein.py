"""Sliced Wasserstein distance of every level of the pyramid (Karras et al. 2018): which sizes of detail differ."""

import numpy as np
import torch
import torch.nn.functional as F

from pyramid import decompose


def sliced_wasserstein(real: np.ndarray, fake: np.ndarray, patches: int = 32, directions: int = 512,
                       seed: int = 0) -> dict[int, float]:
    """Distance of 7 x 7 patches at each pyramid level, x 1000, by the side of the level (Karras et al. 2018, App. B).

    real, fake: images uint8 (N, H, W, C), of which the size of the smaller set is taken. The levels are those of
    pyramid.py, from the full size down to 16 pixels; each set is normalised per channel; {} below 16 pixels.
    Karras et al. take 128 patches of 16,384 images; a few hundred images leave a floor, printed as "real".
    """
    side, num_scales, result = real.shape[1], 1, {}
    if side < 16:
        return result
    while side % 2**num_scales == 0 and side >> num_scales >= 16:
        num_scales += 1
    count, generator = min(len(real), len(fake)), torch.Generator().manual_seed(seed)
    for level in range(num_scales):
        a, b = (descriptors(images[:count], num_scales, level, patches, generator) for images in (real, fake))
        total = 0.0
        for _ in range(directions // 128):
            lines = F.normalize(torch.randn(a.shape[1], 128, generator=generator), dim=0)
            total += ((a @ lines).sort(dim=0).values - (b @ lines).sort(dim=0).values).abs().mean().item()
        result[side >> (num_scales - 1 - level)] = 1000 * total / (directions // 128)
    return result


def descriptors(images: np.ndarray, num_scales: int, level: int, patches: int,
                generator: torch.Generator) -> torch.Tensor:
    """Random 7 x 7 patches of one band of each image, (N patches, C 49), of mean 0 and variance 1 in each channel."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    band = decompose(x, num_scales)[level]                                          # (N, C, H_i, W_i)
    top, left = torch.randint(0, band.shape[-1] - 6, (2, len(images), patches), generator=generator)
    rows, columns = top[..., None] + torch.arange(7), left[..., None] + torch.arange(7)     # (N, patches, 7)
    picked = band[torch.arange(len(images))[:, None, None, None], :, rows[..., :, None], columns[..., None, :]]
    picked = picked.flatten(0, 1).permute(0, 3, 1, 2)                               # (N patches, C, 7, 7)
    picked = picked - picked.mean(dim=(0, 2, 3), keepdim=True)
    return (picked / picked.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-8)).flatten(1)
