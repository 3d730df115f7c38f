"""The training loop: resume, EMA, checkpoints, errors, and the whole path from data to scores."""

import json
import os
import pickle
import shlex
import signal
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import baselines
import sample
import train
from config import Config, UserError
from conftest import damage, losses, metrics, needs_fork, same, state, tiny, train_and_score
from data.batches import to_images
from run import checkpoint, load, log, paper, pictures
from run.ranks import Ranks
from schedule import Schedule


@pytest.mark.parametrize("stages", ["stratified", "batch"])
def test_twenty_steps_are_ten_and_a_restart_and_ten(tmp_path, monkeypatch, capsys, stages):
    whole, parts = tiny(tmp_path, "whole", stages=stages), tiny(tmp_path, "parts", stages=stages)
    train.train(whole, device="cpu")
    update = train.update_ema

    def terminate_at_ten(ema, model, decay, step):
        update(ema, model, decay, step)
        if step == 9:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)                                  # two signals, of two kinds

    monkeypatch.setattr(train, "update_ema", terminate_at_ten)
    train.train(parts, device="cpu")
    assert "stopped at step 10, saved" in capsys.readouterr().out
    assert state(parts)["step"] == 10
    torch.manual_seed(999)                                                      # the global generator must not matter
    train.train(parts, device="cpu")                                            # the same command, no flag
    assert "continuing" in capsys.readouterr().out
    a, b = state(whole), state(parts)
    assert a["step"] == b["step"] == 20
    assert same(a["model"], b["model"]) and same(a["ema"], b["ema"])
    moments, again = a["optimizer"]["state"], b["optimizer"]["state"]           # of weights in the order of their use
    assert moments.keys() == again.keys() and all(same(moments[i], again[i]) for i in moments)
    assert losses(whole.out) == losses(parts.out) and len(losses(whole.out)) == 4
    images = [sample.generate(load.load_run(cfg.out, device="cpu"), 4, torch.arange(4), progress=False, solver="euler",
                              steps=4)[0] for cfg in (whole, parts)]
    assert np.array_equal(*images)


def test_a_signal_in_the_last_step_leaves_the_samples_to_the_same_command(tmp_path, monkeypatch, capsys):
    cfg, update = tiny(tmp_path, steps=2), train.update_ema
    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", lambda *arguments: (
            update(*arguments), arguments[-1] == 1 and signal.raise_signal(signal.SIGTERM)))
        assert train.train(cfg, device="cpu") is None
    assert "stopped at step 2, saved" in capsys.readouterr().out and state(cfg)["step"] == 2
    assert train.train(cfg, device="cpu").step == 2


def test_metrics_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    cfg = tiny(tmp_path)
    train.train(cfg, device="cpu")
    with open(cfg.out + "/metrics.jsonl", "a") as file:
        file.write('{"step": 25, "loss_bands": [0, 0]}\n{"step": 3')            # of a run that was killed later
    train.train(cfg, device="cpu")
    assert [line["step"] for line in metrics(cfg.out)] == [5, 10, 15, 20]


def test_a_longer_run_continues_a_shorter_run_and_fresh_starts_over(tmp_path, capsys):
    train.train(tiny(tmp_path, steps=10), device="cpu")
    (tmp_path / "run" / "scores.json").write_text("{}")
    train.train(tiny(tmp_path, steps=15), device="cpu")
    assert "continuing" in capsys.readouterr().out and state(tiny(tmp_path))["step"] == 15
    assert not (tmp_path / "run" / "scores.json").exists()                      # those were of the shorter run
    (tmp_path / "run" / "scores.jsonl").write_text("{}")
    train.train(tiny(tmp_path, steps=5), fresh=True, device="cpu")
    assert not (tmp_path / "run" / "scores.jsonl").exists()
    assert "continuing" not in capsys.readouterr().out and state(tiny(tmp_path))["step"] == 5
    assert [p.name for p in checkpoint.steps(tmp_path / "run")] == ["step-00000005.pt"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [5]


def test_a_checkpoint_of_another_configuration_is_refused_and_kept(tmp_path):
    train.train(tiny(tmp_path, steps=5), device="cpu")
    before = state(tiny(tmp_path))
    with pytest.raises(UserError, match=r"mask was 'causal' and is now 'none'.*--out.*--fresh"):
        train.train(tiny(tmp_path, mask="none"), device="cpu")
    assert same(before["model"], state(tiny(tmp_path))["model"])


@pytest.mark.slow
def test_thirty_steps_end_to_end(tmp_path, capsys):
    cfg = tiny(tmp_path, steps=30, batch=64, lr=4e-3, num_samples=500)
    train_and_score(cfg)
    lines = metrics(cfg.out)
    assert lines[-1]["step"] == 30 and lines[-1]["images"] == 1920
    assert lines[-1]["loss"] < 0.85 * lines[0]["loss"] and all(len(line["loss_bands"]) == 2 for line in lines)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "samples.png", "trajectory.png", "loss.png", "scores.json"}
    assert Config.from_dict(json.loads((tmp_path / "run" / "config.json").read_text())) == cfg
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["n"] == 500 and scores["nfe"] == 8 and 0 < scores["frechet_pixel"] < 10
    out = capsys.readouterr().out
    assert "4 + 4 = 8" in out and "frechet_pixel" in out and f"python sample.py {cfg.out}" in out


@pytest.mark.parametrize("settings", [dict(num_scales=1), dict(num_scales=3, size="32,2,2,1"), dict(experts="qkv"),
                                      dict(mask="self", experts="none", condition_tokens=False),
                                      dict(mask="none", noise="independent", path="gvp", full_range=False),
                                      dict(ema=0.0, clip=0.0, label_drop=0.0, precision="bfloat16", warmup=2)])
def test_every_option_trains_and_samples(tmp_path, settings):
    cfg = tiny(tmp_path, steps=3, log_every=1, **settings)
    train.train(cfg, device="cpu")
    run = load.load_run(cfg.out, device="cpu")
    assert run.weights == ("ema" if cfg.ema else "raw") and run.step == 3
    y = torch.arange(2)
    assert sample.generate(run, 2, y, progress=False, solver="euler", steps=3)[0].shape == (2, 8, 8, 1)


def write_images(folder, names, seed=0, side=(20, 24)):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        noise = np.random.default_rng(seed + i).integers(0, 256, (*side, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")


def test_an_image_folder_trains_unconditionally(tmp_path):
    write_images(tmp_path / "images", range(6))
    cfg = tiny(tmp_path, dataset="folder", data=str(tmp_path / "images"), res=16, steps=2)
    train_and_score(cfg)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert "frechet_pixel" in scores and "label_agreement" not in scores


# ---------------------------------------------------------------------------------------------------------------------
# pieces


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    cfg = Config(lr=1e-2, lr_end=1e-4, warmup=10, steps=110)
    rates = [train.learning_rate(cfg, step) for step in range(111)]
    assert rates[0] == pytest.approx(1e-3) and rates[9] == rates[10] == pytest.approx(1e-2)
    assert rates[60] == pytest.approx((1e-2 + 1e-4) / 2) and rates[110] == pytest.approx(1e-4)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_ema_is_a_float32_average_updated_by_its_decay():
    model, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.ones_(ema.weight)
    for _ in range(1000):
        train.update_ema(ema, model, 0.9999, step=10**6)                        # bfloat16 would not move at all
    assert ema.weight.dtype == torch.float32 and ema.weight.item() == pytest.approx(0.9999**1000, rel=1e-4)
    train.update_ema(ema, model, 0.9999, step=0)                                # early steps average over less
    assert ema.weight.item() == pytest.approx(0.1 * 0.9999**1000, rel=1e-4)


def test_ema_is_updated_once_for_each_step_and_sampled_by_default(tmp_path, monkeypatch):
    calls, update = [], train.update_ema
    monkeypatch.setattr(train, "update_ema", lambda *arguments: (calls.append(arguments[-1]), update(*arguments)))
    cfg = tiny(tmp_path, steps=7)
    train.train(cfg, device="cpu")
    assert calls == list(range(7))
    saved = state(cfg)
    assert not same(saved["model"], saved["ema"])
    for raw, key in ((False, "ema"), (True, "model")):
        assert same(dict(load.load_run(cfg.out, raw=raw, device="cpu").model.state_dict()), saved[key])


def test_labels_are_dropped_per_example_at_the_given_rate(tmp_path, monkeypatch):
    """One label for each example reaches all bands: the loss sees labels, not bands."""
    batches, loss = [], baselines.lapflow.loss

    def record(model, x1, y, *arguments):
        batches.append(y)
        return loss(model, x1, y, *arguments)

    monkeypatch.setattr(baselines.lapflow, "loss", record)
    train.train(tiny(tmp_path, steps=10, batch=200), device="cpu")
    assert (torch.cat(batches) == 10).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert all(0.02 < (y == 10).float().mean() < 0.2 for y in batches)          # not whole batches


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def test_checkpoints_hold_plain_values_and_the_last_two_are_kept(tmp_path):
    train.train(tiny(tmp_path, save_every=5), device="cpu")
    run = tmp_path / "run"
    assert [p.name for p in checkpoint.steps(run)] == ["step-00000020.pt", "step-00000015.pt"]
    loaded = torch.load(run / "step-00000020.pt", weights_only=True)
    assert set(loaded) == {"version", "step", "config", "data", "model", "ema", "optimizer"}
    assert not any(name.startswith(("module.", "model.", "_orig_mod.")) for name in loaded["model"])
    assert not list(run.glob("*.tmp"))


def saved_twice(tmp_path) -> tuple:
    """The checkpoints of steps 10 and 20 of a run, newest first."""
    for step in (10, 20):
        checkpoint.save(tmp_path, {"step": step, "config": {}, "data": {}, "model": {"weight": torch.randn(2000)},
                                   "ema": None, "optimizer": {}})
    return tuple(checkpoint.steps(tmp_path))


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "text", "version"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys, how):
    newest, before = saved_twice(tmp_path)
    damage(newest, how)
    assert checkpoint.load_newest(tmp_path)["step"] == 10
    assert newest.name in capsys.readouterr().err and newest.exists()
    damage(before, how)
    with pytest.raises(UserError, match="no checkpoint of .* can be used"):
        checkpoint.load_newest(tmp_path)


def test_foreign_and_malicious_checkpoints_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"version": 1, "step": Bomb()}, tmp_path / "step-00000001.pt")
    with pytest.raises(UserError, match="refused"):
        checkpoint.read(tmp_path / "step-00000001.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read(tmp_path / "plain.pt")
    assert not (tmp_path / "executed").exists()
    torch.save({"version": 0}, tmp_path / "old.pt")
    with pytest.raises(UserError, match="version 0"):
        checkpoint.read(tmp_path / "old.pt")
    torch.save({"version": checkpoint.VERSION, "step": 1, "config": {}}, tmp_path / "part.pt")
    with pytest.raises(UserError, match="is not a train.py checkpoint: it lacks data, model, ema, optimizer"):
        checkpoint.read(tmp_path / "part.pt")


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, {"step": 1})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match="No space left.*intact"):
        checkpoint.save(tmp_path, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]


@pytest.mark.parametrize("place", ["half written", "written", "flushed"])
@needs_fork
def test_a_save_that_is_killed_leaves_the_old_checkpoint_of_the_same_step(tmp_path, place):
    """A run that changes its sampling settings writes its last step again, over the checkpoint that is there."""
    newest, _ = saved_twice(tmp_path)
    before, state = newest.read_bytes(), {**checkpoint.read(newest), "model": {"weight": torch.randn(2000)}}
    child = os.fork()
    if child == 0:
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        class Torn:
            def write(self, data):
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                die()

        def tear(state, file):
            torn = Torn()
            torn.file = file
            torch_save(state, torn)

        torch_save = torch.save
        if place == "half written":
            checkpoint.torch = types.SimpleNamespace(save=tear)
        else:
            setattr(checkpoint.os, {"written": "fsync", "flushed": "replace"}[place], die)
        checkpoint.save(tmp_path, state)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert newest.read_bytes() == before and checkpoint.load_newest(tmp_path)["step"] == 20
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".pt"] == [".tmp"]
    checkpoint.prepare(Config(out=str(tmp_path)), fresh=False, room=0, finished=False)
    assert not list(tmp_path.glob("*.tmp"))
    checkpoint.save(tmp_path, state)                                            # and left alone it is replaced
    assert same(checkpoint.load_newest(tmp_path)["model"], state["model"])


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The file of step 5 is held back until step 9 has changed everything: it still holds step 5. Then step 10 waits
    for it."""
    whole, cfg = (tiny(tmp_path, name, steps=10, save_every=5) for name in ("whole", "run"))
    train.train(whole, device="cpu")
    write, update, events, go = checkpoint.save, train.update_ema, [], threading.Event()

    def slow(run, state, *arguments):
        events.append("begin")
        assert go.wait(20), "training waits for the file"
        time.sleep(0.2)
        write(run, state, *arguments)
        events.append("end")

    def step(ema, model, decay, number):
        update(ema, model, decay, number)
        events.append(number)
        if number == 8:
            go.set()

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(train, "update_ema", step)
    train.train(cfg, device="cpu")
    assert events.index("begin") < events.index("end") and events.index(8) < events.index("end")
    assert events[-2:] == ["begin", "end"] and events.count("begin") == 2       # never two at a time
    for number in (5, 10):
        a, b = (checkpoint.read(checkpoint.path(Path(one.out), number)) for one in (whole, cfg))
        assert same(a["model"], b["model"]) and same(a["ema"], b["ema"])
        for moments_a, moments_b in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(),
                                        strict=True):
            assert same(moments_a, moments_b)


@pytest.fixture
def full_disk(monkeypatch):
    """No checkpoint can be written; set when the first was tried."""
    tried = threading.Event()

    def save(*_):
        tried.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    return tried


def test_a_write_that_fails_ends_training_before_the_next(tmp_path, monkeypatch, full_disk):
    """Hours may lie between two checkpoints."""
    update, last = train.update_ema, []

    def step(ema, model, decay, number):
        update(ema, model, decay, number)
        last.append(number)
        if number > 5:
            assert full_disk.wait(20)
            time.sleep(0.01)

    monkeypatch.setattr(train, "update_ema", step)
    with pytest.raises(UserError, match="cannot write the checkpoint .*step-00000005.*No space left.*intact"):
        train.train(tiny(tmp_path, steps=1000, save_every=5), device="cpu")
    assert last[-1] < 500 and len(last) == last[-1] + 1
    with pytest.raises(UserError, match="step-00000003.*No space left"):        # the end waits for the last one
        train.train(tiny(tmp_path, "short", steps=3), device="cpu")


def writer_of(tmp_path) -> tuple[checkpoint.Writer, dict]:
    (tmp_path / "run").mkdir()
    writer = checkpoint.Writer(tiny(tmp_path), Ranks(0, 1, torch.device("cpu")))
    return writer, {"step": 7, "config": {}, "data": {}, "model": {"w": torch.ones(9)}, "ema": None, "optimizer": {}}


def test_an_error_in_training_waits_for_the_checkpoint(tmp_path, monkeypatch):
    writer, state = writer_of(tmp_path)
    write = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *arguments: (time.sleep(0.2), write(*arguments)))
    with pytest.raises(ZeroDivisionError), writer:
        writer.save(state)
        state["model"]["w"].zero_()
        _ = 1 / 0
    assert checkpoint.load_newest(tmp_path / "run")["model"]["w"].sum() == 9


def test_an_error_in_training_does_not_hide_that_the_disk_is_full(tmp_path, full_disk, capsys):
    writer, state = writer_of(tmp_path)
    with pytest.raises(ZeroDivisionError), writer:
        writer.save(state)
        _ = 1 / 0
    assert "warning: cannot write the checkpoint" in capsys.readouterr().err


def test_without_memory_for_a_copy_training_waits_for_the_file(tmp_path, monkeypatch):
    def no_memory(state):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    writer, state = writer_of(tmp_path)
    monkeypatch.setattr(checkpoint, "copied", no_memory)
    with writer:
        writer.save(state)
        assert checkpoint.steps(tmp_path / "run") and not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_from_a_gpu_is_of_the_moment_of_the_save(tmp_path):
    """Although it arrives later, in pinned memory, and the weights change at once."""
    writer, state = writer_of(tmp_path)
    writer.ranks, weight = Ranks(0, 1, torch.device("cuda")), torch.zeros(2**26, device="cuda")
    with writer:
        for step in range(1, 6):
            weight.fill_(step)
            writer.save({**state, "step": step, "model": {"w": weight}})
            weight.zero_()
    assert checkpoint.copied(weight).is_pinned()
    assert [checkpoint.read(path)["model"]["w"].unique().tolist() for path in checkpoint.steps(tmp_path / "run")] == [
        [5.0], [4.0]]


def test_newest_run_is_the_one_saved_last(tmp_path):
    for i, name in enumerate(("b", "a", "c")):
        (tmp_path / name).mkdir()
        os.utime(checkpoint.save(tmp_path / name, {"step": 1}), (i, i))
    os.utime(tmp_path / "a" / "step-00000001.pt", (9, 9))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "a"
    os.utime(checkpoint.save(tmp_path / "b", {"step": 2}), (10, 10))            # its last checkpoint counts
    assert checkpoint.newest_run(tmp_path) == tmp_path / "b"
    with pytest.raises(UserError, match="no trained run"):
        checkpoint.newest_run(tmp_path / "nowhere")


def test_missing_runs_are_named(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        load.load_run(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="holds no checkpoint"):
        load.load_run(str(tmp_path))


def test_checkpoints_at_multiples_stay_and_unfinished_files_go(tmp_path):
    cfg = tiny(tmp_path, save_every=2, keep=1, keep_every=8)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-00000001.tmp").write_text("of a save that was killed")
    train.train(cfg, device="cpu")
    assert [p.name for p in sorted((tmp_path / "run").glob("step-*"))] == [
        "step-00000008.pt", "step-00000016.pt", "step-00000020.pt"]


# ---------------------------------------------------------------------------------------------------------------------
# errors before the first step


def test_an_unwritable_run_directory_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written.*--out"):
        train.train(tiny(tmp_path, "file/run"), device="cpu")


def test_an_unknown_device_is_an_error(tmp_path):
    with pytest.raises(UserError, match="device"):
        train.train(tiny(tmp_path), device="gpu")


@pytest.mark.parametrize("settings, words", [
    (dict(res="8"), "res must be a whole number"), (dict(lr="fast"), "lr must be a number"),
    (dict(steps=True), "steps must be a whole number"), (dict(flip=1), "flip must be true or false"),
    (dict(starts=(0.0,)), "2 scales need 2 starts"), (dict(starts="0,0.5"), "starts must be a list"),
    (dict(batch=0), "batch must be at least 1"), (dict(ema=1.0), "ema must be at least 0 and below 1"),
    (dict(label_drop=-0.1), "label_drop"), (dict(beta2=1.0), "beta2"),
    (dict(noise="pink"), "unknown noise"), (dict(stages="all"), "unknown stages"),
    (dict(precision="half"), "precision"),
    (dict(batch=1), "stratified stages need a batch of at least 2"),
    (dict(batch=4, stage_weights=(4, 1)), "a batch of at least 5 images, one for each stage, not 4"),
    (dict(patches=(2, 0.5)), "2 scales need 2 patch sizes, whole numbers, not 2.0,0.5"),
    (dict(patches=(2, 2), method="dfm"), "the patches of dfm are those of --size: leave out --patches"),
    (dict(stage_weights=(1, 1, 2)), "2 scales need 2 stage weights, each above 0, not 1.0,1.0,2.0"),
    (dict(stage_weights=(1, 0)), "2 scales need 2 stage weights, each above 0"),
    (dict(noise_scale=(1, 0.9, 0.9)), "2 scales need 2 noise scales, none below 0, not 1.0,0.9,0.9"),
    (dict(noise_scale=(1, -1)), "2 scales need 2 noise scales, none below 0"),
    (dict(method="dfm", stage_weights=(1, 2)), "DFM has its own weights of stages"),
    (dict(lr=float("nan")), "lr must be at least 0"), (dict(rtol=0.0), "rtol and atol must be numbers above 0")])
def test_a_wrong_setting_is_named(settings, words):
    with pytest.raises(UserError, match=words):
        Config(**settings)


def test_starts_are_evenly_spaced_unless_given():
    assert Config(num_scales=4).starts == (0.0, 0.25, 0.5, 0.75)
    assert Config(starts=[0, 0.3]).starts == (0.0, 0.3)


def test_a_configuration_survives_json():
    cfg = paper.resolve({"dataset": "folder", "batch": 5})
    assert Config.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    with pytest.raises(UserError, match="unknown settings.*colour"):
        Config.from_dict({"colour": 1})


def test_data_is_loaded_before_anything_is_written(tmp_path):
    cfg = tiny(tmp_path, dataset="folder", data=str(tmp_path / "none"))
    with pytest.raises(UserError):
        train.train(cfg, device="cpu")
    assert not (tmp_path / "run").exists()


def test_guidance_that_cannot_work_is_an_error_before_training(tmp_path):
    with pytest.raises(UserError, match="guidance needs a null condition"):
        train.train(tiny(tmp_path, cfg_scale=1.5, label_drop=0.0), device="cpu")
    assert not (tmp_path / "run").exists()


def test_too_little_disk_for_the_checkpoints_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="the checkpoints need .* GB more, but there are 0.0 GB free"):
        train.train(tiny(tmp_path), device="cpu")


def test_checkpoints_that_stay_for_good_need_room_too(tmp_path, monkeypatch):
    train.train(tiny(tmp_path, steps=1), device="cpu")
    size = checkpoint.path(tmp_path / "run", 1).stat().st_size
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=4 * size))
    train.train(tiny(tmp_path, "few", steps=1, keep=2), device="cpu")           # three at a time
    with pytest.raises(UserError, match="the checkpoints need"):
        train.train(tiny(tmp_path, "many", steps=1000, keep=2, keep_every=100), device="cpu")


def test_other_sampling_settings_of_a_finished_run_reach_its_checkpoint(tmp_path):
    train.train(tiny(tmp_path, steps=5), device="cpu")
    train.train(tiny(tmp_path, steps=5, solver="heun", solver_steps=6), device="cpu")
    assert load.load_run(str(tmp_path / "run"), device="cpu").cfg.solver == "heun"


def test_a_folder_that_changed_is_not_continued(tmp_path):
    write_images(tmp_path / "images", "abc")
    cfg = tiny(tmp_path, dataset="folder", data=str(tmp_path / "images"), res=16, steps=2)
    train.train(cfg, device="cpu")
    (tmp_path / "images" / "c.png").rename(tmp_path / "images" / "d.png")
    with pytest.raises(UserError, match="other images or classes"):
        train.train(cfg, device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# while it trains


@pytest.mark.parametrize("setting", ["path", "pyramid"])
def test_a_misspelt_option_deletes_no_run(tmp_path, setting):
    cfg = tiny(tmp_path, steps=1)
    train.train(cfg, device="cpu")
    with pytest.raises(UserError, match="unknown"):
        train.train(replace(cfg, **{setting: "cubik"}, stages="batch"), fresh=True, device="cpu")
    assert (Path(cfg.out) / "step-00000001.pt").exists()


def test_a_fresh_start_that_cannot_be_keeps_the_run(tmp_path, monkeypatch):
    cfg = tiny(tmp_path, steps=1)
    train.train(cfg, device="cpu")
    before = {path.name: path.read_bytes() for path in Path(cfg.out).iterdir()}
    with pytest.raises(UserError, match="there is no run directory 'typo'"):
        train.train(replace(cfg, init="typo"), fresh=True, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
        with pytest.raises(UserError, match="the checkpoints need"):
            train.train(cfg, fresh=True, device="cpu")
        patch.setattr(load.Run, "ready", lambda run: (_ for _ in ()).throw(UserError("no autoencoder")))
        with pytest.raises(UserError, match="no autoencoder"):
            train.train(cfg, fresh=True, device="cpu")
    assert {path.name: path.read_bytes() for path in Path(cfg.out).iterdir()} == before
    old = state(cfg)
    train.train(replace(cfg, init=cfg.out, lr=0.0, lr_end=0.0), fresh=True, device="cpu")      # from its own weights
    assert same(state(cfg)["model"], old["ema"])


@pytest.mark.parametrize("problem", [UserError, OSError])
def test_samples_that_fail_during_training_do_not_end_it(tmp_path, monkeypatch, capsys, problem):
    generate, calls = sample.generate, []

    def fail_first(*arguments, **settings):
        calls.append(1)
        if len(calls) == 1:
            raise problem("dopri5 cannot meet the tolerance")
        return generate(*arguments, **settings)

    monkeypatch.setattr(sample, "generate", fail_first)
    train.train(tiny(tmp_path, sample_every=5, eval_every=10), device="cpu")
    assert "no samples at step 5: dopri5 cannot meet the tolerance; training goes on" in capsys.readouterr().err
    run = tmp_path / "run"
    assert sorted(p.name for p in run.glob("samples-*.png")) == ["samples-00000010.png", "samples-00000015.png"]
    assert [line["step"] for line in checkpoint.read_lines([run / "scores.jsonl"])] == [10]
    assert state(tiny(tmp_path))["step"] == 20
    assert torch.get_float32_matmul_precision() == "high"                       # sampling computes in full float32


def test_a_line_of_metrics_counts_its_own_steps_and_their_time(tmp_path, monkeypatch):
    """By a clock of the test: three steps of two seconds, half a second of each for data; two processes, three images
    each. What is paused does not count."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(log, "time", types.SimpleNamespace(**{**vars(time), "perf_counter": lambda: clock.now}))
    for name, value in (("peak_flops", 900.0), ("meta_model", None), ("forward_flops", [10, 30])):
        monkeypatch.setattr(log, name, lambda *_, value=value: value)
    monkeypatch.setattr(Ranks, "sum", lambda self, x: x)
    (tmp_path / "run").mkdir()
    watch = log.Log(tiny(tmp_path, batch=6), Ranks(0, 2, torch.device("cpu")), 10, {"count": 24})

    def data():
        while True:
            clock.now += 0.5
            yield

    stream = data()
    for step in (11, 12, 13):
        watch.wait_for(stream)
        watch.add(torch.tensor(1.0), [(torch.rand(3), torch.ones(3))] * 2, 3)
        clock.now += 1.5
        watch.end_step(step, torch.tensor(1.0), 1e-3)
        with watch.paused():
            clock.now += 7
    line = watch.write()
    expected = {"step": 13, "images": 78, "epoch": 3.25, "images_per_second": 3, "images_per_second_per_gpu": 1.5,
                "data_wait": 0.25, "seconds_left": 14, "mfu": 3 * 4.5 * (10 + 30) / 6 / 900}
    assert {name: line[name] for name in expected} == pytest.approx(expected)


def test_the_loss_of_each_band_is_drawn_under_its_name(tmp_path, monkeypatch):
    lines, curves = [{"step": 5, "loss_bands": [1.0, 4.0, None]}, {"step": 10, "loss_bands": [2.0, 5.0, 7.0]}], []
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(pictures, "plot", lambda path, given, *_, **__: curves.extend(given))
    pictures.draw_loss(tmp_path)
    assert [(style["label"], style["color"], steps, values) for steps, values, style in curves] == [
        ("band 0, coarse", pictures.COARSE, (5, 10), (1.0, 2.0)),
        ("band 1, middle", pictures.MIDDLE, (5, 10), (4.0, 5.0)), ("band 2, fine", pictures.FINE, (10,), (7.0,))]


def test_two_samples_are_enough_for_the_pictures(tmp_path):
    cfg = tiny(tmp_path, steps=1, num_samples=2)
    train.finish(train.train(cfg, device="cpu"))
    assert (tmp_path / "run" / "trajectory.png").exists() and (tmp_path / "run" / "scores.json").exists()


def test_scores_of_an_older_run_go_with_it(tmp_path):
    cfg, run = tiny(tmp_path, steps=2), tmp_path / "run"
    train.train(cfg, device="cpu")
    for name in ("scores.json", "scores-classifier.json"):
        (run / name).write_text("{}")
    train.train(cfg, device="cpu")                          # it is finished: nothing changes
    assert len([*run.glob("scores*.json")]) == 2
    train.train(cfg, fresh=True, device="cpu")
    assert not [*run.glob("scores*.json")]


def test_scores_after_the_last_checkpoint_go_when_a_run_continues(tmp_path):
    (tmp_path / "run").mkdir()
    for step in (4, 8, 12):
        checkpoint.append_line(tmp_path / "run" / "scores.jsonl", {"step": step})
    log.Log(tiny(tmp_path), Ranks(0, 1, torch.device("cpu")), 8, {"count": 24})
    assert [line["step"] for line in checkpoint.read_lines([tmp_path / "run" / "scores.jsonl"])] == [4, 8]


def test_steps_that_are_not_finite_stop_training_only_in_a_row(tmp_path):
    (tmp_path / "run").mkdir()
    watch = log.Log(tiny(tmp_path), Ranks(0, 1, torch.device("cpu")), 0, {"count": 24})

    def line(norms):
        for norm in norms:
            watch.add(torch.tensor(1.0), [(torch.rand(16), torch.ones(16))] * 2, 16)
            watch.end_step(1, torch.tensor(norm), 1e-3)
        return watch.write()

    assert line([float("nan"), 1.0] * 2 * log.PATIENCE)["skipped"] == 2 * log.PATIENCE
    line([float("nan")] * (log.PATIENCE - 1))
    with pytest.raises(UserError, match="10 steps in a row were not finite"):
        line([float("nan")])


def test_a_trajectory_says_when_a_band_begins(tmp_path, monkeypatch):
    """Band 1 of an image that is at t = 0.25 and 0.5 has no pixels yet, and begins at 0.5."""
    drawn, bands = [], [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 8, 8)]
    run = types.SimpleNamespace(schedule=Schedule((0.0, 0.5)), facts={}, decode=to_images)
    monkeypatch.setattr(pictures, "draw_images", lambda path, rows, *_: drawn.extend(rows))
    pictures.draw_trajectory(tmp_path / "x.png", run, [(0.0, bands[:1]), (0.5, bands), (1.0, bands)], columns=3)
    coarse, fine, whole = drawn
    assert fine[0] == "from\nt = 0.5" and not any(isinstance(cell, str) for cell in (*coarse, *fine[1:], *whole))


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    numbers, purged = [], []
    writer = types.SimpleNamespace(add_scalar=lambda *number: numbers.append(number), flush=lambda: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        types.SimpleNamespace(SummaryWriter=lambda _, purge_step: purged.append(purge_step) or writer))
    train.train(tiny(tmp_path, logger="tensorboard", steps=5), device="cpu")
    names, values, steps = zip(*numbers, strict=True)
    assert {"loss", "loss_bands/0", "lr"} <= set(names) and set(steps) == {5}
    assert all(isinstance(value, (int, float)) for value in values)
    train.train(tiny(tmp_path, logger="tensorboard", steps=10), device="cpu")
    assert purged == [1, 6]                                 # curves of steps that are taken again are hidden
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    before = state(tiny(tmp_path))
    for call in (lambda: train.train(tiny(tmp_path, logger="tensorboard"), fresh=True, device="cpu"), train.main):
        monkeypatch.setattr(sys, "argv", shlex.split(f"train.py --fresh --logger tensorboard --out {tmp_path}/run"))
        with pytest.raises(UserError, match="--logger tensorboard needs its package: pip install tensorboard"):
            call()
    assert state(tiny(tmp_path))["step"] == before["step"] == 10                  # --fresh deleted nothing


def test_a_restart_by_torchrun_does_not_start_afresh_again(tmp_path, monkeypatch, capsys):
    cfg = tiny(tmp_path)
    train.train(replace(cfg, steps=10), device="cpu")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.train(cfg, fresh=True, device="cpu").resumed_at == 10
    out = capsys.readouterr().out
    assert "data       1,797 images, 10 classes (0, 1, 2, ...)" in out and "continuing" in out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train.train(cfg, fresh=True, device="cpu").resumed_at == 0


def test_what_is_sampled_is_mapped_from_the_file(tmp_path, monkeypatch):
    """Eight processes of torchrun share it, and its optimizer is not read. Training reads its own copy."""
    cfg, read, mapped = tiny(tmp_path, steps=2), torch.load, []
    train.train(cfg, device="cpu")
    monkeypatch.setattr(torch, "load", lambda *x, mmap, **more: mapped.append(mmap) or read(*x, mmap=mmap, **more))
    run = load.load_run(cfg.out, device="cpu")
    step = load.load_run(str(checkpoint.path(Path(cfg.out), 2)), device="cpu")
    train.train(replace(cfg, steps=4), device="cpu")
    assert mapped == [True, True, False]
    checkpoint.path(Path(cfg.out), 2).unlink()              # as training does while somebody samples
    assert np.array_equal(run.sample(4), step.sample(4))
