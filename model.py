"""MoT-DiT: a diffusion transformer with one set of weights per band and one attention over all of them.

Letters: B batch, C channels, H_i, W_i size of band i, p patch size, N_i tokens of band i, D hidden size,
nh heads, hd = D/nh, K bands.

A band is cut into patches; its tokens pass through its own weights (an "expert": Q, K, V, modulation, feed-forward);
they meet the other bands in one softmax attention per block, where BAND i READS BANDS 0..i. Coarse bands never read
finer ones, so any prefix of bands is a valid input and gives the same velocities as the full pyramid.
The mask is never built: the keys band i may read are a prefix of all keys, so one fused call per band does it.
"""

from collections.abc import Callable
from functools import partial
from math import isqrt, lcm

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import CHOICES, UserError, check_choice, parse_size
from data.conditions import Labels
from pyramid import reconstruct
from run.modern import SwiGLU, over_grid, rotary_angles, rotate

EXPERTS = ("full", "qkv", "none")
MASKS = ("causal", "none", "self")


def check_model(resolution: int, patches: list[int], experts: str, mask: str, block: str) -> None:
    """Raises UserError for a resolution that does not fit the patches of all bands, and for an unknown option."""
    for name, x, known in (("experts", experts, EXPERTS), ("mask", mask, MASKS), ("block", block, CHOICES["block"])):
        check_choice(name, x, known)
    step = lcm(*(p << k for k, p in enumerate(reversed(patches))))
    if resolution < 1 or resolution % step:
        raise UserError(f"a model input of {resolution} x {resolution} does not fit {len(patches)} scales with patches "
                        f"of {', '.join(map(str, dict.fromkeys(patches)))}: it must be divisible by {step}; the "
                        f"nearest that works is {max(step, round(resolution / step) * step)}")
    if (tokens := max((resolution // (p << k)) ** 2 for k, p in enumerate(reversed(patches)))) > 2**20:
        raise UserError(f"a model input of {resolution} x {resolution} with patches of {patches[-1]} has {tokens:,} "
                        "tokens, and this model takes a million: use larger patches")


def sincos_positions(hidden_size: int, grid: int) -> Tensor:
    """2-D sin-cos position of every token of a grid x grid band, (grid^2, D): half of D for rows, half for columns."""
    place, steps = (torch.arange(n, dtype=torch.float64, device="cpu") for n in (grid, hidden_size // 4))
    angle = place[:, None] * 10000 ** (-steps / (hidden_size // 4))                         # (grid, D/4)
    return over_grid(torch.cat([angle.sin(), angle.cos()], dim=1))                          # (grid^2, D)


def patchify(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C p^2) with N = H W / p^2, row by row."""
    b, c, h, w = x.shape
    return x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // p**2, c * p * p)


def unpatchify(x: Tensor, p: int, h: int, w: int) -> Tensor:
    """(B, N, C p^2) -> (B, C, H, W): the inverse of `patchify`."""
    b, _, d = x.shape
    c = d // p**2
    return x.view(b, h // p, w // p, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)               # x (1 + scale) + shift, in one pass


def join(x: list[Tensor]) -> Tensor:
    return torch.cat(x, dim=2) if len(x) > 1 else x[0]      # torch.cat copies even one tensor


def attention(q: list[Tensor], k: list[Tensor], v: list[Tensor], mask: str, num_cond: int) -> list[Tensor]:
    """One softmax attention over the tokens of all active bands; lists over bands of (B, nh, N_i, hd).

    causal: band i reads bands 0..i.   none: every band reads all.   self: band i reads itself and the num_cond
    condition tokens at the front of band 0; these read only each other, so that nothing crosses bands.
    """
    if mask == "causal":
        return [F.scaled_dot_product_attention(q[i], join(k[: i + 1]), join(v[: i + 1])) for i in range(len(q))]
    if mask == "none":
        out = F.scaled_dot_product_attention(*(torch.cat(x, dim=2) for x in (q, k, v)))
        return list(out.split([x.shape[2] for x in q], dim=2))
    cond_k, cond_v = k[0][:, :, :num_cond], v[0][:, :, :num_cond]
    out = [F.scaled_dot_product_attention(q[0][:, :, num_cond:], k[0], v[0])]
    out += [F.scaled_dot_product_attention(q[i], torch.cat([cond_k, k[i]], dim=2), torch.cat([cond_v, v[i]], dim=2))
            for i in range(1, len(q))]
    if num_cond:
        cond = F.scaled_dot_product_attention(q[0][:, :, :num_cond], cond_k, cond_v)
        out[0] = torch.cat([cond, out[0]], dim=2)
    return out


class TimestepEmbedder(nn.Module):
    """t in [0, 1] -> (B, D): 256 sinusoids of 100 t, then a two-layer network (as in DiT).

    # not in paper: DiT counts 1000 steps, so its fastest sinusoid turns 159 times in [0, 1]. A velocity field that can
    wiggle so fast costs an adaptive solver twice the NFE for images no better (LOG.md: 280 against 124 at 1e-5).
    """

    TIME_SCALE = 100

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        omega = 10000 ** (-torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angle = self.TIME_SCALE * t.float()[:, None] * omega                        # (B, 128)
        with torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False):  # float32, whatever the blocks have
            return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))           # (B, D)


class MoTBlock(nn.Module):
    """adaLN-Zero transformer block, mixture of transformers: weights per band, attention shared.

    experts="full": everything is per band. "qkv": only Q, K, V are. "none": all bands share all weights.
    # not in paper: its text says QKV, modulation and feed-forward; its parameter counts fit QKV alone. Both are here.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_scales: int, experts: str, mask: str, block: str):
        super().__init__()
        self.num_heads, self.mask, self.modern = num_heads, mask, block == "modern"
        full = num_scales if experts == "full" else 1
        qkv = num_scales if experts != "none" else 1
        d = hidden_size
        self.norm = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.ModuleList(nn.Linear(d, 6 * d) for _ in range(full))
        self.qkv = nn.ModuleList(nn.Linear(d, 3 * d) for _ in range(qkv))
        self.proj = nn.ModuleList(nn.Linear(d, d) for _ in range(full))
        self.mlp = nn.ModuleList(
            SwiGLU(d) if self.modern else
            nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d)) for _ in range(full))
        if self.modern:
            self.qk_norm = nn.ParameterList(torch.ones(2, d // num_heads) for _ in range(qkv))

    def forward(self, xs: list[Tensor], c: Tensor, num_cond: int, angles: list[Tensor]) -> list[Tensor]:
        """xs: a list over the active bands of (B, N_i, D); c: (B, D), after its SiLU; angles: (N_i, hd/2)."""
        own = [i % len(self.proj) for i in range(len(xs))]      # band i's expert, or 0: the one that all bands share
        parts = [m(c)[:, None].chunk(6, dim=-1) for m in self.modulation[: len(xs)]]    # 6 x (B, 1, D) each
        q, k, v = [], [], []
        for i, x in enumerate(xs):
            shift, scale = parts[own[i]][:2]
            qkv = self.qkv[i % len(self.qkv)](modulate(self.norm(x), shift, scale))     # (B, N_i, 3D)
            for column, part in zip((q, k, v), qkv.chunk(3, dim=2), strict=True):
                column.append(part.unflatten(2, (self.num_heads, -1)).transpose(1, 2))  # (B, nh, N_i, hd)
            if self.modern:
                q[i], k[i] = (rotate(F.rms_norm(part, gain.shape, gain.to(part), eps=1e-6), angles[i])
                              for part, gain in zip((q[i], k[i]), self.qk_norm[i % len(self.qkv)], strict=True))
        out = []
        for i, a in enumerate(attention(q, k, v, self.mask, num_cond)):             # (B, nh, N_i, hd)
            _, _, gate, shift2, scale2, gate2 = parts[own[i]]
            x = xs[i] + gate * self.proj[own[i]](a.transpose(1, 2).flatten(2))      # (B, N_i, D)
            out.append(x + gate2 * self.mlp[own[i]](modulate(self.norm(x), shift2, scale2)))
        return out


class FinalLayer(nn.Module):
    """adaLN and a linear map from tokens to patches."""

    def __init__(self, hidden_size: int, patch_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, patch_dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))                    # (B, N_i, C p^2)


class MoTDiT(nn.Module):
    """The velocity field of all bands.

    size           a table name ("S/2", "B/2", "L/2", "XL/2", ...) or (hidden_size, depth, num_heads, patch_size)
    in_channels    C, of images or latents
    resolution     H = W of the finest band; that of each band is divisible by its patch size
    num_scales     K; 1 is a plain DiT
    num_classes    shorthand for a condition on so many labels; 0 is unconditional
    experts        what is per band: full | qkv | none
    mask           which bands a band reads: causal | none | self
    condition_tokens   also put the time and condition embeddings in front of band 0, where every band reads them
    condition      hidden_size -> Labels or Vectors, in place of num_classes
    block          dit, or modern: RMS norm of queries and keys, rotary positions, SwiGLU.  # not in paper
    concat_coarse  tokens of band i > 0 also see the coarser bands, summed by `pyramid`.  # not in paper
    patches        patch size of each band; (): that of `size`.  # not in paper

    Raises UserError for a size, a resolution or an option that does not work. The untrained model returns zeros.
    """

    def __init__(self, size: str | tuple = "B/2", in_channels: int = 4, resolution: int = 32, num_scales: int = 2,
                 num_classes: int = 0, experts: str = "full", mask: str = "causal", condition_tokens: bool = True,
                 condition: Callable[[int], nn.Module] | None = None, block: str = "dit", concat_coarse: bool = False,
                 pyramid: str = "haar", patches: tuple[int, ...] = ()):
        super().__init__()
        d, depth, num_heads, p = parse_size(size)
        self.patches = [int(p) for p in patches] or [p] * num_scales
        check_model(resolution, self.patches, experts, mask, block)
        if num_classes and condition is None:
            condition = partial(Labels, [str(label) for label in range(num_classes)])
        self.hidden_size, self.head_dim, self.depth = d, d // num_heads, depth
        self.in_channels, self.resolution, self.num_scales = in_channels, resolution, num_scales
        self.pyramid = pyramid if concat_coarse else None
        self.recompute = False                              # in backward, block by block: less memory, more time

        self.sides = [resolution >> k for k in reversed(range(num_scales))]         # H_i = W_i
        self.num_tokens = [(side // p) ** 2 for side, p in zip(self.sides, self.patches, strict=True)]      # N_i
        self.compute_positions()
        self.patch_in = nn.ModuleList(
            nn.Linear((1 + (concat_coarse and i > 0)) * in_channels * p**2, d) for i, p in enumerate(self.patches))
        self.time = TimestepEmbedder(d)
        self.condition = condition(d) if condition else None
        self.num_cond = (1 + (self.condition is not None)) if condition_tokens else 0
        self.blocks = nn.ModuleList(MoTBlock(d, num_heads, num_scales, experts, mask, block) for _ in range(depth))
        self.patch_out = nn.ModuleList(FinalLayer(d, in_channels * p**2) for p in self.patches)
        self.initialize()

    def compute_positions(self) -> None:
        for i, count in enumerate(self.num_tokens):         # not stored with the weights
            grid, finest = isqrt(count), isqrt(self.num_tokens[-1])
            self.register_buffer(f"positions_{i}", sincos_positions(self.hidden_size, grid), persistent=False)
            self.register_buffer(f"angles_{i}", rotary_angles(self.head_dim, grid, finest), persistent=False)

    def initialize(self) -> None:
        """As DiT: Xavier everywhere, small embeddings, zero modulation and output: blocks start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time.mlp[0], self.time.mlp[2], getattr(self.condition, "table", None)):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)
        zeros = [m for block in self.blocks for m in block.modulation]
        zeros += [m for final in self.patch_out for m in (final.modulation, final.linear)]
        for linear in zeros:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, bands: list[Tensor], t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """Velocities of a prefix of bands, each (B, C, H_i, W_i), at times t (B,) in [0, 1], for conditions y (B, ...).

        y is None for an unconditional model, and means the null condition for a conditional one.
        """
        inputs = list(bands)
        for i, x in enumerate(bands[1:] if self.pyramid else (), 1):
            coarser = reconstruct([*bands[:i], torch.zeros_like(x)], self.pyramid)
            inputs[i] = torch.cat([x, coarser], dim=1)                              # (B, 2C, H_i, W_i)
        xs = [self.patch_in[i](patchify(x, self.patches[i])) + getattr(self, f"positions_{i}")      # (B, N_i, D)
              for i, x in enumerate(inputs)]
        xs, c = self.trunk(xs, self.time(t), y)
        return [unpatchify(self.patch_out[i](x, c), self.patches[i], *band.shape[-2:])              # (B, C, H_i, W_i)
                for i, (x, band) in enumerate(zip(xs, bands, strict=True))]

    def trunk(self, xs: list[Tensor], time: Tensor, y: Tensor | None, first: int = 0) -> tuple[list[Tensor], Tensor]:
        """Condition tokens and all blocks. xs: from band `first` on (B, N_i, D); time (B, D). Returns xs, c (B, D)."""
        angles = [getattr(self, f"angles_{first + i}") for i in range(len(xs))]
        b, c, tokens = len(time), time, [time[:, None]]
        if self.condition is not None:
            y = self.condition.null(self.condition.draw(b).to(c.device)) if y is None else y
            embedding = self.condition(y)                                           # (B, D)
            tokens.append(embedding[:, None])
            c = c + embedding
        c = F.silu(c)
        if self.num_cond:
            xs[0] = torch.cat([*tokens, xs[0]], dim=1)                              # (B, num_cond + N_0, D)
            angles = [F.pad(angles[0], (0, 0, self.num_cond, 0)), *angles[1:]]      # condition tokens are not turned
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                xs = checkpoint(block, xs, c, self.num_cond, angles, use_reentrant=False)
            else:
                xs = block(xs, c, self.num_cond, angles)
        xs[0] = xs[0][:, self.num_cond :]
        return xs, c

    def tokens(self, stage: int) -> int:
        """Image tokens of one pass of a stage."""
        return sum(self.num_tokens[: stage + 1])

    def stage_inputs(self, stage: int, batch: int, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor]:
        """Random bands 0..stage and times (B,), as one pass of a stage takes them: for timing and counting."""
        bands = [torch.randn(batch, self.in_channels, side, side, device=device) for side in self.sides[: stage + 1]]
        return bands, torch.rand(batch, device=device)
