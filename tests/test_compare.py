"""compare.py: equal training FLOPs, commands that repeat a run, tables from lines, and nothing is run twice."""

import argparse
import json
import shlex
from types import SimpleNamespace

import pytest

import compare
import config
from config import PRESETS, Config


def arguments(**given):
    return SimpleNamespace(**{**dict(dataset="digits", ablation=None, seeds=2, steps=None, size=None, jobs=1,
                                     device=None), **given})


@pytest.mark.parametrize("given", [dict(), dict(dataset="photos", steps=300), *(
    dict(ablation=name, steps=500) for name in config.ABLATIONS)], ids=str)
def test_equal_flops_and_commands_that_make_the_same_run(given, tmp_path):
    args = arguments(**given)
    planned, facts = compare.plan_runs(args, tmp_path), compare.data_facts(args.dataset)
    names = list(compare.variants(args))
    assert len(planned) == 2 * len(names) and planned[0][0] == names[0]
    assert len({cfg.out for _, cfg in planned}) == len(planned)
    budget = planned[0][1].steps * compare.step_flops(planned[0][1], facts)
    parser = argparse.ArgumentParser()
    config.add_config_flags(parser)
    for _, cfg in planned:
        each = compare.step_flops(cfg, facts)
        assert abs(cfg.steps * each - budget) <= each
        assert (cfg.rtol, cfg.atol, cfg.solver, cfg.batch) == (planned[0][1].rtol, planned[0][1].atol, "dopri5",
                                                               planned[0][1].batch)
        assert config.resolve(vars(parser.parse_args(compare.command_of(cfg, None)))) == cfg


def test_all_five_systems_and_all_ablations_are_there():
    assert {settings.get("method") for settings in compare.SYSTEMS.values()} == {None, *(
        method for method in config.METHODS if method not in ("lapflow", "separate"))}
    assert tuple(compare.ABLATIONS) == config.ABLATIONS


def test_the_papers_numbers_are_those_of_the_presets():
    names = {("mask", "none"): "mask-none", ("mask", "self"): "mask-self", ("starts", "T = 0.1"): "start-0.1",
             ("starts", "T = 0.2"): "start-0.2", ("starts", "T = 0.9"): "start-0.9", ("path", "GVP"): "path-gvp",
             ("path", "quadratic"): "path-quadratic", ("path", "cubic"): "path-cubic", ("scales", "3"): "scales-3",
             ("scales", "1 (LFM)"): "lfm", ("separate", "a network for each segment"): "separate",
             ("space", "pixels"): "pixel", ("space", "latents, LFM"): "lfm-eq-vae"}
    for (table, row), preset in names.items():
        settings, fid = compare.ABLATIONS[table][row]
        assert fid == PRESETS[f"celebahq-256-{preset}"].paper["fid"]
        for name, value in settings.items():
            if name not in ("space", "num_scales"):
                assert PRESETS[f"celebahq-256-{preset}"].settings[name] == value
    for rows in compare.ABLATIONS.values():
        assert next(iter(rows.values()))[1] in (3.53, None)


def line(seed, distance, **more):
    cfg = Config(seed=seed, out="out/x")
    return {"what": "run", "settings": {}, "config": cfg.to_dict(), "frechet_pixel": distance, "precision": 0.5,
            "label_agreement": 0.9, "n": 500, "recall": 0.5, "class_variance": 0.8,
            "nfe": 50, "sampling_flops": 2e9, "parameters": 1_500_000,
            "training_flops": 1e12, "jobs": 2, "solver": "dopri5", "rtol": 1e-3, "hardware": "a machine",
            "versions": "torch", "commit": "abc", "real": {"frechet_pixel": 0.07}, **more}


def test_tables_have_mean_and_spread_over_seeds():
    both = {"A": [line(0, 0.1), line(1, 0.3)], "B": [line(0, 0.2), line(1, 0.2)], "C": []}
    text = compare.table(both, {"A": 3.53, "B": None}, {"A": 0.0123})
    assert "| A | 0.200 ± 0.141 |" in text and "| B | 0.200 ± 0.000 |" in text and "| 3.53 |" in text
    assert "| 0.0123 |" in text and "| *real images* | 0.070 |" in text and "2 seeds" in text and "| C" not in text
    assert "paper" not in compare.table({"A": [line(0, 0.1)]}, {"A": None}, {})


def test_lines_are_found_again_by_their_settings():
    lines = [line(1, 0.3), line(0, 0.1), line(0, 0.2, settings={"starts": [0.0, 0.2]}),
             {**line(0, 0.0), "what": "time", "seconds_per_image": 0.5}]
    found, times = compare.gathered(lines, {"base": {}, "late": {"starts": (0.0, 0.2)}, "none": {"mask": "none"}})
    assert [row["frechet_pixel"] for row in found["base"]] == [0.1, 0.3] and not found["none"]
    assert [row["frechet_pixel"] for row in found["late"]] == [0.2] and times == {"base": 0.5}
    cfg = Config(seed=1, out="elsewhere", eval_every=7)
    assert compare.finished(lines, cfg, "run") is lines[0]
    assert compare.finished(lines, Config(seed=1, out="out/x", lr=1e-3), "run") is None


def test_the_verdict_on_a_ranking_knows_noise():
    paper = {"A": 3.5, "B": 4.0, "C": 5.0}
    runs = {name: [line(seed, value + 0.001 * seed) for seed in (0, 1, 2)] for name, value in (
        ("A", 0.10), ("B", 0.2), ("C", 0.1))}
    assert compare.verdict(runs, paper) == "of 3 pairs 1 hold, 1 within noise, 1 reversed"
    assert compare.verdict(runs, {"A": 3.5, "B": None, "C": None}) == ""


@pytest.mark.slow
def test_a_comparison_continues_and_writes_its_table(run_script, give_up, tmp_path):
    command = shlex.split("compare.py --ablation noise --steps 3 --seeds 1 --size 32,2,2,2 --jobs 2 --record r.jsonl")
    out = run_script(*command).stdout
    assert "2 runs, 0 of them done" in out and "| independent |" in out
    lines = [json.loads(row) for row in (tmp_path / "r.jsonl").read_text().splitlines() if row]
    assert sorted(row["config"]["noise"] for row in lines) == ["independent", "pyramid"]
    kept = [row for row in lines if row["config"]["noise"] == "pyramid"]
    assert kept[0]["sampling_flops"] > 1e6
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")    # as if stopped after the first
    out = run_script(*command).stdout
    assert "2 runs, 1 of them done" in out
    again = [json.loads(row) for row in (tmp_path / "r.jsonl").read_text().splitlines() if row]
    assert [row["config"]["noise"] for row in again] == ["pyramid", "independent"]
    assert (tmp_path / "out/compare/noise.png").exists() and (tmp_path / "out/compare/noise.md").exists()
    assert "at least 1" in give_up("compare.py", "--seeds", "0")
    assert "two scales of the digits" in give_up("compare.py", "--dataset", "photos", "--ablation", "space")


@pytest.mark.slow
def test_latents_of_the_small_autoencoder(run_script, tmp_path):
    run_script("docs/tiny_vae.py", "--out", "out/compare", "--steps", "3")
    out = run_script("compare.py", "--ablation", "space", "--steps", "3", "--seeds", "1", "--size", "32,2,2,2").stdout
    assert "| latents |" in out and "| pixels, LFM |" in out and "11.58" in out
