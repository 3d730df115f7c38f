"""The presets and what they cost: everything that studies.plan prints, against closed forms written here."""

import dataclasses
import math
import sys
from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import baselines
import config
from config import Config, UserError
from conftest import random_model
from data import batches
from data.batches import BatchRandom
from model import MoTDiT
from run import load, memory, paper
from run.paper import PRESETS
from run.ranks import Ranks
from schedule import Schedule
from studies import plan

# of the paper: FID-50k, NFE, seconds for an image, parameters in millions with the VAE, days on 8 H200, GB on each
PAPER = {"celebahq-256": (3.53, 80, 1.51, 612, 1.2, 42.2), "celebahq-512": (4.04, 85, 2.60, 680, 3.1, 82.8),
         "celebahq-1024": (5.51, 94, 3.30, 680, 8.3, 120.5), "imagenet-256-B": (18.55, "", 1.25, "", 8.5, 24.9),
         "imagenet-256-XL": (14.38, "", 2.85, "", 9.4, 68.3), "celebahq-256-lfm": (5.26, 89, 1.70, 541, "", ""),
         "celebahq-256-pyramidal": (11.20, 90, 1.85, 544, "", ""), "celebahq-256-edify": (7.62, 95, 2.10, 602, "", "")}
FID = {"imagenet-256-B-600k": 36.50, "imagenet-256-B-guided": 4.12, "celebahq-256-start-0.1": 5.12,
       "celebahq-256-start-0.2": 4.37, "celebahq-256-start-0.9": 4.92, "celebahq-256-scales-1": 5.26,
       "celebahq-256-scales-3": 3.59, "celebahq-256-scales-4": 5.12, "celebahq-256-path-quadratic": 3.78,
       "celebahq-256-path-cubic": 4.25, "celebahq-256-path-gvp": 4.10, "celebahq-256-mask-none": 3.91,
       "celebahq-256-mask-self": 5.19, "celebahq-256-lfm-eq-vae": 7.77, "celebahq-256-separate": 3.60,
       "celebahq-256-sd-vae": 4.37, "celebahq-256-pixel": 8.63, "celebahq-512-scales-2": 5.45,
       "celebahq-512-scales-4": 4.12, "celebahq-1024-scales-2": 6.62, "celebahq-1024-scales-4": 5.45,
       "celebahq-1024-starts-0.33-0.9": 6.72, "celebahq-1024-starts-0.1-0.67": 8.12}
SIZES = {"S/2": (384, 12), "B/2": (768, 12), "L/2": (1024, 24), "XL/2": (1152, 28), "L/16": (1024, 24)}
VAE = 83_653_863

# ---------------------------------------------------------------------------------------------------------------------
# closed forms


def sizes_of(cfg):
    """D, depth, patch size, numbers in a patch, side of the input, classes."""
    latent, p = cfg.space == "latent", int(cfg.size.split("/")[1])
    return *SIZES[cfg.size], p, (4 if latent else 3) * p * p, cfg.res // 8 if latent else cfg.res, (
        1000 if cfg.dataset == "imagenet" else 0)


def count_parameters(cfg, num_scales=None):
    d, depth, _, patch, _, classes = sizes_of(cfg)
    k = num_scales or cfg.num_scales
    if cfg.method == "separate" and num_scales is None:
        return sum(count_parameters(cfg, i) for i in range(1, k + 1))
    experts = cfg.experts if cfg.method in ("lapflow", "separate") else "none"
    qkv = (3 * d * d + 3 * d) * (k if experts != "none" else 1)
    rest = (15 * d * d + 12 * d) * (k if experts == "full" else 1)              # modulation 6, projection 1, mlp 8
    embedding = (256 * d + d) + (d * d + d) + (classes + 1) * d * (classes > 0)
    ends = (patch * d + d) + (2 * d * d + 2 * d) + (d * patch + patch)          # patches, last modulation, patches
    return depth * (qkv + rest) + embedding + ends * (1 if cfg.method == "pyramidal" else k)


def count_tokens(cfg):
    """Of each stage, by band: only the finest where a stage is one image."""
    _, _, p, _, side, _ = sizes_of(cfg)
    n = [(side // p) ** 2 // 4**i for i in reversed(range(cfg.num_scales))]
    return [[count] if cfg.method in ("pyramidal", "edify") else n[: s + 1] for s, count in enumerate(n)]


def count_flops(cfg):
    """Of a forward pass of one image, by stage: two for each multiply-add of a matrix product."""
    d, depth, _, patch, _, classes = sizes_of(cfg)
    cond, result = 1 + (classes > 0), []
    for n in count_tokens(cfg):
        with_cond = [n[0] + cond, *n[1:]]
        pairs = {"causal": sum(count * sum(with_cond[: i + 1]) for i, count in enumerate(with_cond)),
                 "none": sum(with_cond) ** 2,
                 "self": sum(count * (count + cond) for count in n) + cond**2}[cfg.mask]
        modulations = len(n) if cfg.experts == "full" and cfg.method in ("lapflow", "separate") else 1
        block = 12 * d * d * sum(with_cond) + 2 * pairs * d + 6 * d * d * modulations
        result.append(2 * (depth * block + 2 * patch * d * sum(n) + 2 * d * d * len(n) + 256 * d + d * d))
    return result


def count_memory(cfg):
    """Bytes on each of 8: float32 weights, gradients (summed where they are), two moments, bfloat16 copies, EMA; then
    42 D for each token and compiled block of the largest stage."""
    d, depth, *_, classes = sizes_of(cfg)
    tokens = max(map(sum, count_tokens(cfg))) + 1 + (classes > 0)
    return 4 * count_parameters(cfg) * (4.5 + (cfg.ema > 0)) + cfg.batch // 8 * tokens * depth * 42 * d


@pytest.mark.parametrize("name", ["imagenet-256-B", pytest.param("celebahq-256-separate", marks=pytest.mark.slow)])
def test_the_closed_forms_are_what_torch_counts(name):
    """At full depth, where plan counts one and two blocks."""
    cfg = Config(**PRESETS[name].settings)
    model = memory.meta_model(cfg, memory.paper_facts(cfg))
    assert memory.forward_flops(model) == count_flops(cfg) == plan.flops_by_stage(**PRESETS[name].settings)
    assert memory.parameters(model) == count_parameters(cfg)


@pytest.mark.parametrize("condition_tokens", [True, False])
@pytest.mark.parametrize("experts, mask", [("full", "causal"), ("qkv", "none"), ("none", "self"), ("full", "self")])
def test_flops_on_the_meta_device_are_those_of_a_real_pass(mask, experts, condition_tokens):
    model = random_model(mask=mask, experts=experts, condition_tokens=condition_tokens)
    counts = []
    for stage in range(3):
        bands, t = model.stage_inputs(stage, 1)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(bands, t, torch.tensor([1]))
        counts.append(counter.get_total_flops())
    assert memory.forward_flops(model.to("meta")) == counts


# ---------------------------------------------------------------------------------------------------------------------
# what plan prints


@pytest.fixture(scope="module")
def printed():
    """The cells of the table, without its head."""
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(sys, "argv", ["plan"])
        patch.setattr("builtins.print", lambda *words: lines.extend(" ".join(map(str, words)).splitlines()))
        plan.main()
    return [[cell.strip() for cell in line[2:-1].split(" | ")] for line in lines if line.startswith("| ")][1:]


@pytest.mark.slow
def test_every_number_of_the_rows_of_the_paper(printed):
    names = [row[0].strip("`") for row in printed]
    assert sorted(names) == sorted([*PAPER, *FID])
    for name, row in zip(names, printed, strict=True):
        cfg = Config(**PRESETS[name].settings)
        fid, nfe, seconds, parameters, days, gb = PAPER.get(name, (FID.get(name), *[""] * 5))
        flops = mean(count_flops(cfg))
        steps, batch = (int(n.replace(",", "")) for n in row[4].split(" x "))
        epochs = steps * batch / (30_000 if cfg.dataset == "celebahq" else 1_281_167)
        ours = {1: f"{(count_parameters(cfg) + VAE * (cfg.space == 'latent')) / 1e6:.0f}",
                5: f"{count_memory(cfg) / 1e9:.0f}",
                6: f"{3 * flops * batch * steps / (8 * 0.4 * 989e12) / 86400:.2g}"}
        for column, reported in ((1, parameters), (5, gb), (6, days)):
            assert row[column] == ours[column] + (f" ({reported})" if reported else ""), (name, column)
        assert row[2] == ", ".join(str(sum(n)) for n in count_tokens(cfg)) and row[3] == f"{flops / 1e9:.1f}"
        assert row[7:] == [str(fid), str(nfe), str(seconds), "not measured"]
        if cfg.dataset == "celebahq":
            assert (batch, round(epochs)) == {256: (256, 500), 512: (256, 1000), 1024: (128, 2000)}[cfg.res]
    steps = {row[0]: row[4] for row in printed}
    assert steps["`imagenet-256-B`"] == "7,000,000 x 256" and steps["`imagenet-256-XL`"] == "600,000 x 256"
    assert 600_000 * 256 / 1_281_167 == pytest.approx(120, abs=0.2)             # the paper: 120 epochs


@pytest.mark.parametrize("name, reported", [("celebahq-256", 612), ("celebahq-512", 680), ("celebahq-1024", 680)])
def test_with_qkv_per_band_the_parameters_are_the_paper_s(name, reported):
    for experts in ("full", "qkv", "none"):
        cfg = Config(**{**PRESETS[name].settings, "experts": experts})
        count = memory.parameters(memory.meta_model(cfg, memory.paper_facts(cfg)))
        assert count == count_parameters(cfg)
        assert (abs((count + VAE) / 1e6 / reported - 1) < 0.025) == (experts == "qkv")


@pytest.mark.parametrize("num_scales, mask, expected", [
    (1, "causal", 1), (2, "causal", 0.688), (2, "none", 0.812), (3, "causal", 0.493), (3, "none", 0.608)])
def test_the_attention_of_appendix_c_by_torch_s_counter(num_scales, mask, expected):
    """Query-key pairs, mean over the stages, in units of one scale; the paper has 0.608 for three without a mask."""
    model, counts = MoTDiT((16, 1, 1, 1), 1, 16, num_scales, mask=mask, condition_tokens=False).to("meta"), []
    for stage in range(num_scales):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*model.stage_inputs(stage, 1, "meta"))
        counts.append(sum(count for name, count in counter.get_flop_counts()["Global"].items()
                          if "bmm" in str(name)))           # attention's products; all others are addmm
    whole = 4 * 256**2 * 16                                 # q k and a v: two products of 256 x 256 x 16
    assert mean(counts) / whole == pytest.approx(expected, abs=6e-4)


@pytest.mark.slow
def test_what_a_dry_run_prints():
    text = memory.describe(paper.resolve({"preset": "celebahq-1024"}))
    for words in ("preset     celebahq-1024\n", "256, 1280, 5376 by stage", "2,000.0 epochs of 30,000",
                  "1451.4 M with the VAE", "113.4 GB on each of 8", "4 x 128 x 128, 3 bands, 0 classes"):
        assert words in text
    text = memory.describe(paper.resolve({"preset": "imagenet-256-B"}))
    assert "1,398.7 epochs of 1,281,167" in text and "1000 classes" in text
    text = memory.describe(paper.resolve({}))
    assert "preset     digits\n" in text and "parameters 2.1 M\n" in text and "10 classes" in text


def test_a_dry_run_knows_the_vectors_of_a_folder(tmp_path):
    for i, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / name / "x.png")
    np.save(tmp_path / "vectors.npy", np.eye(3, 5))
    cfg = paper.resolve({"dataset": "folder", "data": str(tmp_path), "res": 16, "condition": "vectors",
                         "size": "32,2,2,2"})
    facts = batches.facts(batches.load(cfg))
    assert memory.quick_facts(cfg).items() <= facts.items() and facts["vectors"] == [3, 5]
    assert "vectors of 5 numbers" in memory.describe(cfg)
    labels = memory.quick_facts(dataclasses.replace(cfg, condition="labels"))
    assert labels["classes"] == ["a", "b", "c"] and labels["vectors"] is None


# ---------------------------------------------------------------------------------------------------------------------
# presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    cfg = paper.resolve({"preset": name})
    model = memory.meta_model(cfg, memory.paper_facts(cfg))
    assert Schedule(cfg.starts, cfg.path).num_scales == model.num_scales
    assert cfg.out == f"out/{name}" and paper.find_row(cfg) == name


@pytest.mark.parametrize("given, name", [
    (dict(dataset="celebahq", res=256), "celebahq-256"), (dict(dataset="celebahq", res=512), "celebahq-512"),
    (dict(dataset="celebahq", res=1024), "celebahq-1024"), (dict(dataset="imagenet", res=256), "imagenet-256-B"),
    (dict(dataset="imagenet", res=256, size="XL/2"), "imagenet-256-XL"),
    (dict(dataset="imagenet", size="B/2", steps=600_000), "imagenet-256-B-600k"),
    (dict(dataset="celebahq", res=256, starts=(0, 0.2)), "celebahq-256-start-0.2"),
    (dict(dataset="celebahq", res=256, num_scales=3), "celebahq-256-scales-3"),
    (dict(dataset="celebahq", res=256, path="gvp"), "celebahq-256-path-gvp"),
    (dict(dataset="celebahq", res=256, mask="self"), "celebahq-256-mask-self"),
    (dict(dataset="celebahq", res=256, vae=paper.SD_VAE), "celebahq-256-sd-vae"),
    (dict(dataset="celebahq", res=256, space="pixel"), "celebahq-256-pixel"),
    (dict(dataset="celebahq", res=256, method="pyramidal"), "celebahq-256-pyramidal"),
    (dict(dataset="celebahq", res=256, method="edify"), "celebahq-256-edify"),
    (dict(dataset="celebahq", res=256, method="lfm", vae=paper.SD_VAE), "celebahq-256-lfm"),
    (dict(dataset="celebahq", res=1024, num_scales=2, seed=3), "celebahq-1024-scales-2"),
    (dict(dataset="celebahq", res=256, experts="qkv"), "")])
def test_flags_find_the_row_of_the_paper(given, name):
    cfg = paper.resolve(given)
    assert paper.find_row(cfg) == name
    assert cfg.out == f"out/{name or 'celebahq-256'}"


def test_a_preset_yields_to_the_user():
    clothes = paper.resolve({"dataset": "fashion", "batch": 5})
    assert clothes.batch == 5 and clothes.res == 32 and clothes.out == "out/fashion"
    assert paper.resolve({}).out == "out/digits"
    assert paper.resolve({"dataset": "folder", "res": 32}).out == "out/folder-32"
    assert paper.resolve({"dataset": "folder", "res": 64, "size": "96,4,3,4"}).out == "out/folder-64"
    assert paper.resolve({"dataset": "folder", "res": 64}).out == "out/folder"
    assert paper.resolve({"dataset": "celebahq", "res": 512}).latents == "latents/celebahq-512-sd-vae-ft-mse/train"
    with pytest.raises(UserError, match="unknown dataset 'dogs'"):
        paper.resolve({"dataset": "dogs"})
    with pytest.raises(UserError, match="unknown preset 'dogs'; python -m studies.plan"):
        paper.resolve({"preset": "dogs"})
    for res, vae in ((256, paper.EQ_VAE), (512, paper.SD_VAE)):                 # the paper's, for any data set
        for dataset in ("folder", "imagenet", "celebahq"):
            assert paper.resolve({"dataset": dataset, "space": "latent", "res": res}).vae == vae
    with pytest.raises(UserError, match="add --vae"):
        Config(dataset="folder", space="latent")
    with pytest.raises(UserError, match="unknown settings.*colour"):
        Config.from_dict({"colour": 1})


def test_settings_that_do_not_change_training_are_free():
    """Those of speed, places, samples and records; every other setting makes it another run."""
    free = dict(data="D", latents="L", out="O", steps=5, micro_batch=3, compile=True, shard=True, recompute=True,
                rtol=0.1, atol=0.1, cfg_scale=2.0, noise_scale=(1.0, 0.9), num_samples=9, sample_every=9, eval_every=9,
                log_every=9, logger="tensorboard", save_every=9, keep=9, keep_every=9)
    fixed = dict(dataset="folder", res=16, condition="vectors", vae="V", flip=False, skip_bad=True, init="I", seed=3,
                 size="32,2,2,2", patches=(1.0, 2.0), experts="none", mask="none", condition_tokens=False,
                 block="modern", concat_coarse=True, starts=(0.0, 0.2), path="gvp", times="logit-normal",
                 stage_weights=(1.0, 3.0), noise="independent", stages="batch", full_range=False, batch=64, lr=0.5,
                 lr_end=0.5, warmup=9, beta2=0.5, weight_decay=0.5, clip=0.5, label_drop=0.5, ema=0.5,
                 precision="bfloat16")
    others = {"space", "method", "num_scales", "pyramid", "solver", "solver_steps"}     # change with another setting
    assert {*free, *fixed, *others} == {field.name for field in dataclasses.fields(Config)}
    for name, value in {**free, **fixed}.items():
        assert config.differences(Config(), Config(**{name: value})) == [name] * (name in fixed), name
    assert config.differences(Config(), Config(solver="heun", solver_steps=4)) == []
    assert config.differences(Config(), Config(num_scales=1, starts=(0.0,))) == ["num_scales", "starts"]


# ---------------------------------------------------------------------------------------------------------------------
# memory and peaks


@pytest.mark.slow
@pytest.mark.parametrize("block", ["dit", "modern"])
@pytest.mark.parametrize("precision, recompute, compiled", [
    ("float32", False, False), ("bfloat16", False, False), ("bfloat16", True, False),
    ("float32", False, True), ("bfloat16", False, True)])
def test_the_memory_estimate_follows_what_autograd_keeps(monkeypatch, precision, recompute, compiled, block):
    """Bytes of the tensors that autograd saves for backward, against the closed form. Compiled by torch's own choice of
    what to keep, but without its kernels."""
    model = random_model(size=(128, 6, 4, 2), in_channels=4, resolution=32, num_scales=2, num_classes=0, block=block)
    model.recompute = recompute
    if compiled:
        compile_ = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_(
            self, backend="aot_eager_decomp_partition", **options))
        load.compile_blocks(model)
    saved, weights = {}, {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (alive.append(t), pack(t))[1], lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            out = model([torch.randn(4, 4, 16, 16), torch.randn(4, 4, 32, 32)], torch.rand(4))
    measured = sum(saved.values()) / 4
    if recompute:                                           # and one block of six while it is recomputed
        model.recompute = False
        measured += memory.activation_bytes(model, 1, precision) / 6
        model.recompute = True
    elif precision == "bfloat16":                           # the weights' copies in bfloat16 are counted elsewhere
        measured -= memory.parameters(model) * 2 / 4
    estimate = memory.activation_bytes(model, 1, precision, compiled)
    assert estimate == pytest.approx(measured, rel=0.2 if recompute else 0.05)
    assert out and alive


def test_micro_batches_fit_the_memory():
    """Divisors of the share only: a remainder would be a graph of its own."""
    cfg = paper.resolve({"preset": "celebahq-512"})
    model = memory.meta_model(cfg, memory.paper_facts(cfg))
    need = memory.memory_bytes(model, cfg, 32)
    assert memory.fit_micro_batch(model, cfg, 32, 2 * need) == 32
    assert memory.fit_micro_batch(model, cfg, 32, need) == 16 and memory.fit_micro_batch(model, cfg, 32, 1) == 1
    assert memory.fit_micro_batch(model, cfg, 18, memory.memory_bytes(model, cfg, 16) / 0.9 + 1) == 9
    assert memory.free_memory(torch.device("cpu")) == math.inf


def test_coarse_stages_take_more_images_at_a_time(monkeypatch):
    """Each stage of a row of the paper as many as fit, divisors of the share, and one of them more would not."""
    cfg, ranks = paper.resolve({"preset": "celebahq-1024"}), Ranks(1, 4, torch.device("cpu"))
    model, free = memory.meta_model(cfg, memory.paper_facts(cfg)), 64e9
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    monkeypatch.setattr(Ranks, "least", lambda ranks, value: value)             # the others have as much
    parts, room = memory.split_batch(model, cfg, ranks), 0.9 * (free + 4 * memory.parameters(model))
    assert parts.sizes == [32, 16, 4]
    for stage, (size, rows) in enumerate(zip(parts.sizes, parts.by_stage, strict=True)):
        assert rows == [slice(row, row + size) for row in range(32, 64, size)]
        assert memory.memory_bytes(model, cfg, size, 4, stage) < room
        assert size == 32 or memory.memory_bytes(model, cfg, 2 * size, 4, stage) >= room
    schedule = baselines.SYSTEMS[cfg.method].schedule(cfg)
    for step in range(20):                                  # the parts of a step are those of the stage that it trains
        rows = parts.of_step(step)
        stages = {s for part in rows for s in schedule.stage_of_rows(BatchRandom(cfg.seed, step, cfg.batch, part))}
        assert rows == parts.by_stage[stages.pop()] and not stages
    assert "128 images = 4 x 1 x 32, 4 x 2 x 16, 4 x 8 x 4 (processes, micro-batches, images; by stage)" in (
        memory.summary(model, cfg, memory.paper_facts(cfg), parts, ranks))


def test_without_room_stratified_stages_keep_the_images_they_need(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 0.0)
    cfg, ranks = paper.resolve({"dataset": "folder", "data": "x"}), Ranks(0, 1, torch.device("cpu"))
    assert (cfg.stages, cfg.num_scales, cfg.batch) == ("stratified", 3, 32)
    model = memory.meta_model(cfg, memory.paper_facts(cfg))
    parts = memory.split_batch(model, cfg, ranks)
    assert parts.by_stage == 3 * [[slice(row, row + 4) for row in range(0, 32, 4)]]     # of 1, 2, 4, ... from 3 up
    with (pytest.raises(UserError, match="4 images at a time.*no smaller micro-batch is possible: add --recompute"),
          memory.explained(model, cfg, parts, ranks)):
        raise torch.OutOfMemoryError("out of memory")
    assert memory.fit_micro_batch(model, cfg, 2, 0.0, least=3) == 2             # too small a share: `rows` says so


def test_training_flops_are_three_forwards():
    """What MFU counts: backward costs two forwards, to a few percent (the first layer needs no input gradient)."""
    model = random_model(size=(64, 3, 4, 2), resolution=16, num_scales=2, num_classes=0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model([torch.randn(1, 2, 8, 8), torch.randn(1, 2, 16, 16)], torch.rand(1))
        sum(x.sum() for x in out).backward()
    assert counter.get_total_flops() == pytest.approx(3 * memory.forward_flops(model.to("meta"))[1], rel=0.04)


def test_the_peak_of_a_gpu_is_known_or_reported_as_unknown(monkeypatch):
    assert memory.peak_flops(torch.device("cpu")) is None
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12),
                       ("Toaster 5", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert memory.peak_flops(torch.device("cuda")) == peak
