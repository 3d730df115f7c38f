"""Presets, the rows of the paper, and what plan.py says of them."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import config
import plan
from config import PRESETS, Config, UserError
from conftest import random_model
from schedule import Schedule

PAPER = [name for name, preset in PRESETS.items() if preset.paper]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_tells_its_cost(name):
    cfg = config.resolve({"preset": name})
    channels, classes, side, _ = plan.shapes(cfg) if PRESETS[name].paper else (3, 10, cfg.res, 0)
    model = plan.meta_model(cfg, channels, classes, side)
    assert sum(p.numel() for p in model.parameters()) == model.count_parameters()
    assert Schedule(cfg.starts, cfg.path).num_scales == model.num_scales
    said = plan.describe(cfg, {"channels": channels, "classes": range(classes), "side": side, "count": 0})
    assert f"{model.count_parameters() / 1e6:.1f} M" in said and str(model.tokens(model.num_scales - 1)) in said
    if PRESETS[name].paper:
        assert f"row        {name}; the paper reports FID-50k {PRESETS[name].paper['fid']}" in said
        assert cfg.out == f"out/{name}"

def test_the_table_has_a_row_for_each_row_of_the_paper():
    table = plan.table()
    assert all(f"| `{name}` |" in table for name in PAPER) and table.count("not measured") == len(PAPER)


def test_the_paper_s_numbers_stand_beside_ours():
    """Section 7 and 8: with QKV per band alone the counts are the paper's to a few percent."""
    for name, reported in (("celebahq-256", 612), ("celebahq-512", 680), ("celebahq-1024", 680)):
        cfg = config.resolve({"preset": name, "experts": "qkv"})
        model = plan.meta_model(cfg, *plan.shapes(cfg)[:3])
        assert PRESETS[name].paper["parameters"] == reported
        assert (model.count_parameters() + plan.VAE_PARAMETERS) / 1e6 == pytest.approx(reported, rel=0.025)
    said = plan.describe(config.resolve({"preset": "celebahq-1024"}))
    for words in ("256, 1280, 5376 by stage", "2,000.0 epochs of 30,000", "the paper: 680 M with the VAE",
                  "the paper: 120.5 GB on 8", "the paper: 8.3 on 8 H200", "94 NFE", "3.3 s per image"):
        assert words in said
    said = plan.describe(config.resolve({"preset": "imagenet-256-XL"}))
    assert "119.9 epochs of 1,281,167" in said and "1000 classes" in said       # the paper: 120


@pytest.mark.parametrize("given, name", [
    (dict(dataset="celebahq", res=256), "celebahq-256"), (dict(dataset="celebahq", res=512), "celebahq-512"),
    (dict(dataset="celebahq", res=1024), "celebahq-1024"), (dict(dataset="imagenet", res=256), "imagenet-256-B"),
    (dict(dataset="imagenet", res=256, size="XL/2"), "imagenet-256-XL"),
    (dict(dataset="imagenet", size="B/2", steps=600_000), "imagenet-256-B-600k"),
    (dict(dataset="celebahq", res=256, starts=(0, 0.2)), "celebahq-256-start-0.2"),
    (dict(dataset="celebahq", res=256, num_scales=3), "celebahq-256-scales-3"),
    (dict(dataset="celebahq", res=256, path="gvp"), "celebahq-256-path-gvp"),
    (dict(dataset="celebahq", res=256, mask="self"), "celebahq-256-mask-self"),
    (dict(dataset="celebahq", res=256, vae=config.SD_VAE), "celebahq-256-sd-vae"),
    (dict(dataset="celebahq", res=256, space="pixel"), "celebahq-256-pixel"),
    (dict(dataset="celebahq", res=256, method="pyramidal"), "celebahq-256-pyramidal"),
    (dict(dataset="celebahq", res=256, method="edify"), "celebahq-256-edify"),
    (dict(dataset="celebahq", res=256, method="lfm", vae=config.SD_VAE), "celebahq-256-lfm"),
    (dict(dataset="celebahq", res=1024, num_scales=2, seed=3), "celebahq-1024-scales-2"),
    (dict(dataset="celebahq", res=256, experts="qkv"), "")])
def test_flags_find_the_row_of_the_paper(given, name):
    cfg = config.resolve(given)
    assert config.find_row(cfg) == name
    assert cfg.out == f"out/{name or 'celebahq-256'}"


def test_no_two_presets_train_the_same():
    assert [config.find_row(config.resolve({"preset": name})) for name in PRESETS] == list(PRESETS)


def test_a_preset_yields_to_the_user():
    photos = config.resolve({"dataset": "photos", "batch": 3})
    assert photos.batch == 3 and photos.res == 64 and photos.out == "out/photos"
    assert config.resolve({}).out == "out/digits"
    assert config.resolve({"dataset": "photos", "res": 32}).out == "out/photos-32"
    assert config.resolve({"dataset": "celebahq", "res": 512}).latents == "latents/celebahq-512-sd-vae-ft-mse/train"
    with pytest.raises(UserError, match="unknown dataset 'dogs'"):
        config.resolve({"dataset": "dogs"})
    with pytest.raises(UserError, match="unknown preset 'dogs'; python plan.py"):
        config.resolve({"preset": "dogs"})
    for res, vae in ((256, config.EQ_VAE), (512, config.SD_VAE)):               # the paper's, for any data set
        for dataset in ("folder", "imagenet", "celebahq"):
            assert config.resolve({"dataset": dataset, "space": "latent", "res": res}).vae == vae
    with pytest.raises(UserError, match="add --vae"):
        Config(dataset="folder", space="latent")
    with pytest.raises(UserError, match="unknown settings.*colour"):
        Config.from_dict({"colour": 1})


def test_settings_that_do_not_change_training_are_free():
    cfg = Config()
    for name, value in (("steps", 5), ("out", "elsewhere"), ("compile", True), ("micro_batch", 3), ("keep", 9)):
        assert config.differences(cfg, Config(**{name: value})) == []
    for name, value in (("lr", 0.5), ("batch", 64), ("mask", "none"), ("seed", 3), ("precision", "bfloat16")):
        assert config.differences(cfg, Config(**{name: value})) == [name]


@pytest.mark.parametrize("precision, recompute", [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_the_memory_estimate_follows_what_autograd_keeps(precision, recompute):
    """Bytes of the tensors that autograd saves for backward, in eager mode, against the closed form."""
    model = random_model(size=(128, 6, 4, 2), in_channels=4, resolution=32, num_scales=2, num_classes=0)
    model.recompute = recompute
    kept, own = {}, {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (alive.append(t), pack(t))[1], lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            out = model([torch.randn(4, 4, 16, 16), torch.randn(4, 4, 32, 32)], torch.rand(4))
    measured = sum(kept.values()) / 4
    if recompute:                                           # and one block of six while it is recomputed
        model.recompute = False
        measured += plan.activation_bytes(model, 1, precision) / 6
        model.recompute = True
    elif precision == "bfloat16":                           # the weights' copies in bfloat16 are counted elsewhere
        measured -= model.count_parameters() * 2 / 4
    assert plan.activation_bytes(model, 1, precision) == pytest.approx(measured, rel=0.2 if recompute else 0.05)
    assert out and alive


def test_micro_batches_fit_the_memory():
    cfg = config.resolve({"preset": "celebahq-512"})
    model = plan.meta_model(cfg, *plan.shapes(cfg)[:3])
    need = plan.memory_bytes(model, cfg, 32)
    assert plan.fit_micro_batch(model, cfg, 32, 2 * need) == 32
    assert plan.fit_micro_batch(model, cfg, 32, need) == 16 and plan.fit_micro_batch(model, cfg, 32, 1) == 1


def test_training_flops_are_three_forwards():
    """What MFU counts: backward costs two forwards, to a few percent (the first layer needs no input gradient)."""
    model = random_model(size=(64, 3, 4, 2), resolution=16, num_scales=2, num_classes=0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model([torch.randn(1, 2, 8, 8), torch.randn(1, 2, 16, 16)], torch.rand(1))
        sum(x.sum() for x in out).backward()
    assert counter.get_total_flops() == pytest.approx(3 * model.flops(1), rel=0.04)


def test_the_peak_of_a_gpu_is_known_or_said_to_be_unknown(monkeypatch):
    assert plan.peak_flops(torch.device("cpu")) is None
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12),
                       ("Toaster 5", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert plan.peak_flops(torch.device("cuda")) == peak
