import pytest
import torch
import torch.nn.functional as F

from config import SIZES, UserError, parse_size
from conftest import random_bands, random_model
from model import EXPERTS, MASKS, MoTDiT, attention, patchify, sincos_positions, unpatchify
from pyramid import up
from run.memory import forward_flops, parameters
from run.modern import rotary_angles, rotate

READS = {"causal": lambda i, j: j <= i, "none": lambda i, j: True, "self": lambda i, j: i == j}     # does i read j?
TIMES, LABELS = torch.tensor([0.7, 0.9]), torch.tensor([0, 3])


def masked_attention(q, k, v, mask, num_cond):
    """The readable reference: one softmax over all tokens with an explicit boolean mask, in float64."""
    sizes = [x.shape[2] for x in q]
    band = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    condition = torch.arange(len(band)) < num_cond
    q, k, v = (torch.cat(x, dim=2).double() for x in (q, k, v))
    reads = {"none": torch.ones(len(band), len(band), dtype=torch.bool),
             "causal": band[:, None] >= band[None, :],
             "self": ((band[:, None] == band[None, :]) & ~condition[:, None]) | condition[None, :]}[mask]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~reads, -torch.inf).softmax(dim=-1) @ v).split(sizes, dim=2)


@pytest.mark.parametrize("num_cond", [0, 2])
@pytest.mark.parametrize("mask", READS)
@pytest.mark.parametrize("sizes", [[6], [6, 16], [6, 16, 64]])
def test_attention_equals_the_masked_softmax(mask, sizes, num_cond):
    q, k, v = ([torch.randn(2, 3, n, 8) for n in sizes] for _ in range(3))
    for ours, reference in zip(attention(q, k, v, mask, num_cond), masked_attention(q, k, v, mask, num_cond),
                               strict=True):
        assert torch.allclose(ours.double(), reference, atol=1e-5)


@pytest.mark.parametrize("condition_tokens", [True, False])
@pytest.mark.parametrize("mask", READS)
def test_changing_a_band_moves_exactly_the_bands_the_mask_allows(mask, condition_tokens):
    model = random_model(mask=mask, condition_tokens=condition_tokens)
    bands = random_bands(model)
    before = model(bands, TIMES, LABELS)
    for j in range(3):
        changed = [b + torch.randn_like(b) if i == j else b for i, b in enumerate(bands)]
        for i, (a, b) in enumerate(zip(model(changed, TIMES, LABELS), before, strict=True)):
            assert torch.equal(a, b) != READS[mask](i, j), (i, j)


@pytest.mark.parametrize("experts", EXPERTS)
def test_a_prefix_of_bands_gives_the_same_coarse_velocities(experts):
    """Under the causal mask; that of "self" is a prefix as well."""
    for options in (dict(), dict(mask="self"), dict(block="modern", concat_coarse=True)):
        model = random_model(experts=experts, **options)
        bands = random_bands(model)
        whole = model(bands, TIMES, LABELS)
        for count in (1, 2):
            for a, b in zip(model(bands[:count], TIMES, LABELS), whole, strict=False):
                assert torch.allclose(a, b, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# every mask


@pytest.mark.parametrize("mask", MASKS)
def test_any_prefix_of_bands_is_a_valid_input(mask):
    model = random_model(mask=mask)
    bands = random_bands(model)
    for count in (1, 2, 3):
        out = model(bands[:count], TIMES, LABELS)
        assert [v.shape for v in out] == [band.shape for band in bands[:count]]
        assert all(v.isfinite().all() and v.abs().max() > 1e-3 for v in out)


@pytest.mark.parametrize("mask", MASKS)
def test_time_and_label_reach_every_band(mask):
    model = random_model(mask=mask)
    bands = random_bands(model)
    before = model(bands, TIMES, LABELS)
    for after in (model(bands, TIMES + 0.05, LABELS), model(bands, TIMES, LABELS + 1)):
        for a, b in zip(after, before, strict=True):
            assert (a - b).abs().max() > 1e-3


def test_position_reaches_every_band():
    """Without positions the tokens are a set: moving all of them by a patch would only move the output."""
    model = random_model()
    bands = random_bands(model)

    def moves(i):
        shifted = [b.roll(2, -1) if i == j else b for j, b in enumerate(bands)]
        return (model(shifted, TIMES, LABELS)[i] - model(bands, TIMES, LABELS)[i].roll(2, -1)).abs().max().item()

    assert all(moves(i) > 1e-3 for i in range(3))
    for i in range(3):
        getattr(model, f"positions_{i}").zero_()
    assert all(moves(i) < 1e-4 for i in range(3))


@pytest.mark.parametrize("mask", MASKS)
def test_examples_of_a_batch_do_not_mix(mask):
    model = random_model(mask=mask)
    bands, t, y = random_bands(model, batch=3), torch.tensor([0.7, 0.8, 0.9]), torch.tensor([0, 3, 5])
    whole = model(bands, t, y)
    alone = model([b[1:2] for b in bands], t[1:2], y[1:2])
    assert all(torch.allclose(a, b[1:2], atol=1e-5) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("num_classes", [0, 10])
def test_the_untrained_model_returns_zeros(mask, num_classes):
    model = MoTDiT((48, 2, 3, 2), 3, 16, 3, num_classes, mask=mask)
    for v, band in zip(model(random_bands(model), TIMES), random_bands(model), strict=True):
        assert v.shape == band.shape and torch.equal(v, torch.zeros_like(v))


def test_no_label_means_the_null_label():
    model = random_model()
    bands = random_bands(model)
    null = model(bands, TIMES, torch.tensor([5, 5]))
    assert all(torch.equal(a, b) for a, b in zip(model(bands, TIMES), null, strict=True))


def test_one_scale_is_a_plain_dit():
    """A DiT block written from its definition, with the weights of ours, gives the same output."""
    model = random_model(num_scales=1, condition_tokens=False)
    x = random_bands(model)[0]
    c = F.silu(model.time(TIMES) + model.condition(LABELS))
    h = model.patch_in[0](patchify(x, 2)) + model.positions_0
    for block in model.blocks:
        s1, c1, g1, s2, c2, g2 = (p[:, None] for p in block.modulation[0](c).chunk(6, dim=1))
        n = F.layer_norm(h, (48,), eps=1e-6) * (1 + c1) + s1
        q, k, v = (p.unflatten(-1, (3, 16)).transpose(1, 2) for p in block.qkv[0](n).chunk(3, dim=-1))
        a = ((q @ k.transpose(-1, -2) / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = h + g1 * block.proj[0](a)
        h = h + g2 * block.mlp[0](F.layer_norm(h, (48,), eps=1e-6) * (1 + c2) + s2)
    expected = unpatchify(model.patch_out[0](h, c), 2, 16, 16)
    assert torch.allclose(model([x], TIMES, LABELS)[0], expected, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# not in paper: the modern block, and the coarser image beside a finer band


def test_each_band_has_its_own_gains_of_queries_and_keys():
    model, t = random_model(block="modern"), torch.rand(2)
    bands = random_bands(model)
    with torch.no_grad():
        before = model(bands, t)
        for block in model.blocks:
            block.qk_norm[2].mul_(-3)[0].mul_(2)
        after = model(bands, t)
    assert [torch.allclose(a, b, atol=1e-6) for a, b in zip(before, after, strict=True)] == [True, True, False]


def test_rotary_attention_sees_only_how_far_tokens_are_apart():
    """Products of turned queries and keys depend on the offset of their places, also between bands."""
    coarse, fine = rotary_angles(16, 4, 8), rotary_angles(16, 8, 8)                 # a coarse token covers 2 x 2 fine
    torch.manual_seed(0)
    q, k = torch.randn(2, 16)
    product = [rotate(q.expand(1, 1, len(a), 16), a)[0, 0] @ rotate(k.expand(1, 1, 64, 16), fine)[0, 0].T
               for a in (coarse, fine)]
    at = torch.arange(64).view(8, 8)
    for a, grid, step in ((product[0], 4, 2), (product[1], 8, 1)):
        a = a.view(grid, grid, 8, 8)                                                # by places of query and key
        assert torch.allclose(a[1, 1, : 8 - step, : 8 - step], a[2, 2, step:, step:], atol=1e-4)
        assert not torch.allclose(a[1, 1], a[2, 2], atol=1e-2)
    assert at[2, 2] == 18 and torch.allclose(fine[[18, 27]].mean(0), coarse[5], atol=1e-6)      # the middle of its 4


def test_the_modern_block_is_the_textbook_formula():
    """One band, no condition tokens, written out; queries and keys have a mean square of 1 whatever their size."""
    model = random_model(num_scales=1, condition_tokens=False, block="modern")
    x, t, y = torch.randn(2, 2, 16, 16), torch.tensor([0.3, 0.8]), torch.tensor([1, 4])
    h = model.patch_in[0](patchify(x, 2)) + model.positions_0
    c = F.silu(model.time(t) + model.condition(y))
    place = torch.arange(8) + 0.5
    angle = torch.cat([place.repeat_interleave(8)[:, None], place.repeat(8)[:, None]], dim=1)[..., None] * (
        100 ** (-torch.arange(4) / 4))                                              # (64, rows and columns, hd / 4)
    turn = torch.polar(torch.ones(64, 8), angle.flatten(1))
    for block in model.blocks:
        s1, c1, g1, s2, c2, g2 = block.modulation[0](c)[:, None].chunk(6, dim=-1)
        qkv = block.qkv[0](F.layer_norm(h, (48,), eps=1e-6) * (1 + c1) + s1)
        q, k, v = qkv.view(2, 64, 3, 3, 16).permute(2, 0, 3, 1, 4)
        q, k = (part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
                for part, gain in zip((q, k), block.qk_norm[0], strict=True))
        q, k = (torch.complex(part[..., :8], part[..., 8:]) * turn for part in (q, k))
        scores = (q[..., :, None, :] * k[..., None, :, :].conj()).real.sum(-1) / 4
        a = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = h + g1 * block.proj[0](a)
        z, mlp = F.layer_norm(h, (48,), eps=1e-6) * (1 + c2) + s2, block.mlp[0]
        h = h + g2 * mlp.down(F.silu(mlp.gate(z)) * mlp.up(z))
    expected = unpatchify(model.patch_out[0](h, c), 2, 16, 16)
    assert torch.allclose(model([x], t, y)[0], expected, atol=1e-4)


def test_the_modern_block_costs_what_dits_costs():
    """FLOPs are equal up to the rounding of SwiGLU's width, which the paper's sizes do not need."""
    for size in ("384,1,6,2", "1152,1,16,2"):               # a block of S/2 and of XL/2
        dit, modern = (forward_flops(meta(size, num_scales=2, block=block)) for block in ("dit", "modern"))
        assert modern == dit, size


def test_a_finer_band_sees_the_coarser_image_at_its_place():
    """Tokens of band i read patches of band i, and of the sum of the coarser bands, enlarged."""
    model, plain = random_model(concat_coarse=True), random_model()
    bands = random_bands(model)
    images = [bands[0], up(bands[0]) + bands[1]]            # what bands 0..i sum to
    seen = {}
    for i, layer in enumerate(model.patch_in):
        layer.register_forward_hook(lambda _, inputs, out, i=i: seen.update({i: out - model.patch_in[i].bias}))
    model(bands, TIMES, LABELS)
    assert torch.allclose(seen[0], patchify(bands[0], 2) @ model.patch_in[0].weight.T, atol=1e-5)
    for i in (1, 2):                                        # the channels of a patch come first: (C, p, p)
        expected = torch.cat([bands[i], up(images[i - 1])], dim=1)
        assert torch.allclose(seen[i], patchify(expected, 2) @ model.patch_in[i].weight.T, atol=1e-5)
    assert plain.patch_in[1].weight.shape[1] * 2 == model.patch_in[1].weight.shape[1]


def test_each_band_has_its_own_patches():
    """Bands of 4, 8 and 16 pixels in patches of 1, 4 and 2: 16, 4 and 64 tokens."""
    model = random_model(patches=(1, 4, 2), block="modern")
    bands, seen = random_bands(model), {}
    for i, layer in enumerate(model.patch_in):
        layer.register_forward_hook(lambda _, inputs, out, i=i: seen.update({i: inputs[0]}))
    whole = model(bands, TIMES, LABELS)
    assert model.num_tokens == [16, 4, 64] and [v.shape for v in whole] == [band.shape for band in bands]
    assert all(torch.equal(seen[i], patchify(bands[i], p)) for i, p in enumerate((1, 4, 2)))
    for count in (1, 2):                                    # coarse bands are as they were
        for a, b in zip(model(bands[:count], TIMES, LABELS), whole, strict=False):
            assert torch.allclose(a, b, atol=1e-6)
    same, plain = random_model(patches=(2, 2, 2)), random_model()
    for a, b in zip(same(random_bands(same), TIMES, LABELS), plain(random_bands(plain), TIMES, LABELS), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="3 scales with patches of 8, 2: it must be divisible by 32; .* works is 32$"):
        random_model(patches=(8, 2, 2))


def test_patches_are_cut_and_joined():
    x = torch.arange(2 * 3 * 8 * 4.0).view(2, 3, 8, 4)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 8, 12)
    assert torch.equal(tokens[0, 1].view(3, 2, 2), x[0, :, 0:2, 2:4])           # second token: second patch of row one
    assert torch.equal(unpatchify(tokens, 2, 8, 4), x)


def test_positions_are_those_of_dit():
    positions = sincos_positions(16, 8).view(8, 8, 16)
    for row, column in ((0, 0), (3, 5), (7, 1)):
        for half, place in zip(positions[row, column].split(8), (row, column), strict=True):
            angle = place / 10000 ** (torch.arange(4) / 4)
            assert torch.allclose(half, torch.cat([angle.sin(), angle.cos()]), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# parameters and FLOPs, in closed form


def meta(*arguments, **settings) -> MoTDiT:
    with torch.device("meta"):
        return MoTDiT(*arguments, **settings).to("meta")    # its positions too


def count_parameters(model: MoTDiT, experts: str, num_classes: int) -> int:
    d, k, patch = model.hidden_size, model.num_scales, model.in_channels * model.patches[0] ** 2
    full, qkv = (k if experts == "full" else 1), (k if experts != "none" else 1)
    block = qkv * (3 * d * d + 3 * d) + full * (15 * d * d + 12 * d)            # 15 = modulation 6, proj 1, mlp 8
    embed = (256 * d + d) + (d * d + d) + ((num_classes + 1) * d if num_classes else 0)
    bands = k * ((patch * d + d) + (2 * d * d + 2 * d) + (d * patch + patch))
    return model.depth * block + embed + bands


def attention_pairs(model: MoTDiT, mask: str, stage: int) -> int:
    """Query-key pairs of one attention with bands 0..stage, condition tokens included."""
    n = [count + (model.num_cond if i == 0 else 0) for i, count in enumerate(model.num_tokens[: stage + 1])]
    if mask == "none":
        return sum(n) ** 2
    if mask == "causal":
        return sum(n_i * sum(n[: i + 1]) for i, n_i in enumerate(n))
    return sum(n_i * (model.num_cond + n_i) for n_i in model.num_tokens[: stage + 1]) + model.num_cond**2


def count_flops(model: MoTDiT, experts: str, mask: str, stage: int) -> int:
    """Matrix products of one forward pass of one image, two FLOPs for each multiply-add."""
    d, patch, bands = model.hidden_size, model.in_channels * model.patches[0] ** 2, stage + 1
    tokens, full = sum(model.num_tokens[:bands]), bands if experts == "full" else 1
    block = (tokens + model.num_cond) * 12 * d * d + 2 * attention_pairs(model, mask, stage) * d + full * 6 * d * d
    return 2 * (model.depth * block + tokens * 2 * patch * d + bands * 2 * d * d + (256 * d + d * d))


@pytest.mark.parametrize("size, million", [("S/2", 33), ("B/2", 130), ("L/2", 457), ("XL/2", 674)])
def test_parameters_of_one_scale_are_those_of_dit(size, million):
    model = meta(size, num_scales=1, num_classes=1000)
    # DiT also predicts a variance: 4 more output channels, (D + 1) * 16 parameters that velocity models do not have
    dit = parameters(model) + (model.hidden_size + 1) * 16
    assert dit / 1e6 == pytest.approx(million, rel=0.01)


def test_qkv_experts_add_what_the_paper_adds():
    """Section 5 of our specification: L/2 with QKV per scale costs 24 * 3 * (1024^2 + 1024) = 75.6 M more per scale."""
    count = {k: parameters(meta("L/2", resolution=64, num_scales=k, experts="qkv")) for k in (1, 2, 3)}
    assert (count[2] - count[1]) / 1e6 == pytest.approx(75.6 + 2.1, abs=0.2)    # 2.1 M: patches and final layer
    assert (count[3] - count[2]) == (count[2] - count[1])


@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize("experts", ["full", "qkv", "none"])
@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_parameter_count_is_closed_form(num_scales, experts, num_classes):
    model = meta((48, 2, 3, 2), 3, 16, num_scales, num_classes, experts)
    assert parameters(model) == count_parameters(model, experts, num_classes)


@pytest.mark.parametrize("condition_tokens", [True, False])
@pytest.mark.parametrize("experts", ["full", "qkv", "none"])
@pytest.mark.parametrize("mask", READS)
def test_counted_flops_are_those_of_the_closed_form(mask, experts, condition_tokens):
    model = meta((48, 2, 3, 2), 2, 16, 3, 5, experts, mask, condition_tokens)
    assert forward_flops(model) == [count_flops(model, experts, mask, stage) for stage in range(3)]


@pytest.mark.parametrize("mask", MASKS)
def test_flops_rise_with_the_stages(mask):
    flops = forward_flops(meta((48, 2, 3, 2), 2, 16, 3, 5, mask=mask))
    assert 0 < flops[0] < flops[1] < flops[2]


def test_dit_flops_are_the_published_ones():
    """DiT's Table 1, G multiply-adds at 256 tokens."""
    for size, published in (("S/2", 6.06), ("XL/2", 118.64)):
        (flops,) = forward_flops(meta(size, num_scales=1, num_classes=1000, condition_tokens=False))
        assert flops / 2e9 == pytest.approx(published, rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# sizes and options


def test_sizes():
    assert parse_size("XL/2") == (1152, 28, 16, 2)
    assert parse_size("B/4") == (768, 12, 12, 4)
    assert parse_size("64,2,4,1") == parse_size((64, 2, 4, 1)) == (64, 2, 4, 1)
    assert all(len(parse_size(f"{name}/2")) == 4 for name in SIZES)
    for wrong in ("Q/2", "B", "B/x", "B/0", "64,2,4", "66,2,4,2", (64, 2, 5, 2), "B/2/2", ""):
        with pytest.raises(UserError, match="size"):
            parse_size(wrong)


def test_a_resolution_that_does_not_fit_says_which_is_nearest():
    with pytest.raises(UserError, match="nearest that works is 32"):
        MoTDiT("S/2", resolution=30, num_scales=3)
    with pytest.raises(UserError, match="3 scales with patches of 2: it must be divisible by 8"):
        MoTDiT("S/2", resolution=4, num_scales=3)
    for option in ("experts", "mask"):
        with pytest.raises(UserError, match=option):
            MoTDiT((48, 2, 3, 2), **{option: "all"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mask", MASKS)
def test_bfloat16_on_a_gpu_agrees_with_float32_on_the_cpu(mask):
    model = random_model(mask=mask)
    bands = random_bands(model)
    expected = model(bands, TIMES, LABELS)
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        ours = model.cuda()([b.cuda() for b in bands], TIMES.cuda(), LABELS.cuda())
    for a, b in zip(ours, expected, strict=True):
        assert (a.float().cpu() - b).norm() / b.norm() < 2e-2


@pytest.mark.parametrize("option", [dict(block="Modern"), dict(mask="Causal"), dict(experts="all")])
def test_misspelt_options_are_refused(option):
    with pytest.raises(UserError, match=f"^unknown {next(iter(option))} .*; choose one of "):
        MoTDiT((32, 1, 2, 2), 1, 8, 2, **option)
