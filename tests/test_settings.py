"""Every setting reaches what it is for: each has a test that fails when the program ignores it or uses another in its
place. Runs are watched from outside: the images, labels and times that reach the network, the gradients and weights at
each step of the optimizer, the calls of torchdiffeq, the files."""

import copy
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import baselines
import config
import fid
import pyramid
import sample
import train
from config import Config, UserError
from conftest import ROOT, close, metrics, randomize, run_here, same, state, tiny, train_and_score
from data import batches, latents
from data.batches import ImageRandom
from run import checkpoint, load, log, memory, pictures
from run.ranks import Ranks

TABLE = {}                                                  # setting -> its test


def setting(*names: str) -> Callable:
    """Notes that a test is that of these settings."""
    def note(test):
        TABLE.update(dict.fromkeys(names, test.__name__))
        return test

    return note


def clone(tensors) -> dict:
    return {name: tensor.detach().clone() for name, tensor in tensors}


# ---------------------------------------------------------------------------------------------------------------------
# a training run, watched


def watch(cfg: Config, patch: pytest.MonkeyPatch, **options) -> SimpleNamespace:
    """Trains, without the samples at the end. Returns

    losses     each call of the loss: step, x1, y
    passes     each pass of the network: step, bands, t; tokens of the first block by band; how often and in which
               precision its first linear layer ran
    steps      each step of the optimizer: its group of parameters, the gradients, the weights before and after
    averages   the averaged weights after each update, and what they were updated with
    order      what happened, in order: "step", "average", "line", "save"
    saved      what was saved: step, weights, averaged weights
    """
    trace = SimpleNamespace(cfg=cfg, losses=[], passes=[], tokens=[], dtypes=[], steps=[], averages=[], order=[],
                           saved=[], model=None)
    system, handles = baselines.SYSTEMS[cfg.method], []
    loss, update, save, write = system.loss, train.update_ema, checkpoint.Writer.save, log.Log.write

    def watched_loss(model, x1, y, schedule, rng):
        if trace.model is None:
            trace.model, trace.start, block = model, clone(model.named_parameters()), model.blocks[0]
            handles.append(model.register_forward_pre_hook(lambda m, inputs: trace.passes.append(
                SimpleNamespace(step=len(trace.steps), bands=[x.detach() for x in inputs[0]], t=inputs[1]))))
            handles.append(block.register_forward_pre_hook(lambda m, inputs: trace.tokens.append(
                [x.shape[1] for x in inputs[0]])))
            handles.append(block.qkv[0].register_forward_hook(lambda m, inputs, out: trace.dtypes.append(out.dtype)))
        trace.losses.append(SimpleNamespace(step=len(trace.steps), x1=x1, y=y, first=rng.rows.start))
        return loss(model, x1, y, schedule, rng)

    def before(optimizer, *_):
        (group,) = optimizer.param_groups
        trace.steps.append(SimpleNamespace(
            group={key: value for key, value in group.items() if key != "params"},
            grads={name: p.grad.clone() for name, p in trace.model.named_parameters() if p.grad is not None},
            before=clone(trace.model.named_parameters())))

    def after(*_):
        trace.steps[-1].after = clone(trace.model.named_parameters())
        trace.order.append("step")

    def watched_update(ema, model, decay, step):
        if not trace.averages:
            trace.average = clone(ema.named_parameters())
        update(ema, model, decay, step)
        trace.averages.append((clone(ema.named_parameters()), clone(model.named_parameters())))
        trace.order.append("average")

    def watched_write(self, *arguments):
        trace.order.append("line")
        return write(self, *arguments)

    def watched_save(self, state):
        trace.order.append("save")
        trace.saved.append((state["step"], clone(state["model"].items()), clone((state["ema"] or {}).items())))
        return save(self, state)

    for place, name, value in ((system, "loss", watched_loss), (train, "update_ema", watched_update),
                               (checkpoint.Writer, "save", watched_save), (log.Log, "write", watched_write)):
        patch.setattr(place, name, value)
    handles += [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        train.train(cfg, device="cpu", **options)
    finally:
        for handle in handles:
            handle.remove()
    return trace


# Settings that differ from the defaults and from each other. Most rows of the table watch this one run.
ODD = dict(size="24,3,2,2", starts=(0.0, 0.6), path="gvp", noise="independent", full_range=False, experts="qkv",
           mask="none", condition_tokens=False, block="modern", concat_coarse=True, times="logit-normal", batch=24,
           micro_batch=8, steps=6, lr=3e-3, lr_end=7e-4, warmup=2, beta2=0.9, weight_decay=0.2, clip=0.05,
           label_drop=0.7, ema=0.3, recompute=True, log_every=4, save_every=3, seed=7)
THREE = dict(num_scales=3, starts=(), experts="none", size="24,2,2,1")          # runs that several tests watch
PLAIN = dict(mask="self", condition_tokens=True, block="dit", concat_coarse=False, label_drop=0.0, steps=1)
PYRAMID = dict(noise="pyramid", full_range=True, times="uniform")
KEEP = dict(save_every=1, keep=3, keep_every=3)
FREE = dict(clip=0.0, ema=0.0, log_every=1)
WHOLE = dict(**FREE, micro_batch=24, recompute=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(**settings): a watched run with these in place of ODD; each is trained once."""
    runs = {}

    def get(**settings) -> SimpleNamespace:
        key = repr(sorted(settings.items()))
        if key not in runs:
            with pytest.MonkeyPatch.context() as patch:
                runs[key] = watch(tiny(tmp_path_factory.mktemp("watched"), **{**ODD, **settings}), patch)
        return runs[key]

    return get


# ---------------------------------------------------------------------------------------------------------------------
# the settings of training; the values are those of ODD


@setting("seed")
def test_seed(trained):
    """The first weights, the order of the images, dropped labels, times and noise: all from the seed, all repeated."""
    odd = trained()
    for run, equal in ((trained(**KEEP), True), (trained(seed=8), False)):
        assert same(odd.start, run.start) == equal
        for name in ("x1", "y"):
            assert torch.equal(getattr(odd.losses[0], name), getattr(run.losses[0], name)) == equal
        assert torch.equal(odd.passes[0].t, run.passes[0].t) == equal
        assert torch.equal(odd.passes[0].bands[0], run.passes[0].bands[0]) == equal
    assert not torch.equal(odd.losses[0].x1, odd.losses[3].x1)                  # and each step has its own
    assert not torch.equal(odd.passes[0].t, odd.passes[6].t)


@setting("size")
def test_size(trained):
    model = trained().model
    assert model.patch_in[0].weight.shape == (24, 4) and len(model.blocks) == 3 and model.blocks[0].num_heads == 2


@setting("num_scales")
def test_num_scales(trained):
    passes = trained(**THREE).passes
    assert {len(p.bands) for p in passes} == {1, 2, 3} and passes[2].bands[0].shape[2:] == (2, 2)
    assert {len(p.bands) for p in trained().passes} == {1, 2}


@setting("experts")
def test_experts(trained):
    block, shared = trained().model.blocks[0], trained(**THREE).model.blocks[0]
    assert (len(block.qkv), len(block.mlp)) == (2, 1) and (len(shared.qkv), len(shared.mlp)) == (1, 1)


@setting("mask")
def test_mask(trained):
    """Which bands change when one is changed."""
    for mask, expected in (("none", {(0, 0), (0, 1), (1, 0), (1, 1)}), ("self", {(0, 0), (1, 1)})):
        model = randomize(copy.deepcopy((trained() if mask == "none" else trained(**PLAIN)).model))
        bands, read = [torch.randn(1, 1, s, s) for s in (4, 8)], set()
        with torch.no_grad():
            before = model(bands, torch.tensor([0.7]), torch.tensor([3]))
            for j in range(2):
                after = model([x + (i == j) for i, x in enumerate(bands)], torch.tensor([0.7]), torch.tensor([3]))
                read |= {(i, j) for i in range(2) if not torch.equal(before[i], after[i])}
        assert read == expected


@setting("condition_tokens")
def test_condition_tokens(trained):
    assert {tokens[0] for tokens in trained().tokens} == {4}                    # of the image
    assert {tokens[0] for tokens in trained(**PLAIN).tokens} == {4 + 2}


@setting("block")
def test_block(trained):
    assert [hasattr(run.model.blocks[0], "qk_norm") for run in (trained(), trained(**PLAIN))] == [True, False]


@setting("concat_coarse")
def test_concat_coarse(trained):
    assert [layer.weight.shape[1] for layer in trained().model.patch_in] == [4, 8]
    assert [layer.weight.shape[1] for layer in trained(**PLAIN).model.patch_in] == [4, 4]


@setting("patches")
def test_patches(trained):
    """Of 4 and of 8 pixels a side: 4 and 64 tokens, in place of 4 and 16."""
    run = trained(patches=(2.0, 1.0), recompute=False, steps=1)
    assert [layer.weight.shape[1] for layer in run.model.patch_in] == [4, 2]    # with the coarser image beside band 1
    assert run.model.num_tokens == [4, 64] and trained().model.num_tokens == [4, 16]


@setting("times")
def test_times(trained):
    """Sigmoids of normal numbers lie within [1/4, 3/4] with a probability of 0.73, uniform ones with 0.5."""
    for run, share in ((trained(), 0.73), (trained(**PYRAMID), 0.5)):
        u = torch.cat([(p.t - 0.6) / 0.4 for p in run.passes if len(p.bands) == 2])
        assert abs(((u > 0.25) & (u < 0.75)).float().mean() - share) < 0.1


@setting("stage_weights")
def test_stage_weights(trained):
    """Of the 8 rows of a part, six train band 0 alone in place of four."""
    for run, rows in ((trained(stage_weights=(3.0, 1.0), recompute=False, size="24,2,2,2"), 6), (trained(), 4)):
        assert {len(p.t) for p in run.passes if len(p.bands) == 1} == {rows}


@setting("starts")
def test_starts(trained):
    times = torch.cat([p.t for p in trained(**PYRAMID).passes if len(p.bands) == 2])
    assert 0.6 <= times.min() < 0.65 and times.max() > 0.95


@setting("full_range")
def test_full_range(trained):
    """Band 0 alone: up to the start of band 1, or up to the end."""
    for run, most in ((trained(), 0.6), (trained(**PYRAMID), 1.0)):
        times = torch.cat([p.t for p in run.passes if len(p.bands) == 1])
        assert times.min() < 0.1 and most - 0.1 < times.max() <= most


def noise_of(run: SimpleNamespace, sigma: Callable) -> tuple:
    """Mean square of (xt - alpha x1) / sigma of each band in the passes of both bands: of the noise, if sigma is right,
    and alpha that of gvp. x1 of the first step is known: the passes go through the micro-batches in order."""
    total, squares = 0, torch.zeros(2)
    for loss, p in zip(run.losses, [p for p in run.passes if len(p.bands) == 2], strict=True):
        rows = (torch.arange(8) + loss.first) % 2 == 1      # stratified: odd rows train both bands
        bands = pyramid.decompose(loss.x1[rows], 2)
        for i, start in enumerate((0.0, 0.6)):
            alpha = torch.sin(math.pi / 2 * (p.t - start) / (1 - start)).view(-1, 1, 1, 1)
            scaled = (p.bands[i] - alpha * bands[i]) / sigma(p.t).view(-1, 1, 1, 1)
            squares[i] += scaled.square().mean()
        total += 1
    return tuple((squares / total).tolist())


@setting("path")
def test_path(trained):
    """With the noise of the path taken off, what is left has the variance of the noise; of no other path."""
    assert noise_of(trained(), lambda t: torch.cos(math.pi / 2 * t)) == pytest.approx((1, 1), abs=0.1)
    for power in (1, 2, 3):
        assert min(noise_of(trained(), lambda t, p=power: (1 - t) ** p)) > 1.3


@setting("noise")
def test_noise(trained):
    """Independent bands have variance 1; those of one white image 1/4 and 3/4."""
    assert noise_of(trained(), lambda t: torch.cos(math.pi / 2 * t)) == pytest.approx((1, 1), abs=0.1)
    one_image = noise_of(trained(**PYRAMID), lambda t: torch.cos(math.pi / 2 * t))
    assert one_image == pytest.approx((0.25, 0.75), abs=0.08)


@setting("stages")
def test_stages(trained):
    """Stratified: each part trains both stages. Batch: one stage for all parts of a step, not always the same."""
    steps = {name: [[len(p.bands) for p in run.passes if p.step == k] for k in range(6)]
             for name, run in (("stratified", trained()), ("batch", trained(stages="batch")))}
    assert steps["stratified"] == [[1, 2] * 3] * 6
    assert {tuple(step) for step in steps["batch"]} == {(1, 1, 1), (2, 2, 2)}


@setting("steps")
def test_steps(trained):
    run = trained()
    assert len(run.steps) == 6 and state(run.cfg)["step"] == 6 and metrics(run.cfg.out)[-1]["step"] == 6


@setting("batch")
def test_batch(trained):
    run = trained()
    assert [sum(len(x.x1) for x in run.losses if x.step == k) for k in range(6)] == [24] * 6
    assert [line["images"] / line["step"] for line in metrics(run.cfg.out)] == [24] * 3
    images = torch.cat([x.x1 for x in run.losses]).flatten(1)
    assert len(images.unique(dim=0)) > 140                  # 144 digits, each once, but for equal ones


@setting("micro_batch")
def test_micro_batch(trained):
    """Parts of 8 of 24; the gradients and updates are those of the whole batch at once."""
    parts, whole = trained(**FREE), trained(**WHOLE)
    assert {len(x.x1) for x in parts.losses} == {8} and {len(x.x1) for x in whole.losses} == {24}
    a, b = parts.steps[0], whole.steps[0]
    norm = math.sqrt(sum(grad.double().square().sum() for grad in b.grads.values()))
    assert a.grads.keys() == b.grads.keys()
    assert all((a.grads[name] - b.grads[name]).norm() < 1e-6 * norm for name in a.grads)
    assert close(parts.steps[-1].after, whole.steps[-1].after, atol=1e-4)
    for a, b in zip(metrics(parts.cfg.out), metrics(whole.cfg.out), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)


RATES = [1.5e-3, 3e-3, *(7e-4 + (3e-3 - 7e-4) * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4))]


@setting("lr", "lr_end", "warmup")
def test_rate(trained):
    """lr, lr_end and warmup, at each step of the optimizer; the rate in the metrics is that of the last step."""
    run = trained()
    assert [step.group["lr"] for step in run.steps] == pytest.approx(RATES)
    assert [line["lr"] for line in metrics(run.cfg.out)] == pytest.approx([RATES[2], RATES[3], RATES[5]])


@setting("beta2", "weight_decay")
def test_adamw(trained):
    """beta2 and weight_decay: the updates are those of AdamW, written out in double precision."""
    run, moments = trained(), {}
    assert {(s.group["betas"], s.group["weight_decay"]) for s in run.steps} == {((0.9, 0.9), 0.2)}
    for k, step in enumerate(run.steps, 1):
        for name, grad in step.grads.items():
            grad, (m, v) = grad.double(), moments.get(name, (0.0, 0.0))
            m, v = moments[name] = 0.9 * m + 0.1 * grad, 0.9 * v + 0.1 * grad**2
            update = m / (1 - 0.9**k) / ((v / (1 - 0.9**k)).sqrt() + 1e-8)
            expected = step.before[name].double() * (1 - RATES[k - 1] * 0.2) - RATES[k - 1] * update
            assert torch.allclose(step.after[name].double(), expected, atol=1e-6), (k, name)


def norm_of(grads: dict) -> float:
    return math.sqrt(sum(grad.double().square().sum().item() for grad in grads.values()))


@setting("clip")
def test_clip(trained):
    """The optimizer gets gradients of this norm; the metrics have the norm before."""
    norms = [norm_of(step.grads) for step in trained().steps]
    assert norms == pytest.approx([0.05] * 6, rel=1e-3)
    assert min(line["grad_norm"] for line in metrics(trained().cfg.out)) > 0.1
    norms = [norm_of(step.grads) for step in trained(**FREE).steps]
    assert min(norms) > 0.1
    assert [line["grad_norm"] for line in metrics(trained(**FREE).cfg.out)] == pytest.approx(norms, rel=1e-5)


@setting("label_drop")
def test_label_drop(trained):
    y = torch.cat([x.y for x in trained().losses])
    assert (y == 10).float().mean().item() == pytest.approx(0.7, abs=0.1) and set(y.tolist()) == set(range(11))
    assert all((x.y < 10).all() for x in trained(**PLAIN).losses)


@setting("ema")
def test_ema(trained):
    """decay: 0.3, less in the first steps; each update takes the weights after the step."""
    run = trained()
    expected = {name: value.double() for name, value in run.start.items()}
    for k, (average, weights) in enumerate(run.averages):
        assert same(weights, run.steps[k].after)
        decay = min(0.3, (1 + k) / (10 + k))
        expected = {name: decay * value + (1 - decay) * weights[name].double() for name, value in expected.items()}
        assert all(torch.allclose(average[name].double(), expected[name], atol=1e-6) for name in average)
    assert len(run.averages) == 6
    assert not trained(**FREE).averages and state(trained(**FREE).cfg)["ema"] is None


@setting("precision")
def test_precision(trained):
    """From inside a block; the weights stay float32."""
    for run, dtype in ((trained(), torch.float32), (trained(precision="bfloat16", steps=1), torch.bfloat16)):
        assert set(run.dtypes) == {dtype} and {p.dtype for p in run.model.parameters()} == {torch.float32}
        assert {p.dtype for p in state(run.cfg)["model"].values()} == {torch.float32}


@setting("recompute")
def test_recompute(trained):
    """The blocks run again in backward; the gradients are the same."""
    run, plain = trained(**FREE), trained(**WHOLE)
    assert len(run.dtypes) == 2 * len(run.passes) and len(plain.dtypes) == len(plain.passes)
    assert close(run.steps[0].grads, plain.steps[0].grads, atol=1e-6)


@setting("log_every")
def test_log_every(trained):
    assert [line["step"] for line in metrics(trained().cfg.out)] == [3, 4, 6]   # and with each checkpoint
    assert [line["step"] for line in metrics(trained(**FREE).cfg.out)] == [1, 2, 3, 4, 5, 6]


@setting("save_every")
def test_save_every(trained):
    assert [step for step, _, _ in trained().saved] == [3, 6]


@setting("keep", "keep_every")
def test_keep(trained):
    assert [path.name for path in checkpoint.steps(Path(trained(**KEEP).cfg.out))] == [
        f"step-0000000{step}.pt" for step in (6, 5, 4, 3)]  # the last three, and each third


@pytest.mark.parametrize("keep, keep_every, left", [(1, 20, [40, 21, 20]), (1, 0, [21]), (2, 0, [40, 21])])
def test_the_checkpoint_just_written_stays(tmp_path, keep, keep_every, left):
    """Also where a damaged one has a higher number."""
    for step in (10, 20, 40):
        checkpoint.save(tmp_path, {"step": step}, keep=3)
    checkpoint.path(tmp_path, 40).write_bytes(b"damaged")
    checkpoint.save(tmp_path, {"step": 21}, keep, keep_every)
    assert [int(file.stem[5:]) for file in checkpoint.steps(tmp_path)] == left


@setting("out")
def test_out(trained):
    run = trained()
    assert {path.name for path in Path(run.cfg.out).iterdir()} >= {"step-00000006.pt", "metrics.jsonl", "config.json"}


# ---------------------------------------------------------------------------------------------------------------------
# a step in its order, again after a stop, and from other weights


def test_a_step_is_optimizer_average_metrics_checkpoint(trained):
    """A checkpoint of step k holds the weights after step k, and its line of metrics is written before it."""
    run, expected = trained(), []
    for step in range(1, 7):
        expected += ["step", "average", *["line"] * (step in (3, 4, 6)), *["save"] * (step in (3, 6))]
    assert run.order == expected
    for step, weights, average in run.saved:
        assert same({name: weights[name] for name in run.start}, run.steps[step - 1].after)
        assert same({name: average[name] for name in run.start}, run.averages[step - 1][0])
        assert not same(run.steps[step - 1].after, run.steps[step - 2].after)
    assert same(dict(state(run.cfg)["model"]), run.saved[-1][1])


def test_rates_images_and_noise_go_on_after_a_stop(trained, tmp_path, monkeypatch):
    cfg, whole = tiny(tmp_path, **ODD), trained()           # trained first: a watch within another counts twice
    with monkeypatch.context() as patch:
        assert len(watch(cfg, patch, stop_after=0.0).steps) == 1
    with monkeypatch.context() as patch:
        rest = watch(cfg, patch)
    assert [step.group["lr"] for step in rest.steps] == pytest.approx(RATES[1:])
    for a, b in zip(rest.losses, whole.losses[3:], strict=True):
        assert torch.equal(a.x1, b.x1) and torch.equal(a.y, b.y)
    assert all(torch.equal(a.t, b.t) for a, b in zip(rest.passes, whole.passes[6:], strict=True))
    assert all(same(a.grads, b.grads) for a, b in zip(rest.steps, whole.steps[1:], strict=True))
    assert same(rest.averages[-1][0], whole.averages[-1][0])


@setting("init")
def test_init(trained, tmp_path):
    """Both sets of weights start from the averaged weights of the other run, or from its only ones."""
    for source, key in ((trained(), "ema"), (trained(**FREE), "model")):
        weights = state(source.cfg)[key]
        for init in (source.cfg.out, str(checkpoint.steps(Path(source.cfg.out))[0])):
            run = watch_data(tmp_path, f"run-{len(list(tmp_path.iterdir()))}", **{**ODD, "steps": 1, "init": init})
            expected = {name: weights[name] for name in run.start}
            assert same(run.start, expected) and same(run.average, expected)
            assert same(run.steps[0].before, expected)


# ---------------------------------------------------------------------------------------------------------------------
# data


def folder_of(folder: Path, shades: list) -> Path:
    """Images of one shade of grey each, in order."""
    folder.mkdir(parents=True)
    for i, shade in enumerate(shades):
        Image.new("L", (20, 20), shade).save(folder / f"{i:02d}.png")
    return folder


def watch_data(tmp_path, name="run", **settings) -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        return watch(tiny(tmp_path, name, **{"steps": 1, **settings}), patch)


def shades_of(run: SimpleNamespace) -> Tensor:
    return (run.losses[0].x1.mean(dim=(1, 2, 3)) + 1) * 127.5


@setting("dataset")
def test_the_data_set(tmp_path):
    for name in "ab":
        folder_of(tmp_path / "images" / name, [40] * 2)
    run = watch_data(tmp_path, dataset="folder", data=str(tmp_path / "images"), res=16, label_drop=0.0)
    assert run.losses[0].x1.shape == (16, 3, 16, 16) and set(run.losses[0].y.tolist()) == {0, 1}    # in colour
    assert watch_data(tmp_path, "digits").losses[0].x1.shape == (16, 1, 8, 8)


@setting("data", "res")
def test_a_folder(tmp_path):
    for i, (shade, res) in enumerate(((40, 8), (200, 16))):
        folder = folder_of(tmp_path / f"images-{i}", [shade] * 4)
        run = watch_data(tmp_path, f"run-{i}", dataset="folder", data=str(folder), res=res)
        assert run.losses[0].x1.shape == (16, 3, res, res) and shades_of(run) == pytest.approx(torch.full((16,), shade))


@setting("flip")
def test_flip(tmp_path):
    """About half of the images are mirrored, or none."""
    folder_of(tmp_path / "images", [0])
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "images" / "00.png")
    plain, mirrored = (watch_data(tmp_path, str(flip), dataset="folder", res=8, flip=flip, batch=32,
                                  data=str(tmp_path / "images")).losses[0].x1 for flip in (False, True))
    changed = [not torch.equal(a, b) for a, b in zip(plain, mirrored, strict=True)]
    assert 8 < sum(changed) < 24
    assert all(torch.equal(a, b.flip(-1) if turned else b) for a, b, turned in zip(plain, mirrored, changed,
                                                                                   strict=True))
    assert (plain == plain[0]).all() and plain[0, 0, 0, 0] < plain[0, 0, 0, -1]


def test_mirror_images_depend_on_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "order", lambda count, seed, start, length: np.arange(start, start + length) % count)
    folder_of(tmp_path / "images", [0])
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "images" / "00.png")
    first, again, different = (
        watch_data(tmp_path, name, dataset="folder", data=str(tmp_path / "images"), res=8, seed=seed).losses[0].x1
        for name, seed in (("first", 0), ("again", 0), ("third", 1)))
    assert torch.equal(first, again) and not torch.equal(first, different)


@setting("skip_bad")
def test_skip_bad(tmp_path):
    folder = folder_of(tmp_path / "images", [40] * 5)
    (folder / "02.png").write_bytes(b"no image")
    settings = dict(dataset="folder", data=str(folder), res=8)
    with pytest.raises(UserError, match="02.png.*--skip-bad"):
        watch_data(tmp_path, **settings)
    assert state(watch_data(tmp_path, skip_bad=True, **settings).cfg)["data"]["count"] == 4


@setting("condition")
def test_condition(tmp_path):
    """Each image comes with its own vector; NaN stands for the null condition."""
    folder = folder_of(tmp_path / "images", [10 * i for i in range(8)])
    np.save(folder / "vectors.npy", np.array([[i, 100 * i, 7] for i in range(8)], np.float32))
    run = watch_data(tmp_path, dataset="folder", data=str(folder), res=8, condition="vectors", label_drop=0.5, batch=40)
    y, null = run.losses[0].y, run.losses[0].y.isnan().any(dim=1)
    assert 8 < null.sum() < 32 and y[null].isnan().all()
    number = (shades_of(run) / 10).round()[~null]
    assert torch.equal(y[~null], torch.stack([number, 100 * number, torch.full_like(number, 7)], dim=1))
    assert watch_data(tmp_path, "labels", dataset="folder", data=str(folder), res=8).losses[0].y is None


@setting("space", "vae", "latents")
def test_latents(tmp_path, monkeypatch):
    """Two caches, each of one value; their autoencoder is loaded by its name."""
    names = []
    monkeypatch.setattr(latents, "Autoencoder", lambda name, *_, **__: names.append(name))
    for value in (1.0, 2.0):
        folder = tmp_path / f"cache-{value}"
        folder.mkdir()
        moments = np.zeros((6, 2, 8, 8, 8), np.float16)
        moments[:, 0, :4], moments[:, 1, :4] = value, -value        # means, mirrored too; the deviation is 0
        moments.tofile(folder / "moments.f16")
        np.save(folder / "labels.npy", np.arange(6) % 2)
        (folder / "header.json").write_text(json.dumps({
            "complete": True, "dataset": "folder", "split": "train", "res": 64, "side": 8, "channels": 4,
            "classes": ["a", "b"], "fingerprint": "", "count": 6,
            "vae": {"name": "me/vae", "sha256": "", "shift": [0.5] * 4, "scale": [3.0] * 4, "factor": 8}}))
        settings = dict(dataset="folder", space="latent", latents=str(folder), res=64)
        run = watch_data(tmp_path, f"run-{value}", vae="me/vae", flip=False, **settings)
        assert torch.equal(run.losses[0].x1, torch.full((16, 4, 8, 8), (value - 0.5) * 3))
        x1 = watch_data(tmp_path, f"flip-{value}", vae="me/vae", **settings).losses[0].x1
        assert set(x1.flatten().tolist()) == {(value - 0.5) * 3, (-value - 0.5) * 3}
        with pytest.raises(UserError, match="its vae is 'me/vae', the run asks for 'me/other'"):
            watch_data(tmp_path, "wrong", vae="me/other", **settings)
    assert names == ["me/vae"] * 4


# ---------------------------------------------------------------------------------------------------------------------
# systems, pyramids, compiled blocks, loggers


@setting("method")
def test_method(tmp_path, monkeypatch):
    """Each method trains by a loss, a network and a schedule of its own, and is sampled by its own sampler."""
    inputs = {}
    for method in config.METHODS:
        run = watch_data(tmp_path, method, method=method, num_scales=1 if method == "lfm" else 2, batch=20)
        assert run.losses, "another method's loss was called"
        inputs[method] = [type(run.model).__name__, *((p.t.sum().item(), [x.shape for x in p.bands],
                                                       [x.square().sum().item() for x in p.bands]) for p in run.passes)]
        with monkeypatch.context() as patch:
            patch.setattr(baselines.SYSTEMS[method], "sample", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                sample.generate(load.load_run(run.cfg.out, device="cpu"), 1, torch.arange(1), progress=False)
    methods = list(inputs)
    assert all(inputs[a] != inputs[b] for i, a in enumerate(methods) for b in methods[:i])


@setting("pyramid")
def test_pyramid(tmp_path, monkeypatch):
    """With a second pyramid, known to this test alone: what the network sees, and images from bands."""
    def smooth(x):
        return torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")

    monkeypatch.setitem(pyramid.PYRAMIDS, "smooth", (pyramid.down, smooth))
    monkeypatch.setitem(config.CHOICES, "pyramid", ("haar", "smooth"))
    with monkeypatch.context() as patch:
        patch.setattr(batches.BatchRandom, "randn", lambda self, *shape: torch.zeros(self.batch, *shape)[self.rows])
        run = watch_data(tmp_path, pyramid="smooth")
    fine = next(p for p in run.passes if len(p.bands) == 2)
    expected = pyramid.decompose(run.losses[0].x1[1::2], 2, "smooth")[1] * ((fine.t - 0.5) / 0.5).view(-1, 1, 1, 1)
    assert torch.allclose(fine.bands[1], expected, atol=1e-6)
    trained = load.load_run(run.cfg.out, device="cpu")
    for parameter in trained.model.parameters():            # its velocity is zero: noise stays as it enters
        parameter.zero_()
    images, _ = sample.generate(trained, 3, torch.arange(3), seed=5, progress=False, solver="euler", steps=2)
    coarse, fine = pyramid.decompose(ImageRandom(5, range(3)).randn(1, 8, 8), 2, "smooth")
    assert np.array_equal(images, batches.to_images(smooth(coarse) + fine / 2))


@setting("compile")
def test_compile(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    assert not compiled and watch_data(tmp_path, "plain") and not compiled
    run = watch_data(tmp_path, compile=True)
    assert [block for block, _ in compiled] == list(run.model.blocks)
    assert all(options == dict(dynamic=False, fullgraph=True) for _, options in compiled)


@setting("shard")
def test_shard(tmp_path, monkeypatch):
    """What it does with several processes is in tests/test_ranks.py: each of two keeps half of the two moments."""
    asked, original = [], Ranks.optimizer
    monkeypatch.setattr(Ranks, "optimizer", lambda self, weights, shard, **settings: (
        asked.append(shard), original(self, weights, shard, **settings))[1])
    runs = [watch_data(tmp_path, str(shard), shard=shard) for shard in (False, True)]
    assert asked == [False, True]
    plain, sharded = (memory.memory_bytes(run.model, run.cfg, 1, world=2) for run in runs)
    assert plain - sharded == 4 * memory.parameters(runs[0].model)


@setting("logger")
def test_logger(tmp_path, monkeypatch):
    numbers = []
    writer = SimpleNamespace(add_scalar=lambda *number: numbers.append(number), flush=lambda: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(
        SummaryWriter=lambda folder, purge_step: writer))
    for logger in ("", "tensorboard"):
        numbers.clear()
        run = watch_data(tmp_path, f"run-{logger}", logger=logger)
        assert (("loss", metrics(run.cfg.out)[0]["loss"], 1) in numbers) == bool(logger)


def test_a_line_of_metrics_that_is_being_written_is_not_drawn(tmp_path, monkeypatch):
    line, curves = json.dumps({"step": 5, "loss_bands": [1.0]}), []
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{line[:9]}")
    monkeypatch.setattr(pictures, "plot", lambda path, given, *_, **__: curves.extend(given))
    pictures.draw_loss(tmp_path)
    assert [curve[:2] for curve in curves] == [((5,), (1.0,))]


# ---------------------------------------------------------------------------------------------------------------------
# sampling, watched


def watch_sampling(patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """From now on: solves (each call of torchdiffeq: method, rtol, atol, options, y0, and at each call of the velocity
    its time and value), passes (each pass of the network of a loaded run: bands, t, y), runs, and dtypes as in `watch`.
    Pictures are left out."""
    trace = SimpleNamespace(solves=[], passes=[], runs=[], dtypes=[])
    odeint, load_run = sample.odeint, load.load_run

    def watched_odeint(field, y0, times, **settings):
        solve = SimpleNamespace(y0=y0, times=times, calls=[], **settings)

        def watched_field(t, y):
            v = field(t, y)
            solve.calls.append((t.item(), v))
            return v

        trace.solves.append(solve)
        return odeint(watched_field, y0, times, **settings)

    def watched_load(*arguments, **settings):
        run = load_run(*arguments, **settings)
        run.model.register_forward_pre_hook(lambda m, inputs: trace.passes.append(
            SimpleNamespace(bands=inputs[0], t=inputs[1], y=inputs[2])))
        run.model.blocks[0].qkv[0].register_forward_hook(lambda m, inputs, out: trace.dtypes.append(out.dtype))
        trace.runs.append(run)
        return run

    patch.setattr(sample, "odeint", watched_odeint)
    patch.setattr(load, "load_run", watched_load)
    for name in ("draw_grid", "draw_loss", "draw_trajectory"):
        patch.setattr(pictures, name, lambda *_, **__: None)
    patch.setattr(pictures, "watch", lambda *_: None)
    return trace


def grid_of(solve: SimpleNamespace) -> list[float]:
    """The times of a solver with fixed steps."""
    return solve.options["grid_constructor"](None, solve.y0, solve.times).tolist()


@setting("num_samples", "sample_every", "eval_every", "solver", "solver_steps", "cfg_scale")
def test_samples_of_training(tmp_path, monkeypatch):
    """16 images at steps 2 and 4, nine at step 3, nine at the end, all by Heun's solver in six steps, guided."""
    trace, grids, scored, scales = watch_sampling(monkeypatch), [], [], []
    monkeypatch.setattr(pictures, "watch", lambda run, model, *_: scales.append(model.cfg_scale))
    monkeypatch.setattr(pictures, "draw_grid", lambda path, images, *_: grids.append((path.name, len(images))))
    monkeypatch.setattr(fid, "evaluate", lambda dataset, images, *_: scored.append(len(images)) or {})
    monkeypatch.setattr(fid, "table", lambda scores: "")
    passes, generate = [], sample.generate

    def watched_generate(run, *arguments, **settings):
        handle = run.model.register_forward_pre_hook(lambda m, inputs: passes.append(inputs[2]))
        try:
            return generate(run, *arguments, **settings)
        finally:
            handle.remove()

    monkeypatch.setattr(sample, "generate", watched_generate)
    cfg = tiny(tmp_path, steps=6, sample_every=2, eval_every=3, num_samples=9, solver="heun", solver_steps=6,
               cfg_scale=1.7)
    train_and_score(cfg)
    assert grids == [("samples-00000002.png", 16), ("samples-00000004.png", 16), ("samples.png", 9)]
    assert scored == [9, 9] and [line["step"] for line in checkpoint.read_lines([tmp_path / "run/scores.jsonl"])] == [3]
    assert [len(solve.y0) for solve in trace.solves[::2]] == [16, 9, 16, 9]
    assert {solve.method for solve in trace.solves} == {"heun2"}
    assert all(len(grid_of(solve)) == 3 + 1 for solve in trace.solves)
    assert all((y.chunk(2)[1] == 10).all() and (y.chunk(2)[0] < 10).all() for y in passes)      # guided: both halves
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["cfg_scale"] == 1.7 and scores["num"] == 9 and scales == [1.7]        # and of the trajectory


@setting("rtol", "atol")
def test_tolerances_of_the_samples_of_training(tmp_path, monkeypatch):
    trace = watch_sampling(monkeypatch)
    monkeypatch.setattr(fid, "evaluate", lambda *_: {})
    monkeypatch.setattr(fid, "table", lambda scores: "")
    train_and_score(tiny(tmp_path, steps=1, solver="dopri5", solver_steps=0, rtol=0.3, atol=0.2))
    assert [(solve.method, solve.rtol, solve.atol) for solve in trace.solves] == [("dopri5", 0.3, 0.2)] * 2


@setting("noise_scale")
def test_noise_scale_of_the_samples_of_training(tmp_path, monkeypatch):
    """Training itself has unit noise."""
    for name in ("fid.evaluate", "fid.table"):
        monkeypatch.setattr(name, lambda *_: {})
    runs = [tiny(tmp_path, name, steps=1, num_samples=4, noise_scale=scale) for name, scale in (
        ("plain", ()), ("scaled", (0.5, 2.0)))]
    traces = []
    for cfg in runs:
        with monkeypatch.context() as patch:
            traces.append(watch_sampling(patch))
            train_and_score(cfg)
    plain, scaled = (trace.solves[0].y0 for trace in traces)
    assert torch.equal(scaled, 0.5 * plain) and same(*(state(cfg)["model"] for cfg in runs))


# ---------------------------------------------------------------------------------------------------------------------
# the flags of sample.py and fid.py


def save_run(folder: Path, vectors: Tensor | None = None, **settings) -> Config:
    """A run that nobody trained: both sets of weights are random, so that they differ."""
    cfg = tiny(folder.parent, folder.name, **settings)
    facts = {**batches.facts(batches.load(tiny(folder.parent))), "vectors": None}
    if vectors is not None:
        facts |= {"classes": [], "vectors": list(vectors.shape)}
    model, ema = (load.build_model(cfg, facts, vectors) for _ in range(2))
    folder.mkdir()
    checkpoint.save(folder, {"step": 1, "config": cfg.to_dict(), "data": facts, "optimizer": {},
                             "model": randomize(model).state_dict(), "ema": randomize(ema).state_dict()})
    return cfg


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Runs with solvers of their own: fixed, adaptive, guided; and one on vectors."""
    root, torch_state = tmp_path_factory.mktemp("runs"), torch.get_rng_state()
    save_run(root / "fixed", solver="heun", solver_steps=6)
    save_run(root / "adaptive", solver="dopri5", solver_steps=0, rtol=0.3, atol=0.2)
    save_run(root / "guided", cfg_scale=1.7)
    save_run(root / "vectors", torch.randn(5, 3), condition="vectors")
    torch.set_rng_state(torch_state)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def draw(folders, tmp_path, monkeypatch):
    """draw("fixed", "--seed", "3"): python sample.py with these flags, watched; with .images and .labels."""
    def draw(name, *flags):
        with monkeypatch.context() as patch:
            trace, out = watch_sampling(patch), tmp_path / f"{len(list(tmp_path.iterdir()))}"
            patch.setattr(sys, "argv", ["sample.py", str(folders[name]), "--device", "cpu", "-n", "4", "--out",
                                        str(out), *flags])
            sample.main()
        if (out / "samples.npz").exists():
            with np.load(out / "samples.npz") as arrays:
                trace.images, trace.labels = arrays["images"], arrays["labels"]
        trace.out, (trace.run,) = out, trace.runs
        return trace

    return draw


def test_without_flags_the_settings_are_those_of_the_run(draw):
    trace = draw("fixed")
    assert [(solve.method, len(grid_of(solve))) for solve in trace.solves] == [("heun2", 4)] * 2
    assert trace.labels.tolist() == [0, 1, 2, 3] and [p.y.tolist() for p in trace.passes[:1]] == [[0, 1, 2, 3]]
    assert trace.run.weights == "ema" and set(trace.dtypes) == {torch.float32}
    trace = draw("adaptive")
    assert {(solve.method, solve.rtol, solve.atol) for solve in trace.solves} == {("dopri5", 0.3, 0.2)}
    assert not any({"norm", "jump_t"} & solve.options.keys() for solve in trace.solves)
    assert {tuple(p.y.tolist()) for p in draw("guided").passes} == {(0, 1, 2, 3, 10, 10, 10, 10)}


def test_flags_of_the_solver(draw):
    assert [(s.method, len(grid_of(s))) for s in draw("adaptive", "--solver", "rk4", "--steps", "8").solves] == [
        ("rk4", 5)] * 2
    assert [(s.method, len(grid_of(s))) for s in draw("fixed", "--steps", "10").solves] == [("heun2", 6)] * 2
    for flag, rtol, atol in (("--rtol", 0.5, 0.2), ("--atol", 0.3, 0.5)):
        assert {(s.rtol, s.atol) for s in draw("adaptive", flag, "0.5").solves} == {(rtol, atol)}
    assert {s.method for s in draw("fixed", "--solver", "dopri5", "--rtol", "0.5").solves} == {"dopri5"}
    norm = draw("adaptive", "--norm", "sample").solves[0].options["norm"]
    assert norm(torch.tensor([[1.0, 1.0], [7.0, 7.0], [0.0, 0.0]])) == 7        # of the worst image


def test_noise_scale(draw):
    noise = pyramid.decompose(ImageRandom(0, range(4)).randn(1, 8, 8), 2)
    trace = draw("fixed", "--noise-scale", "0.5,3")
    first, second = (solve.y0 for solve in trace.solves)
    assert torch.equal(first, 0.5 * noise[0].flatten(1))
    assert torch.allclose(second[:, 16:], 3 * 0.5 * noise[1].flatten(1))        # band 1 enters at T_1 = 0.5
    assert json.loads((trace.out / "report.json").read_text())["noise_scale"] == [0.5, 3.0]
    assert json.loads((draw("fixed").out / "report.json").read_text())["noise_scale"] == []


def test_the_noise_scale_of_a_run_can_be_left_out(tmp_path):
    cfg = tiny(tmp_path, steps=1, noise_scale=(1.0, 0.5))
    train.train(cfg, device="cpu")
    given = {scale: load.load_run(cfg.out, device="cpu", noise_scale=scale).schedule.noise_scale
             for scale in (None, (), (1.0, 0.9))}
    assert given == {None: (1.0, 0.5), (): (), (1.0, 0.9): (1.0, 0.9)}


def test_tolerances_matter_separately():
    """A smaller rtol or a smaller atol alone costs more calls."""
    def calls(**tolerances):
        return sample.solve(lambda bands, t: [torch.cos(20 * t) * band for band in bands], [torch.ones(1, 1, 4, 4)],
                            schedule=baselines.lapflow.schedule(Config(num_scales=1, starts=(0.0,))), **tolerances)[1]

    loose = calls(rtol=1e-2, atol=1e-2)
    assert calls(rtol=1e-7, atol=1e-2) >= loose and calls(rtol=1e-2, atol=1e-7) > loose
    assert calls(rtol=1e-7, atol=1e-7) > max(calls(rtol=1e-7, atol=1e-2), calls(rtol=1e-2, atol=1e-7))


def test_seed_labels_number_and_batch(draw, folders):
    plain, seeded = draw("fixed"), draw("fixed", "--seed", "5", "-n", "5")
    noise = pyramid.decompose(ImageRandom(5, range(5)).randn(1, 8, 8), 2)[0]
    assert torch.equal(seeded.solves[0].y0, noise.flatten(1)) and len(seeded.images) == 5
    assert not torch.equal(plain.solves[0].y0, seeded.solves[0].y0[:4])
    parts = draw("fixed", "--seed", "5", "-n", "5", "--batch", "2")
    assert [len(solve.y0) for solve in parts.solves[::2]] == [2, 2, 1]
    assert np.abs(parts.images.astype(int) - seeded.images).max() <= 1
    sevens = draw("fixed", "--labels", "7")
    assert sevens.labels.tolist() == [7] * 4 and all((p.y == 7).all() for p in sevens.passes)
    assert not np.array_equal(sevens.images, plain.images)


def test_vectors(draw, tmp_path):
    np.save(tmp_path / "asked.npy", np.array([[1, 2, 3], [4, 5, 6]], np.float32))
    trace = draw("vectors", "--vectors", str(tmp_path / "asked.npy"))
    assert {tuple(p.y.flatten().tolist()) for p in trace.passes} == {(1, 2, 3, 4, 5, 6) * 2}
    examples = draw("vectors")
    assert all(torch.equal(p.y, examples.run.condition.examples[:4]) for p in examples.passes)
    guided = draw("vectors", "--cfg", "2")
    assert all(p.y[4:].isnan().all() and not p.y[:4].isnan().any() for p in guided.passes)


def test_vectors_that_were_written_anew_are_not_mixed_in(draw, tmp_path):
    flags = ("--vectors", str(tmp_path / "v.npy"), "--format", "shards", "--out", str(tmp_path / "out"))
    np.save(tmp_path / "v.npy", np.ones((1, 3)))
    assert draw("vectors", *flags).passes and not draw("vectors", *flags).passes
    np.save(tmp_path / "v.npy", np.zeros((1, 3)))
    with pytest.raises(UserError, match="holds other samples"):
        draw("vectors", *flags)


def test_guidance(draw, folders):
    """v_null + w (v_cond - v_null), by passes of its own."""
    trace, run = draw("guided", "--cfg", "2.5"), load.load_run(str(folders["guided"]), device="cpu")
    (_, v), p = trace.solves[0].calls[0], trace.passes[0]
    with torch.no_grad():
        (with_label,), (without,) = (run.model([p.bands[0][:4]], p.t[:4], y) for y in (torch.arange(4), torch.full(
            (4,), 10)))
    assert torch.allclose(v, (without + 2.5 * (with_label - without)).flatten(1), atol=1e-5)
    assert {len(p.t) for p in draw("guided", "--cfg", "1").passes} == {4}       # no second half


def test_guidance_in_an_interval_stops_at_its_ends(draw):
    trace = draw("adaptive", "--cfg", "2", "--cfg-interval", "0.3,0.7")
    for p in trace.passes:
        t = p.t[0].item()
        assert len(p.t) == (8 if 0.3 <= t <= 0.7 else 4) or min(abs(t - 0.3), abs(t - 0.7)) < 1e-6
    times = [t for solve in trace.solves for t, _ in solve.calls]
    for end in (0.3, 0.7):
        assert min(abs(t - end) for t in times) < 1e-6                          # a step ends there
        assert {len(p.t) for p in trace.passes if abs(p.t[0] - end) < 0.4} == {4, 8}
    assert [solve.options["jump_t"].tolist() for solve in trace.solves] == [[0.3], [0.7]]


def test_weights_precision_and_compiled_blocks(draw, folders, monkeypatch):
    saved = checkpoint.load_newest(folders["fixed"])
    for flags, key in (((), "ema"), (("--raw",), "model")):
        trace = draw("fixed", *flags)
        assert same(dict(trace.run.model.state_dict()), dict(saved[key])) and trace.run.weights == {"ema": "ema"}.get(
            key, "raw")
    half = draw("fixed", "--precision", "bfloat16")
    assert set(half.dtypes) == {torch.bfloat16} and half.solves[0].y0.dtype == torch.float32
    assert all(v.dtype == torch.float32 for solve in half.solves for _, v in solve.calls)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    assert len(draw("fixed", "--compile").run.model.blocks) == len(compiled) == 2


def test_formats_and_exports(draw, folders, tmp_path, monkeypatch):
    assert {p.name for p in draw("fixed", "--format", "shards", "--batch", "2").out.glob("*.npz")} == {
        "shard-00000000.npz", "shard-00000002.npz"}
    draw("fixed", "--export", str(tmp_path / "export"), "--raw")
    exported = load.load_run(str(tmp_path / "export"), device="cpu")
    assert exported.weights == "raw" and same(dict(exported.model.state_dict()),
                                              dict(checkpoint.load_newest(folders["fixed"])["model"]))
    names = []
    monkeypatch.setattr(load, "load_run", lambda *arguments: names.append(arguments) or 1 / 0)
    monkeypatch.setattr(sys, "argv", ["sample.py", "somewhere", "--vae", "me/vae", "--raw", "--device", "cpu",
                                      "--noise-scale", "1,0.5"])
    with pytest.raises(ZeroDivisionError):
        sample.main()
    assert names == [("somewhere", True, "cpu", "me/vae", (1.0, 0.5))]


def test_fid_draws_with_its_flags(folders, monkeypatch):
    calls, draw_batches = [], sample.draw_batches

    def watched(run, chunks, y, seed, **settings):
        calls.append((run.weights, run.cfg.noise_scale, chunks, y.tolist(), seed, settings))
        return draw_batches(run, chunks, y, seed, **settings)

    monkeypatch.setattr(sample, "draw_batches", watched)
    flags = "-n 6 --seed 5 --batch 4 --labels 7 --cfg 2 --cfg-interval 0.1,0.9 --solver rk4 --steps 3 --raw"
    monkeypatch.setattr(sys, "argv", ["fid.py", str(folders["fixed"]), "--device", "cpu", *flags.split(),
                                      "--noise-scale", "1,0.5"])
    fid.main()
    settings = dict(solver="rk4", norm="batch", cfg_scale=2.0, interval=(0.1, 0.9), precision="float32", steps=3)
    assert calls == [("raw", (1.0, 0.5), [range(4), range(4, 6)], [7] * 6, 5, settings)]
    calls.clear()
    flags = "-n 6 --rtol 0.4 --atol 0.6 --norm sample"
    monkeypatch.setattr(sys, "argv", ["fid.py", str(folders["adaptive"]), "--device", "cpu", *flags.split()])
    fid.main()
    (weights, *_, settings), = calls
    assert weights == "ema" and (settings["rtol"], settings["atol"], settings["norm"]) == (0.4, 0.6, "sample")


# ---------------------------------------------------------------------------------------------------------------------
# the command line of train.py


def test_each_flag_sets_its_setting_and_no_other(monkeypatch):
    values = {**ODD, "dataset": "folder", "data": "D", "res": 24, "condition": "vectors", "space": "latent",
              "vae": "V", "latents": "L", "flip": False, "skip_bad": True, "init": "I", "out": "O",
              "method": "separate", "num_scales": 3, "patches": (2.0, 1.0), "pyramid": "haar", "stages": "batch",
              "stage_weights": (1.0, 3.0), "compile": True, "precision": "bfloat16", "shard": True, "solver": "heun",
              "rtol": 0.3, "atol": 0.2, "solver_steps": 9, "cfg_scale": 1.7, "noise_scale": (1.0, 0.5),
              "num_samples": 11, "sample_every": 12, "eval_every": 13, "logger": "tensorboard", "keep": 14,
              "keep_every": 15}
    assert values.keys() == {field.name for field in dataclasses.fields(Config)}
    free, pair = Config(out="O"), {"solver", "solver_steps"}                   # these two go together
    for name, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        flag = "--" + name.replace("_", "-")
        flags = [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, text]
        more = {"space": ["--vae", "V", "--dataset", "folder"], "num_scales": ["--starts", "0,0.2,0.6"],
                "solver": ["--solver-steps", "3"], "solver_steps": ["--solver", "heun"], "out": []}.get(name, [])
        given = {}
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, *more])
        monkeypatch.setattr(train, "train", lambda cfg, *_, given=given: given.update(cfg=cfg))
        train.main()
        assert getattr(given["cfg"], name) == value, name
        changed = {field for field in values if getattr(given["cfg"], field) != getattr(free, field)}
        if name not in ("dataset", "res", "space", "num_scales"):               # these choose a preset
            assert changed - {"out"} - pair == {name} - {"out", "pyramid"} - pair, name


def test_options_of_train_reach_it(monkeypatch, tmp_path, capsys):
    given, job = {}, object()
    monkeypatch.chdir(tmp_path)

    def fake_train(cfg, fresh, device, stop_after):
        given.update(cfg=cfg, fresh=fresh, device=device, stop_after=stop_after)
        return job

    monkeypatch.setattr(train, "train", fake_train)
    monkeypatch.setattr(train, "finish", lambda job, record: given.update(job=job, record=record))
    monkeypatch.setattr(sys, "argv", ["train.py", "--fresh", "--device", "cpu", "--record", "R", "--stop-after", "2m"])
    train.main()
    assert given.pop("cfg") == Config(out="out/digits")
    assert given == dict(fresh=True, device="cpu", stop_after=120, job=job, record="R")
    (tmp_path / "R").unlink()                               # made before the training, so that a wrong path is known
    given.clear()
    monkeypatch.setattr(sys, "argv", ["train.py", "--dry-run", "--size", "32,2,2,2"])
    train.main()
    assert not given and not list(tmp_path.iterdir()) and "parameters" in capsys.readouterr().out


def test_a_record_holds_the_settings_and_the_scores(tmp_path, monkeypatch):
    cfg = tiny(tmp_path, steps=1)
    for _ in range(2):
        train_and_score(cfg, str(tmp_path / "lines.jsonl"))
    first, second = checkpoint.read_lines([tmp_path / "lines.jsonl"])
    assert first["config"] == second["config"] == cfg.to_dict() and first["num"] == second["num"] == cfg.num_samples
    assert first["frechet_pixel"] == second["frechet_pixel"]
    assert "seconds_total" in first and "seconds_total" not in second           # a continued run does not know


def test_a_lower_bound_of_memory_chooses_the_micro_batch(tmp_path, monkeypatch):
    """Without --micro-batch it is the largest divisor of the batch that fits the free memory."""
    cfg = tiny(tmp_path, steps=1)
    model = load.build_model(cfg, batches.facts(batches.load(cfg)))
    room = memory.memory_bytes(model, cfg, 8) / 0.89
    monkeypatch.setattr(memory, "free_memory", lambda device: room)
    run = watch_data(tmp_path, "run")
    assert {len(x.x1) for x in run.losses} == {8}


# ---------------------------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize("command", [
    "train.py --dataset cats", "train.py --batch 1", "train.py --stop-after soon", "train.py --starts 0,1.5",
    "sample.py nowhere", "sample.py --num 0", "fid.py nowhere", "fid.py --num 3",
    "data.latents --res 4", "data.latents --data nowhere", "scores.reference --res 0",
    "scores.reference --data nowhere", "extras.causal preview nowhere", "extras.causal vary nowhere --number 1",
    "studies.bench gpu --budget 0", "studies.bench compare --sides 30",
    "studies.compare --seeds 0"])
def test_a_program_ends_with_one_sentence_and_1(monkeypatch, tmp_path, command):
    """An exit with text is that text on stderr and exit code 1. No traceback, nothing written."""
    program, *flags = command.split()
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, tmp_path, program, *flags)
    assert re.fullmatch(r"error: [^\n]{10,}", str(stop.value.code)), stop.value.code
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_exit_code_of_a_process_is_1(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--batch", "1"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and not done.stdout and re.fullmatch(r"error: [^\n]+\n", done.stderr)


def test_every_setting_is_in_the_table():
    """A new setting without a test fails here."""
    assert TABLE.keys() == {field.name for field in dataclasses.fields(Config)}
