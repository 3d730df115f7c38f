"""bench.py counts exactly, and what it times is what it says."""

import json
import time

import pytest
import torch

import bench
import runs
import train
from config import UserError
from conftest import tiny


def test_counts_are_those_of_the_paper_s_appendix_c():
    rows = {row["preset"]: row for row in bench.bench_count()}
    causal, unmasked = rows["celebahq-1024"]["attention"]
    assert unmasked == pytest.approx((1 / 16**2 + (5 / 16) ** 2 + (21 / 16) ** 2) / 3) and f"{unmasked:.3f}" == "0.608"
    assert f"{causal:.3f}" == "0.493" and [f"{s:.3f}" for s in rows["celebahq-256"]["attention"]] == ["0.688", "0.812"]
    assert rows["celebahq-256-lfm"]["share"] == 1 and rows["celebahq-256-dfm"]["share"] == pytest.approx(1, abs=1e-2)
    assert rows["celebahq-256"]["tokens"] == [64, 320] and 0.5 < rows["celebahq-1024"]["share"] < 0.54
    assert {row["method"] for row in rows.values()} >= {"lapflow", "lfm", "pyramidal", "edify", "dfm", "separate"}


def test_medians_over_rounds_that_take_turns():
    order = []

    def work(name, pause):
        order.append(name)
        time.sleep(pause)

    taken = bench.in_turn({"a": lambda: work("a", 0.001), "b": lambda: work("b", 0.02)}, 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4 and taken["b"] > 0.02 > taken["a"] > 0.001


def test_a_package_that_cannot_be_loaded_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.other_lapflow(16, 2) is None and "is not installed" in capsys.readouterr().out
    (tmp_path / "lap_flow.py").write_text("import no_such_module")
    found = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match="cannot be loaded .*no_such_module.*einops einx"):
        bench.other_lapflow(16, 2)


def test_a_pass_of_a_stage_is_forward_and_backward_of_its_bands():
    model = bench.MoTDiT((32, 2, 2, 2), 4, 16, 2, 10)
    bands, t, y = bench.random_inputs(model, 3, torch.device("cpu"))
    seen = []
    model.register_forward_hook(lambda module, given, out: seen.append((len(given[0]), out[0].requires_grad)))
    for backward in (True, False):
        for work in bench.passes(model, bands, t, y, "float32", backward).values():
            work()
    assert seen == [(1, True), (2, True), (1, False), (2, False)]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compare_measures_the_same_shapes(monkeypatch, capsys):
    monkeypatch.setattr(bench, "WIDTH", 32)
    monkeypatch.setattr(bench, "DEPTH", 1)
    monkeypatch.setattr(bench, "HEADS", 2)
    result = bench.bench_compare(16, 1, torch.device("cpu"), "float32")
    assert result["num_scales"] == 3 and result["batch"] == 32 and 0.3 < result["limit"] < 0.6
    for what in ("forward and backward", "forward"):
        seconds = result[what]["seconds"]
        assert {"ours, stage 0", "ours, stage 2", "diffusers DiT, stage 2"} <= set(seconds)
        assert "diffusers DiT, stage 0" not in seconds and min(seconds.values()) > 0
        ours = sum(seconds[f"ours, stage {s}"] for s in range(3)) / 3
        assert result[what]["over"]["diffusers DiT"] == pytest.approx(ours / seconds["diffusers DiT, stage 2"])
    bench.show_compare(result)
    assert "ours / diffusers DiT" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [dict(), dict(method="dfm", size="32,2,2,2"), dict(method="lfm", num_scales=1,
                                                                                       starts=(0.0,))])
def test_sampling_of_a_trained_run(tmp_path, settings):
    train.main(tiny(tmp_path, steps=2, **settings), device="cpu")
    run = runs.load_run(str(tmp_path / "run"), device="cpu")
    result = bench.bench_sample(run, runs.solver_settings(run.cfg), 1, batches=(2, 4))
    for batch in (2, 4):
        line = result[f"batch {batch}"]
        assert line["nfe"] == 8 and line["seconds_per_image"] > 0
        assert (line["preview_speed_up"] is None) == bool(settings)


def test_a_preset_is_sampled_with_random_weights_and_a_decoder_of_its_shape(tmp_path, monkeypatch):
    cfg = bench.config.resolve({"preset": "celebahq-256", "size": "32,1,2,2", "out": str(tmp_path)})
    monkeypatch.setattr(bench.latents.Autoencoder, "decode", lambda self, x: torch.zeros(len(x), 3, 256, 256))
    run = bench.random_run(cfg, tmp_path, torch.device("cpu"))
    assert run.shape == (4, 32, 32) and run.facts["latent"]["factor"] == 8
    settings = {**runs.solver_settings(cfg), "solver": "euler", "steps": 4, "rtol": 1e-5, "atol": 1e-5}
    assert bench.bench_sample(run, settings, 1, batches=(1,))["batch 1"]["nfe"] == 4


def test_what_it_prints_is_what_it_records(tmp_path, monkeypatch, capsys):
    given = {"record": str(tmp_path / "lines.jsonl"), "device": "cpu", "rounds": 1, "sides": "32", "run": None}
    bench.main({**given, "what": "count"})
    assert "celebahq-1024 " in capsys.readouterr().out
    assert len(json.loads((tmp_path / "lines.jsonl").read_text())["rows"]) == len(bench.bench_count())
    for wrong in ({"rounds": 0}, {"sides": "30"}, {"sides": "x"}):
        with pytest.raises(UserError, match="--rounds must be at least 1, and --sides numbers divisible by 8"):
            bench.main({**given, **wrong, "what": "compare"})
    with pytest.raises(UserError, match="--preset of the paper, or the directory"):
        bench.main({**given, "what": "sample"})
    for what, more, words in (("compare", {"size": "B/2"}, "compare does not read --size"),
                              ("train", {"run": "out"}, "train does not read out"),
                              ("compare", {"precision": "float16"}, "unknown precision 'float16'")):
        with pytest.raises(UserError, match=words):
            bench.main({**given, **more, "what": what})
    train.main(tiny(tmp_path, steps=2), device="cpu")
    capsys.readouterr()
    bench.main({**given, "run": str(tmp_path / "run"), "what": "sample"})
    assert "preview_speed_up" in capsys.readouterr().out
    line = json.loads((tmp_path / "lines.jsonl").read_text().splitlines()[-1])
    assert line["batch 64"]["nfe"] == 8 and line["config"]["size"] == "32,2,2,2"
