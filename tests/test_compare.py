"""studies.compare: equal training FLOPs, commands that repeat a run, tables from lines, and nothing is run twice."""

import argparse
import dataclasses
import importlib.util
import json
import shlex
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import config
import train
from config import Config, UserError
from conftest import tiny
from data import fashion
from data.batches import digits
from run import checkpoint, load, memory, paper
from run.paper import PRESETS
from studies import compare, tables


def arguments(tmp_path, **given):
    return SimpleNamespace(**{**dict(dataset="digits", data=None, ablation=None, seeds=2, steps=None, size=None, jobs=1,
                                     device=None, out=str(tmp_path), only=None, res=None), **given})


@pytest.fixture(autouse=True)
def few_clothes(monkeypatch):
    """Fashion-MNIST without its files."""
    random = np.random.default_rng(0)
    monkeypatch.setattr(fashion, "read", lambda where, split="train": (
        random.integers(0, 256, (300, 1, 32, 32), np.uint8), np.arange(300) % 10, "few"))


@pytest.mark.slow
@pytest.mark.parametrize("given", [dict(), dict(dataset="fashion"), dict(dataset="fashion", ablation="scales"),
                                   dict(dataset="fashion", ablation="steps"), *(
    dict(ablation=name, steps=500) for name in compare.ABLATIONS)], ids=str)
def test_equal_flops_and_commands_that_make_the_same_run(given, tmp_path):
    args = arguments(tmp_path, **given)
    planned = compare.plan_runs(args)
    names = list(compare.variants(args))
    assert len(planned) == 2 * len(names) and planned[0][0] == names[0]
    assert len({(cfg.out, cfg.noise_scale, cfg.solver_steps) for _, cfg in planned}) == len(planned)
    first, flops = planned[0][1], {}
    if args.ablation in (None, "scales"):                   # the others count in the same way
        flops = {name: memory.step_flops(cfg, memory.quick_facts(cfg)) for name, cfg in planned[: len(names)]}
    same_commands(planned)
    for name, cfg in planned:
        if flops:
            assert abs(cfg.steps * flops[name] - first.steps * flops[names[0]]) <= flops[name]
        solver = "heun" if args.ablation == "steps" else "dopri5"
        assert (cfg.rtol, cfg.atol, cfg.solver, cfg.batch) == (first.rtol, first.atol, solver, first.batch)


def same_commands(planned: list) -> None:
    """The flags of each run give its configuration."""
    parser = argparse.ArgumentParser()
    config.add_config_flags(parser)
    for name, cfg in planned:
        assert paper.resolve(vars(parser.parse_args(compare.command_of(cfg, None)))) == cfg, name


def test_a_folder_of_32_pixels_has_its_own_patches(tmp_path):
    for i in range(2):
        Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / f"{i}.png")
    planned = compare.plan_runs(arguments(tmp_path, dataset="folder", data=str(tmp_path), res=32, steps=1687, seeds=1))
    same_commands(planned)
    patches = {name: cfg.patches for name, cfg in planned if cfg.patches}
    assert patches == {name: (2, 4, 4) for name in (
        "LapFlow", "LapFlow, shared weights", "LapFlow, finer noise x 0.85", "Pyramidal Flow, 16 coarse tokens")}
    steps = {name: cfg.steps for name, cfg in planned}
    assert steps["LapFlow, 4 coarse tokens"] > 1.3 * steps["LapFlow"] > 2000       # at equal FLOPs
    assert paper.resolve({"dataset": "folder", "data": "x", "res": 32, "size": "32,2,2,2"}).patches == ()
    for other in (dict(res=16), dict(res=32, size="32,2,2,4")):                 # there the rows would be the same twice
        assert compare.systems(arguments(tmp_path, dataset="folder", **other)) == compare.IMAGES
    at_64 = arguments(tmp_path, dataset="folder", data=str(tmp_path), res=64, size="96,4,3,4", steps=1687, seeds=1)
    steps = {name: cfg.steps for name, cfg in compare.plan_runs(at_64)}
    assert steps["LapFlow, 64 coarse tokens"] < steps["LapFlow, both"] < 1687 < steps["LapFlow, stages 4:4:1"]


def test_rows_that_differ_in_sampling_share_a_training(tmp_path, monkeypatch):
    names = ["LapFlow", "LapFlow, finer noise x 0.85"]
    (_, plain), (_, scaled) = compare.plan_runs(arguments(tmp_path, dataset="fashion", only=names, seeds=1))
    assert plain.out == scaled.out and (plain.noise_scale, scaled.noise_scale) == ((), (1.0, 0.85, 0.85))
    given = []
    facts = {"channels": 1, "side": 32, "classes": ["a"], "vectors": None, "count": 9, "latent": None}
    for folder, cfg in (("", plain), ("scaled", scaled)):   # whatever the folder says
        out = tmp_path / "out" / folder
        load.export(load.Run(cfg, load.build_model(cfg, facts), facts, out, 5, "ema"), out)
    monkeypatch.setattr(compare.train, "draw", lambda run, *_, **__: given.append(
        (run.cfg.noise_scale, run.schedule.noise_scale)) or 1 / 0)
    for folder in ("", "scaled"):
        for cfg in (plain, scaled):
            with pytest.raises(ZeroDivisionError):
                compare.judged(dataclasses.replace(cfg, out=str(tmp_path / "out" / folder)), "cpu")
    assert given == 2 * [((), ()), (2 * ((1.0, 0.85, 0.85),))]


def test_rows_of_sampling_steps_take_their_solver(tmp_path):
    planned = compare.plan_runs(arguments(tmp_path, dataset="fashion", ablation="steps", seeds=1))
    assert [(cfg.method, cfg.solver, cfg.solver_steps) for _, cfg in planned] == [
        (method, "heun", steps) for method in ("lapflow", "lfm", "pyramidal") for steps in (6, 12, 24)]
    assert len({cfg.out for _, cfg in planned}) == 3        # and share the trainings of the table
    (_, table), = compare.plan_runs(arguments(tmp_path, dataset="fashion", only=["LapFlow"], seeds=1))
    assert planned[0][1].out == table.out


def test_seconds_are_measured_once_for_each_row(tmp_path, monkeypatch):
    """Also of a run that was trained for another number of samples."""
    args = arguments(tmp_path, dataset="fashion", only=["LapFlow"], seeds=1, record=tmp_path / "lines.jsonl")
    args.record.touch()
    ((_, cfg),) = planned = compare.plan_runs(args)
    Path(cfg.out).mkdir()
    (Path(cfg.out) / "step-00000001.pt").touch()
    run = SimpleNamespace(cfg=dataclasses.replace(cfg, num_samples=64), device=torch.device("cpu"))
    seconds = iter((0.3, 0.1, 0.2))
    monkeypatch.setattr(compare, "loaded", lambda *_: run)
    monkeypatch.setattr(compare.train, "draw", lambda *_, **__: (None, None, {"seconds_per_image": next(seconds)}))
    for _ in range(2):                                      # the second time there is nothing left to do
        compare.measure_times(planned, args)
    (line,) = checkpoint.read_lines([args.record])
    assert line == compare.finished([line], cfg, "time") and line["seconds_per_image"] == 0.2


def test_lines_of_other_programs_are_passed_over(tmp_path, monkeypatch):
    """train.py --record and fid.py --record write lines that name no comparison."""
    foreign, own, curves = {"frechet": 1.0, "config": None}, line(0, 0.1, curve=[]), []
    monkeypatch.setattr(compare.pictures, "plot", lambda path, given, **words: curves.append((given, words["ylabel"])))
    assert compare.finished([foreign, own], Config.from_dict(own["config"]), "run") is own
    assert compare.gathered([foreign, own], {"A": {}}) == ({"A": [own]}, {})
    compare.draw_curves(tmp_path / "x.png", {"A": [own]}, [foreign, own])
    assert len(curves[0][0]) == 1 and "pixels" in curves[0][1]


def test_runs_on_larger_images_are_judged_and_those_on_the_digits_are_not(tmp_path, monkeypatch):
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    calls, child = [], SimpleNamespace(wait=lambda: None, returncode=0)
    monkeypatch.setattr(compare, "judged", lambda cfg, device: calls.append(cfg.dataset) or {
        "nfe_segments": [1] * cfg.num_scales, "frechet_pixel": 1.0})
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(Popen=lambda *_, **__: child))
    for dataset in ("digits", "fashion", "folder"):
        args = arguments(tmp_path, dataset=dataset, data=str(tmp_path) if dataset == "folder" else None, seeds=1,
                         only=["LapFlow"], record=tmp_path / "lines.jsonl")
        ((name, cfg),) = compare.plan_runs(args)
        Path(cfg.out).mkdir()
        (Path(cfg.out) / "scores.json").write_text(json.dumps({"nfe_segments": [1] * cfg.num_scales,
                                                               "frechet_pixel": 1.0}))
        compare.train_rows([(name, cfg)], args, "abc", [])
    assert calls == ["fashion", "folder"]


def test_rows_that_share_a_training_follow_each_other_and_nothing_begins_after_a_stop(tmp_path, monkeypatch):
    """Two rows of one training and three others, two at a time: the second training fails."""
    began, lines = [], tmp_path / "lines.jsonl"
    args = arguments(tmp_path, dataset="fashion", seeds=2, jobs=2, record=lines, only=[
        "LapFlow", "LFM", "LapFlow, finer noise x 0.85", "PixelFlow"])
    planned = compare.plan_runs(args)
    shared = next(cfg.out for _, cfg in planned)
    failing, judging = threading.Event(), []

    class Child:
        def __init__(self, command, **_):
            out = command[command.index("--out") + 1]
            began.append(out)
            self.returncode, self.ends = int(out != shared), threading.Event() if len(began) > 2 else failing
            Path(out).mkdir()
            (Path(out) / "scores.json").write_text(json.dumps({"nfe_segments": [1, 1, 1], "frechet_pixel": 1.0}))

        def wait(self):
            assert not self.returncode or self.ends.wait(20)            # a third one ends when it is asked to

        def terminate(self):
            self.ends.set()

    def judged(cfg, device):
        judging.append(cfg.noise_scale)
        failing.set()
        time.sleep(0.3)                                     # the other training has failed before this is over
        return {"nfe_segments": [1, 1, 1], "frechet_pixel": 1.0}

    monkeypatch.setattr(compare, "judged", judged)
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(Popen=Child))
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
    with pytest.raises(UserError, match="did not finish"):
        compare.run_all(planned, args)
    time.sleep(0.6)
    assert began[0] == shared and len(set(began)) == len(began) <= 3 and judging == [()]    # one may just have begun


def test_samples_of_the_systems_stand_over_real_images_of_their_classes(tmp_path, monkeypatch):
    cfg, drawn = tiny(tmp_path, steps=1), []
    train.train(cfg, device="cpu")
    monkeypatch.setattr(compare.pictures, "draw_images", lambda *given: drawn.append(given))
    planned = [("LapFlow, small", cfg), ("LFM", dataclasses.replace(cfg, out="nowhere"))]
    compare.draw_samples(tmp_path / "x.png", planned, "cpu")
    ((_, (ours, real), _, titles, names),) = drawn
    assert titles == list("0123456789") and names == ["LapFlow,\nsmall", "real"]
    assert np.array_equal(np.stack(ours), load.load_run(cfg.out, device="cpu").sample(10))
    for label, image in enumerate(real):
        first = digits().pixels[digits().labels == label][0]
        assert np.array_equal(image[..., 0], first[0])


def test_systems_are_not_chosen_in_an_ablation(give_up):
    error = give_up("studies.compare", "--ablation", "mask", "--only", "LapFlow")
    assert error == "error: --only chooses among the systems: leave it out with --ablation"


def test_all_systems_are_there():
    methods = {settings.get("method") for settings in compare.SYSTEMS.values()} - {None}
    assert methods <= set(config.METHODS) and methods >= {
        "lfm", "pyramidal", "pyramidal-zero-overlap", "pixelflow", "edify", "edify-plain", "dfm"}


def test_the_papers_numbers_are_those_of_the_presets():
    names = {("mask", "none"): "mask-none", ("mask", "self"): "mask-self", ("starts", "T = 0.1"): "start-0.1",
             ("starts", "T = 0.2"): "start-0.2", ("starts", "T = 0.9"): "start-0.9", ("path", "GVP"): "path-gvp",
             ("path", "quadratic"): "path-quadratic", ("path", "cubic"): "path-cubic", ("scales", "3"): "scales-3",
             ("scales", "1 (LFM)"): "lfm", ("separate", "a network for each segment"): "separate"}
    for (table, row), preset in names.items():
        settings, fid = compare.ABLATIONS[table][row]
        assert fid == PRESETS[f"celebahq-256-{preset}"].paper["fid"]
        for name, value in settings.items():
            if name != "num_scales":
                assert PRESETS[f"celebahq-256-{preset}"].settings[name] == value
    for rows in compare.ABLATIONS.values():
        assert next(iter(rows.values()))[1] in (3.53, None)
    for row, preset in (("2", "celebahq-256"), ("3", "celebahq-256-scales-3"), ("4", "celebahq-256-scales-4"),
                        ("1 (LFM)", "celebahq-256-lfm")):
        assert compare.IMAGE_ABLATIONS["scales"][row][1] == PRESETS[preset].paper["fid"]
    assert all(next(iter(rows.values()))[0] == {} for rows in compare.IMAGE_ABLATIONS.values())


# ---------------------------------------------------------------------------------------------------------------------
# lines and tables


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
    assert "| 0.0123 |" in text and "| *real images* | 0.070 |" in text and "| C" not in text
    assert "; 2 training seeds, mean" in text
    assert "paper" not in compare.table({"A": [line(0, 0.1)]}, {"A": None}, {})
    judged = compare.table({"A": [line(0, 0.1, frechet=0.8)]}, {}, {})
    assert "|  | FD, classifier | precision |" in judged and "| A | 0.80 | 0.500 |" in judged
    with pytest.raises(UserError, match="cannot share a table"):
        compare.table({"A": [line(0, 0.1), line(1, 0.1, training_flops=2e12)]}, {}, {})


def test_the_curve_of_a_system_is_the_mean_of_its_seeds_at_each_length(tmp_path, monkeypatch):
    curves = []
    monkeypatch.setattr(compare.pictures, "plot", lambda path, given, **_: curves.extend(given))
    short = [line(0, 0.1, frechet=3.0, training_flops=1e12), line(1, 0.1, frechet=1.0, training_flops=1e12)]
    long = line(0, 0.1, frechet=0.5, training_flops=4e12)
    other = line(0, 0.1, frechet=9.0, training_flops=1e12, settings={"method": "lfm"})
    compare.draw_curves(tmp_path / "x.png", {"A": [long], "B": [other], "C": []}, [long, *short, other])
    assert [curve[:2] for curve in curves] == [((1e12, 4e12), (2.0, 0.5)), ((1e12,), (9.0,))]


def test_lines_are_recognised_by_their_settings():
    lines = [line(1, 0.3), line(0, 0.1), line(0, 0.2, settings={"starts": [0.0, 0.2]}),
             {**line(0, 0.0), "what": "time", "seconds_per_image": 0.5}]
    runs, times = compare.gathered(lines, {"base": {}, "late": {"starts": (0.0, 0.2)}, "none": {"mask": "none"}})
    assert [row["frechet_pixel"] for row in runs["base"]] == [0.1, 0.3] and not runs["none"]
    assert [row["frechet_pixel"] for row in runs["late"]] == [0.2] and times == {"base": 0.5}
    again, _ = compare.gathered([*lines, line(1, 0.4)], {"base": {}})           # measured again: the last counts
    assert [row["frechet_pixel"] for row in again["base"]] == [0.1, 0.4]
    cfg = Config(seed=1, out="elsewhere", eval_every=7)
    assert compare.finished(lines, cfg, "run") is lines[0]
    assert compare.finished(lines, Config(seed=1, out="out/x", lr=1e-3), "run") is None


@pytest.mark.slow
def test_the_recorded_comparison_is_not_run_again(tmp_path):
    """Its lines are older than some settings: those have their defaults. Its steps are of equal FLOPs still."""
    lines = checkpoint.read_lines([tables.ROOT / "results" / "compare.jsonl"])
    assert not {"pyramid", "condition"} & set(lines[0]["config"])
    planned = compare.plan_runs(arguments(tmp_path, seeds=3))
    assert len(planned) == 24 and all(compare.finished(lines, cfg, "run") for _, cfg in planned)


def test_a_table_stands_on_one_page(monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"a": lambda: "| new |", "b": lambda: "B\\1"})
    page = "x\n<!-- {0} -->\nold\n<!-- /{0} -->\ny"
    assert tables.render({"one": page.format("a"), "two": page.format("b"), "three": ""}) == {
        "one": "x\n<!-- a -->\n| new |\n<!-- /a -->\ny", "two": "x\n<!-- b -->\nB\\1\n<!-- /b -->\ny", "three": ""}
    for pages, words in (({"one": page.format("a")}, "<!-- b --> .* one; they stand on none"),
                         ({"one": page.format("a"), "two": page.format("a")}, "they stand on one, two")):
        with pytest.raises(UserError, match=words):
            tables.render(pages)


def test_the_gpu_table_shows_the_newest_lines_of_the_last_gpu(monkeypatch):
    """Cell by cell, and never those of a dry run."""
    same = {"what": "gpu", "dry_run": False, "hardware": "H100", "versions": "torch 2", "commit": "abc",
            "command": "python -m studies.bench gpu", "preset": "celebahq-512"}
    training = {**same, "figure": "training", "mode": "compiled", "mfu": None, "memory_gb": 70.4}
    sampling = {**same, "figure": "sampling", "mode": "float32", "batch": 1, "seconds_per_image": 0.987}
    rows = [{**training, "hardware": "H200", "mode": "eager", "images_per_second": 270.0},
            {**training, "images_per_second": 300.0}, {**training, "images_per_second": 333.3},
            sampling, {**sampling, "mode": "bfloat16, graphs"}, {**sampling, "batch": 8, "mode": "bfloat16"},
            {**training, "dry_run": True, "hardware": "CPU", "mode": "eager", "images_per_second": 7.0},
            {"what": "gpu section", "dry_run": False, "section": "stages", "ended": "cut off"}]
    monkeypatch.setattr(tables, "lines", lambda name: rows)
    text, no = tables.gpu(), "not measured"
    row = next(line for line in text.splitlines() if "celebahq-512" in line)
    assert row == f"| `celebahq-512` | {no} | 333 | 300 | {no} | 70 | 0.99 | {no} | {no} | {no} | 0.6 | 2.6 |"
    assert "\n\nH100; torch 2; commit abc; `python -m studies.bench gpu`." in text and "H200" not in text
    monkeypatch.setattr(tables, "lines", lambda name: [row for row in rows if row["dry_run"]])
    assert tables.gpu().count(no) == 5 * 8 and "CPU" not in tables.gpu()


def test_the_table_of_speed_has_the_median_of_the_last_eight_runs_for_each_rival(monkeypatch):
    def row(**over):
        return {"what": "compare", "side": 32, "num_scales": 2, "batch": 8, "limit": 0.747, "hardware": "CPU",
                "precision": "float32", "versions": "torch", "commit": "abc", "packages": {"diffusers": "1"},
                "command": "python", **{what: {"over": over} for what in ("forward and backward", "forward")}}

    rows = [row(**{"diffusers DiT": 0.1, "rectified-flow-pytorch": 0.9}),       # the ninth from the end: not counted
            *(row(**{"diffusers DiT": ratio}) for ratio in (0.80, 0.79, 0.78, 0.77, 0.762, 0.75, 0.74, 0.73))]
    monkeypatch.setattr(tables, "lines", lambda name: rows)
    text = tables.speed().splitlines()
    assert text[2:4] == [f"| 32 x 32 | 2 | 8 | {what} | 0.747 | 0.766 | 0.900 |" for what in (
        "forward and backward", "forward")] and not text[4]


def test_the_table_of_garments_has_each_system_below_its_name_and_one_length(monkeypatch):
    names = ("label_agreement", "frechet_efficientnet", "class_variance", "precision", "recall")
    ours, lfm, pyramidal, real = (dict.fromkeys((*names, "frechet"), value) for value in (1.0, 2.0, 3.0, 4.0))
    common = dict(training_flops=2e13, n=2000, sampling_flops=5e9)
    long = line(0, 0.1, **{**common, **ours, "training_flops": 4e13, "frechet": 9.0, "real": real})
    rows = [line(0, 0.1, **common, **ours, real=real),
            line(1, 0.1, **common, **{**ours, "frechet": 2.0}, real=real), long,
            line(0, 0.1, settings=compare.IMAGES["LFM"], **common, **lfm),
            line(0, 0.1, settings=compare.IMAGES["Pyramidal Flow"], **common, **pyramidal)]
    monkeypatch.setattr(tables, "lines", lambda name: rows)
    text = tables.garments()
    assert text.splitlines()[0] == "| 2,000 images of 32 x 32 | LapFlow | LFM | Pyramidal Flow | real images |"
    assert "that classifier | 1.50 ± 0.71 | 2.00 | 3.00 | 4.00 |" in text
    assert "2.0e+13" in text and "1 to 2 training seeds" in text
    assert "EfficientNet (ImageNet) | 1 ± 0 | 2 | 3 | 4 |" in text
    rows.append({**long, "config": {**long["config"], "seed": 1}})
    rows += [{**rows[3], "training_flops": 4e13}, {**rows[4], "training_flops": 4e13}]      # as many: now the longer
    assert "that classifier | 9.00 ± 0.00 | 2.00 | 3.00 | 4.00 |" in tables.garments()
    rows[:] = rows[:2]
    assert tables.garments() == "not measured yet"


def test_features_of_the_same_images_are_computed_once(monkeypatch):
    calls = []

    def extractor(images):
        calls.append(len(images))
        return images.mean(axis=(1, 2, 3)), None

    extractor.name, extractor.identity = "efficientnet", "toy"
    monkeypatch.setattr(compare, "load_extractor", lambda name: extractor)
    compare.remembering.cache_clear()
    features, images = compare.remembering("efficientnet"), np.arange(2 * 48, dtype=np.uint8).reshape(2, 4, 4, 3)
    first, again, other = features(images)[0], features(images.copy())[0], features(images + 1)[0]
    assert calls == [2, 2] and (first == again).all() and (other == first + 1).all()
    assert (features.name, features.identity) == ("efficientnet", "toy")
    compare.remembering.cache_clear()


def test_the_table_of_ablations_has_each_score_below_its_name(monkeypatch):
    rows = [line(0, 0.123, class_variance=0.456), line(0, 0.234, class_variance=0.567, settings={"mask": "none"})]
    monkeypatch.setattr(tables, "lines", lambda name: rows)
    text = tables.ablations("ablations", "digits").splitlines()
    assert text[0] == "| ablation |  | FD, pixels | class variance | NFE | parameters, M | paper: FID |"
    assert text[2:4] == ["| mask | causal | 0.123 | 0.456 | 50 | 1.50 | 3.53 |",
                         "| mask | none | 0.234 | 0.567 | 50 | 1.50 | 3.91 |"]
    assert len(text) == 6 and "1 training seed;" in text[5]     # of an ablation with one row there is nothing to say
    assert tables.ablations("ablations", "fashion") == "not measured yet"


def test_the_seconds_of_a_system_are_those_of_its_timing(monkeypatch):
    """A line of its own, without training FLOPs."""
    timed = {"what": "time", "settings": {}, "config": Config().to_dict(), "seconds_per_image": 0.0123}
    monkeypatch.setattr(tables, "lines", lambda name: [line(0, 0.1), timed])
    row = next(row for row in tables.systems("compare").splitlines() if row.startswith("| LapFlow |"))
    assert "| 0.0123 |" in row


def test_what_the_tables_add_to_the_lines(monkeypatch):
    text = tables.systems("compare")
    assert "| LapFlow | 0.101 ± 0.005 |" in text
    assert tables.systems("nothing") == "not measured yet"


# ---------------------------------------------------------------------------------------------------------------------
# whole comparisons


def test_errors(give_up):
    assert "at least 1" in give_up("studies.compare", "--seeds", "0")
    assert "is one of mask, experts, path, scales, starts, steps, guidance, not noise" in give_up(
        "studies.compare", "--dataset", "fashion", "--ablation", "noise")


@pytest.mark.slow
def test_a_comparison_continues_and_writes_its_table(program, tmp_path):
    command = shlex.split("studies.compare --ablation noise --steps 3 --seeds 1 --size 32,2,2,2 --jobs 2 "
                          "--record r.jsonl")
    out = program(*command)
    assert "2 runs, 0 of them done" in out and "| independent |" in out
    lines = [json.loads(row) for row in (tmp_path / "r.jsonl").read_text().splitlines() if row]
    assert sorted(row["config"]["noise"] for row in lines) == ["independent", "pyramid"]
    first = [row for row in lines if row["config"]["noise"] == "pyramid"]
    assert first[0]["sampling_flops"] > 1e6
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, first)) + "\n")    # as if stopped after the first
    out = program(*command)
    assert "2 runs, 1 of them done" in out
    again = [json.loads(row) for row in (tmp_path / "r.jsonl").read_text().splitlines() if row]
    assert [row["config"]["noise"] for row in again] == ["pyramid", "independent"]
    assert (tmp_path / "out/compare/noise.png").exists() and (tmp_path / "out/compare/noise.md").exists()


@pytest.mark.slow
def test_fashion_is_judged_by_its_classifier(tmp_path, monkeypatch):
    """And by EfficientNet, on the same images as in pixels."""
    import train
    from scores import classifier

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(classifier.SETTINGS, "most", 2)
    monkeypatch.setitem(classifier.SETTINGS, "least", 2)
    cfg = Config(dataset="fashion", res=32, size="32,1,2,4", steps=2, batch=16, num_samples=140, out="run",
                 solver="euler", solver_steps=2)
    train.train(cfg, device="cpu")
    both = compare.judged(cfg, "cpu")
    for scores in (both, both["real"]):                     # 150 images are compared with as many others
        assert scores["frechet_pixel"] > 0 and scores["frechet"] > 0 and "label_agreement" in scores
        assert scores["n"] == scores["n_reference"] == 140
        if importlib.util.find_spec("efficientnet_lite_pytorch"):
            assert scores["frechet_efficientnet"] > 0 and "kid_efficientnet" in scores
    for name in ("frechet_pixel", "frechet", "frechet_efficientnet"):          # real images are not the generated ones
        assert name not in both or both["real"][name] != both[name]
    assert torch.load(next((tmp_path / "judges").glob("*.pt")), weights_only=True)


@pytest.mark.slow
def test_a_folder_is_compared_under_its_name_and_judged_without_classes_too(tmp_path, monkeypatch, give_up):
    import train

    monkeypatch.chdir(tmp_path)
    (tmp_path / "roses").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (280, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "roses" / f"{i}.png")
    args = arguments(tmp_path, dataset="folder", data=str(tmp_path / "roses"), res=16, steps=2, size="32,1,2,4")
    name, cfg = compare.plan_runs(args)[0]
    assert name == "LapFlow" and cfg.out.endswith("/roses-2-0") and (cfg.res, cfg.data) == (16, args.data)
    same_commands(compare.plan_runs(args))
    cfg = dataclasses.replace(cfg, batch=8, num_samples=130, solver="euler", solver_steps=2)
    train.train(cfg, device="cpu")
    judged = compare.judged(cfg, "cpu")
    assert judged["frechet_pixel"] > 0 and not {"frechet", "label_agreement"} & set(judged)
    assert "needs --data DIR" in give_up("studies.compare", "--dataset", "folder")
