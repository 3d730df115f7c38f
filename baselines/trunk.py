"""One DiT for one image at a time, of any of K sizes: the network of Pyramidal Flow and EdifyImage.

The blocks are model.py's with one set of weights. A pass sees the tokens of its own scale alone; the size of the image
says which scale that is.
"""

import torch

from model import MoTDiT, patchify, unpatchify


class ScaleDiT(MoTDiT):
    """size, in_channels, resolution (of the finest scale), num_classes, condition_tokens: as MoTDiT.

    own_patches   each scale has its own patch embedding and output layer; otherwise all scales share one of each, and
                  the parameters are those of a plain DiT
    """

    def __init__(self, size, in_channels, resolution, num_scales, num_classes, condition_tokens, own_patches: bool):
        super().__init__(size, in_channels, resolution, num_scales, num_classes, "none", "causal", condition_tokens)
        if not own_patches:
            del self.patch_in[1:], self.patch_out[1:]

    def forward(self, bands: list, t: torch.Tensor, y: torch.Tensor | None = None) -> list:
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
