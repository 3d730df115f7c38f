"""studies.bench counts exactly, and what it times is what it prints."""

import builtins
import json
import statistics
import sys
import time

import pytest
import torch

import train
from config import Config, UserError
from conftest import metrics, tiny
from data import latents
from run import load, memory, paper
from run.ranks import Ranks
from run.solver import solver_settings
from studies import bench


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


def test_counts_of_presets_and_systems(program, tmp_path, monkeypatch):
    some = {name: cfg for name, cfg in bench.plan.rows().items() if name.removeprefix("celebahq-") in (
        "256", "1024", "256-lfm", "256-pyramidal", "256-edify", "256-separate", "256-mask-none")}
    monkeypatch.setattr(bench.plan, "rows", lambda: some)
    out = program("count", "--record", "lines.jsonl")
    rows = {row["preset"]: row for row in line(tmp_path)["rows"]}
    assert rows["celebahq-256-lfm"]["share"] == 1 and rows["celebahq-256-dfm"]["share"] == pytest.approx(1, abs=1e-2)
    assert rows["celebahq-256"]["tokens"] == [64, 320] and 0.5 < rows["celebahq-1024"]["share"] < 0.54
    assert rows["celebahq-256-dfm"]["tokens"] == [256, 256]
    attention = {name: f"{rows[name]['attention']:.3f}" for name in rows if rows[name]["attention"]}
    assert attention["celebahq-1024"] == "0.493" and attention["celebahq-256-mask-none"] == "0.812"
    assert {row["method"] for row in rows.values()} >= {"lapflow", "lfm", "pyramidal", "edify", "dfm", "separate"}
    for name, row in rows.items():
        cells = next(text for text in out.splitlines() if text.startswith(f"| {name} |"))
        assert f"| {row['parameters'] / 1e6:.1f} |" in cells and f"| {row['share']:.3f} |" in cells


def test_medians_over_rounds_that_take_turns():
    order = []

    def work(name, pause):
        order.append(name)
        time.sleep(pause)

    taken = bench.in_turn({"a": lambda: work("a", 0.001), "b": lambda: work("b", 0.02)}, 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4 and taken["b"] > 0.02 > taken["a"] > 0.001


def test_it_waits_for_the_device_that_was_named(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda:1")
    bench.seconds(lambda: waited.append("work"), device)
    assert waited == [device, "work", device]


def test_a_pass_of_a_stage_is_forward_and_backward_of_its_bands():
    model = bench.MoTDiT((32, 2, 2, 2), 4, 16, 2, 10)
    inputs, calls = [model.stage_inputs(stage, 3) for stage in range(2)], []
    model.register_forward_hook(lambda module, given, out: calls.append((len(given[0]), out[0].requires_grad)))
    for backward in (True, False):
        for work in bench.passes(model, inputs, torch.tensor([0, 1, 2]), "float32", backward).values():
            work()
    assert calls == [(1, True), (2, True), (1, False), (2, False)]
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# train


@pytest.mark.parametrize("method, shares", [("lapflow", (0.5, 0.5)), ("dfm", (0.9, 0.1))])
def test_throughput_is_the_batch_over_the_mean_of_the_stages(method, shares, program, tmp_path):
    """The loop's own rate, when a batch trains one stage, depends on the stages drawn."""
    program("train", "--preset", "imagenet-256-B", "--method", method, "--size", "32,2,2,2", "--steps", 4, "--batch", 8,
            "--log-every", 1, "--no-compile", "--device", "cpu", "--rounds", 1, "--record", "lines.jsonl")
    result = line(tmp_path)
    assert result["processes"] == 1 and result["batch"] == result["micro_batch"] == 8 and result["config"]["steps"] == 4
    mean = sum(share * result[f"stage {s}, ms"] for s, share in enumerate(shares)) / 1000
    assert result["images_per_second"] == pytest.approx(8 / mean) and result["images_per_second_loop"] > 0
    assert result["mfu"] is None and result["stage 1, mfu"] is None and 0 <= result["data_wait"] < 1


def test_the_loop_s_rate_is_its_images_over_its_seconds(tmp_path):
    cfg = tiny(tmp_path, steps=8, log_every=2, save_every=100)
    with Ranks.start("cpu") as ranks:
        result = bench.bench_train(cfg, ranks, 1)
    seconds = [2 * 16 / row["images_per_second"] for row in metrics(cfg.out)]
    assert result["images_per_second_loop"] == pytest.approx(4 * 16 / sum(seconds[2:]))
    assert result["row"] == "" and result["seconds_first_line"] == pytest.approx(seconds[0])


def test_the_random_cache_is_one_that_training_reads(tmp_path):
    cfg = Config(**paper.PRESETS["imagenet-256-B"].settings, latents=str(tmp_path / "cache"))
    bench.random_cache(tmp_path / "cache", cfg, count=5)
    dataset = bench.train.batches.load(cfg)
    assert len(dataset) == 5 and len(dataset.classes) == 1000 and dataset.reference(5)[0].shape == (5, 4, 32, 32)


# ---------------------------------------------------------------------------------------------------------------------
# sample


@pytest.mark.parametrize("settings", [dict(), dict(method="dfm", size="32,2,2,2"), dict(method="lfm", num_scales=1,
                                                                                       starts=(0.0,))])
def test_sampling_of_a_trained_run(tmp_path, settings):
    train.train(tiny(tmp_path, steps=2, **settings), device="cpu")
    run = load.load_run(str(tmp_path / "run"), device="cpu")
    result = bench.bench_sample(run, solver_settings(run.cfg), 1, sizes=(2, 4))
    for batch in (2, 4):
        row = result[f"batch {batch}"]
        assert row["nfe"] == 8 and row["seconds_with_decoding"] > row["seconds_per_image"] > 0
        assert (row["preview_speed_up"] is None) == bool(settings)


def test_a_preset_is_sampled_with_random_weights_and_a_decoder_of_its_shape(tmp_path, monkeypatch):
    cfg = paper.resolve({"preset": "celebahq-256", "size": "32,1,2,2", "out": str(tmp_path)})
    decoded = []
    monkeypatch.setattr(latents.Autoencoder, "decode", lambda self, x: decoded.append(len(x)) or torch.zeros(
        len(x), 3, 256, 256))
    run = bench.random_run(cfg, tmp_path, torch.device("cpu"), decode=True)
    assert run.shape == (4, 32, 32) and run.facts["latent"]["factor"] == 8
    settings = {**solver_settings(cfg), "solver": "euler", "steps": 4, "rtol": 1e-5, "atol": 1e-5}
    assert bench.bench_sample(run, settings, 1, sizes=(1,))["batch 1"]["nfe"] == 4 and set(decoded) == {1}


def test_latents_are_timed_without_diffusers(program, tmp_path, monkeypatch):
    """With --latents-only it is not imported; and machines that do not have it decode nothing."""
    imported = builtins.__import__

    def without_diffusers(name, *rest):
        assert name.split(".")[0] != "diffusers"
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_diffusers)
    monkeypatch.setattr(bench.bench_sample, "__defaults__", ((1,),))
    for words in (["--latents-only"], []):
        if not words:
            monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
        program("sample", "--preset", "celebahq-256", "--size", "32,1,2,2", "--rounds", 1, "--device", "cpu",
                "--record", "lines.jsonl", *words)
        row = line(tmp_path)["batch 1"]
        assert row["seconds_with_decoding"] is None and row["seconds_per_image"] > 0 and row["nfe"] == 80


# ---------------------------------------------------------------------------------------------------------------------
# compare, and the command line


def test_compare_measures_the_same_shapes(monkeypatch, program, tmp_path):
    for name, value in (("WIDTH", 32), ("DEPTH", 1), ("HEADS", 2)):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
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
    assert "is not installed" in out and "ours / diffusers DiT" in out


def test_what_it_prints_is_what_it_records(tmp_path, program):
    train.train(tiny(tmp_path, steps=2), device="cpu")
    out = program("sample", "run", "--rounds", 1, "--device", "cpu", "--record", "lines.jsonl")
    result = line(tmp_path)
    assert result["batch 64"]["nfe"] == 8 and result["config"]["size"] == "32,2,2,2" and str(result["batch 64"]) in out


@pytest.mark.parametrize("command, words", [
    ("compare --rounds 0", "--rounds must be at least 1"), ("compare --sides 30", "divisible by 8, like 32,64; not 30"),
    ("compare --sides x", "divisible by 8"), ("sample", "--preset of the paper, or the directory"),
    ("sample out --size B/2", "a trained run has its own settings")])
def test_errors(program, command, words):
    with pytest.raises(UserError, match=words):
        program(*command.split())


@pytest.mark.parametrize("command", ["compare --size B/2", "train out", "compare --precision 16", "count --steps 2"])
def test_each_command_takes_its_own_flags_only(program, command, capsys):
    with pytest.raises(SystemExit):
        program(*command.split())
    assert "error:" in capsys.readouterr().err
