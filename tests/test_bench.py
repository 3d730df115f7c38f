"""studies.bench counts exactly, and what it times is what it prints."""

import json
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

from config import Config, UserError
from data import batches
from run import checkpoint, memory, paper
from studies import bench, compare, gpu, timing


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """program("compare", "--sides", "16"): what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, words)])
        capsys.readouterr()
        bench.main()
        return capsys.readouterr().out

    return run


def line(tmp_path, number=-1):
    return json.loads((tmp_path / "lines.jsonl").read_text().splitlines()[number])


def test_medians_over_rounds_that_take_turns():
    order = []

    def work(name, pause):
        order.append(name)
        time.sleep(pause)

    taken = timing.in_turn({"a": lambda: work("a", 0.001), "b": lambda: work("b", 0.02)}, 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4 and taken["b"] > 0.02 > taken["a"] > 0.001


def test_it_waits_for_the_device_that_was_named(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda:1")
    timing.seconds(lambda: waited.append("work"), device)
    assert waited == [device, "work", device]


def test_a_pass_of_a_stage_is_forward_and_backward_of_its_bands():
    model = bench.MoTDiT((32, 2, 2, 2), 4, 16, 2, 10)
    inputs, calls = [model.stage_inputs(stage, 3) for stage in range(2)], []
    model.register_forward_hook(lambda module, given, out: calls.append((len(given[0]), out[0].requires_grad)))
    for backward in (True, False):
        for bands, t in inputs:
            bench.one_pass(model, bands, t, torch.tensor([0, 1, 2]), backward)
    assert calls == [(1, True), (2, True), (1, False), (2, False)]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_training_pass_trains_one_stage_on_the_same_images():
    cfg = Config(space="latent", dataset="imagenet", res=128, vae="x", size="32,1,2,2", num_scales=3)
    model = gpu.random_network(cfg, "cpu")
    for stage in range(3):
        work = gpu.training_pass(model, cfg, stage, 4, "float32")
        assert torch.equal(work(), work())
        trained = [layer.linear.weight.grad is not None for layer in model.patch_out]
        assert trained == [i <= stage for i in range(3)]


def test_the_random_network_leaves_the_generator_of_torch_alone():
    """After a recording that failed, that of a GPU may refuse; the positions are those of a new network."""
    cfg, before = Config(space="latent", dataset="imagenet", res=128, vae="x", size="32,1,2,2"), torch.get_rng_state()
    model, again = gpu.random_network(cfg, "cpu"), gpu.random_network(cfg, "cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    new = gpu.load.build_model(cfg, gpu.memory.paper_facts(cfg))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), new.buffers(), strict=True))
    assert min(parameter.std() for parameter in model.parameters()) > 0.01


def test_stages_are_timed_with_a_micro_batch_that_fits(tmp_path, monkeypatch):
    """Images per second are those of whole steps: micro-batches of each stage, and the end of the step."""
    def training_pass(model, cfg, stage, micro, precision):
        if micro * (stage + 1) > 6:
            raise torch.OutOfMemoryError
        return lambda: time.sleep(0.002 * (stage + 1))

    monkeypatch.setattr(gpu, "training_pass", training_pass)
    job = gpu.Job("stages", tmp_path, tmp_path, dry=True, data="", ends=0)
    model = gpu.random_network(job.preset("celebahq-256"), "cpu")
    assert gpu.time_stages(job, "celebahq-256", model, "eager", [6, 6], end=0.02) == [6, 3]
    first, failed, again, training = checkpoint.read_lines([tmp_path / "gpu.jsonl"])
    assert (first["micro_batch"], failed["figure"], failed["stage"]) == (6, "out of memory", 1)
    assert [(row["stage"], row["micro_batch"]) for row in (first, again)] == [(0, 6), (1, 3)]
    seconds = (first["milliseconds"] + 2 * again["milliseconds"]) / 2 / 1000            # of six images, mean of stages
    assert training["images_per_second"] == pytest.approx(6 / (seconds + 0.02)) and seconds > 0.005
    assert training["micro_batches"] == [6, 3]


def test_the_runs_of_the_second_command_are_planned_as_on_a_gpu(tmp_path):
    """The dry run has other systems and patches: what does not fit at patch 2 would end the command on a GPU."""
    job = gpu.Job("quality", tmp_path, tmp_path, dry=False, data=gpu.random_clothes(tmp_path / "clothes"), ends=0)
    args, planned = gpu.plan_quality(job)
    assert {name for name, _ in planned} == set(compare.IMAGES) - {"DFM"} and set(gpu.FIRST) <= set(args.only)
    assert len(planned) == 3 * len(args.only) and {cfg.seed for _, cfg in planned} == {0, 1, 2}
    settings = {(cfg.size, cfg.precision, cfg.batch, cfg.lr) for _, cfg in planned}
    assert settings == {("128,6,4,2", "bfloat16", 256, 2e-3)}


def test_training_here_writes_no_checkpoint(tmp_path):
    job = gpu.Job("curves", tmp_path, tmp_path, dry=True, data="", ends=time.monotonic() + 60)
    with pytest.MonkeyPatch.context() as patch:             # the functions that a section of its own process replaces
        for module, name in ((gpu.train, "save"), (gpu.checkpoint, "prepare")):
            patch.setattr(module, name, getattr(module, name))
        state, lines = gpu.train_here(job, Config(size="32,1,2,4", steps=2, log_every=1))
    assert state.step == 2 and len(lines) == 2 and not list(tmp_path.rglob("*.pt"))


def test_the_random_cache_is_one_that_training_reads(tmp_path):
    cfg = Config(**paper.PRESETS["imagenet-256-B"].settings, latents=str(tmp_path / "cache"))
    gpu.random_cache(tmp_path / "cache", cfg, count=5)
    dataset = batches.load(cfg)
    assert len(dataset) == 5 and len(dataset.classes) == 1000 and dataset.reference(5)[0].shape == (5, 4, 32, 32)


# ---------------------------------------------------------------------------------------------------------------------
# compare, and the command line


@pytest.mark.slow
def test_compare_measures_the_same_shapes(monkeypatch, program, tmp_path):
    for name, value in (("WIDTH", 32), ("DEPTH", 1), ("HEADS", 2)):
        monkeypatch.setattr(bench, name, value)
    out = program("compare", "--sides", "16", "--rounds", 1, "--device", "cpu", "--record", "lines.jsonl")
    result = line(tmp_path)
    assert result["num_scales"] == 3 and result["batch"] == 32 and 0.3 < result["limit"] < 0.6
    flops = [memory.forward_flops(bench.ours(16, scales).to("meta")) for scales in (3, 1)]
    assert result["limit"] == pytest.approx(statistics.mean(flops[0]) / flops[1][0])
    for what in ("forward and backward", "forward"):
        seconds = result[what]["seconds"]
        assert {"ours, stage 0", "ours, stage 2", "diffusers DiT, stage 2"} <= set(seconds)
        assert "diffusers DiT, stage 0" not in seconds and min(seconds.values()) > 0
        mean = sum(seconds[f"ours, stage {s}"] for s in range(3)) / 3
        assert result[what]["over"]["diffusers DiT"] == pytest.approx(mean / seconds["diffusers DiT, stage 2"])
    assert "ours / diffusers DiT" in out


@pytest.mark.parametrize("command, words", [
    ("compare --rounds 0", "--rounds must be at least 1"), ("compare --sides 30", "divisible by 8, like 32,64; not 30"),
    ("compare --sides x", "divisible by 8"), ("gpu-colour --budget -1", "--budget must be above 0 seconds, not -1"),
    ("gpu --out lines.jsonl", "results cannot be appended to lines.jsonl/gpu.jsonl")])
def test_errors(program, tmp_path, command, words):
    (tmp_path / "lines.jsonl").touch()
    with pytest.raises(UserError, match=words):
        program(*command.split())


@pytest.mark.parametrize("command", ["compare --size B/2", "train", "compare --precision bfloat16", "count",
                                     "gpu --record out", "gpu --data clothes"])
def test_each_command_takes_its_own_flags_only(program, command, capsys):
    with pytest.raises(SystemExit):
        program(*command.split())
    assert "error:" in capsys.readouterr().err


def test_the_commands_for_a_gpu_and_their_flags(program, monkeypatch):
    asked = []
    monkeypatch.setattr(bench.gpu, "measure", lambda *given: asked.append(given))
    program("gpu")
    program("gpu", "--budget", "90", "--out", "here", "--dry-run")
    program("gpu-quality", "--data", "clothes")
    program("gpu-colour")
    assert asked == [("gpu", Path("out/gpu"), 560, False, ""), ("gpu", Path("here"), 90, True, ""),
                     ("gpu-quality", Path("out/gpu-quality"), 480, False, "clothes"),
                     ("gpu-colour", Path("out/gpu-colour"), 300, False, "")]
