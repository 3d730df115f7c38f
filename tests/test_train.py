"""The training loop: resume, EMA, checkpoints, what goes wrong, and the whole path from data to scores."""

import json
import os
import pickle
import signal
import zipfile

import numpy as np
import pytest
import torch

import checkpoint
import config
import runs
import sample
import train
from config import Config, UserError
from conftest import same, state, tiny


@pytest.mark.parametrize("stages", ["stratified", "batch"])
def test_twenty_steps_are_ten_and_a_restart_and_ten(tmp_path, monkeypatch, capsys, stages):
    whole, parts = tiny(tmp_path, "whole", stages=stages), tiny(tmp_path, "parts", stages=stages)
    train.main(whole, device="cpu")
    update = train.update_ema

    def terminate_at_ten(ema, model, decay, step):
        update(ema, model, decay, step)
        if step == 9:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)                                  # twice, of two kinds

    monkeypatch.setattr(train, "update_ema", terminate_at_ten)
    train.main(parts, device="cpu")
    assert "stopped at step 10, saved" in capsys.readouterr().out
    assert state(parts)["step"] == 10
    torch.manual_seed(999)                                                      # nothing may hang on the global state
    train.main(parts, device="cpu")                                             # the same command, no flag
    assert "continuing" in capsys.readouterr().out
    a, b = state(whole), state(parts)
    assert a["step"] == b["step"] == 20
    assert same(a["model"], b["model"]) and same(a["ema"], b["ema"])
    for one, two in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert same(one, two)
    losses = [[json.loads(line)["loss_bands"] for line in open(cfg.out + "/metrics.jsonl")] for cfg in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    images = [sample.generate(runs.load_run(cfg.out, device="cpu"), 4, np.arange(4), progress=False, solver="euler",
                              steps=4)[0] for cfg in (whole, parts)]
    assert np.array_equal(*images)


def test_metrics_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    cfg = tiny(tmp_path)
    train.main(cfg, device="cpu")
    with open(cfg.out + "/metrics.jsonl", "a") as file:
        file.write('{"step": 25, "loss_bands": [0, 0]}\n{"step": 3')            # of a run that was killed later
    train.main(cfg, device="cpu")
    assert [json.loads(line)["step"] for line in open(cfg.out + "/metrics.jsonl")] == [5, 10, 15, 20]


def test_a_longer_run_continues_a_shorter_one_and_fresh_starts_over(tmp_path, capsys):
    train.main(tiny(tmp_path, steps=10), device="cpu")
    train.main(tiny(tmp_path, steps=15), device="cpu")
    assert "continuing" in capsys.readouterr().out and state(tiny(tmp_path))["step"] == 15
    train.main(tiny(tmp_path, steps=5), fresh=True, device="cpu")
    assert "continuing" not in capsys.readouterr().out and state(tiny(tmp_path))["step"] == 5
    assert [p.name for p in checkpoint.steps(tmp_path / "run")] == ["step-00000005.pt"]


def test_a_checkpoint_of_another_configuration_is_refused_and_kept(tmp_path):
    train.main(tiny(tmp_path, steps=5), device="cpu")
    before = state(tiny(tmp_path))
    with pytest.raises(UserError, match=r"mask was 'causal' and is now 'none'.*--out.*--fresh"):
        train.main(tiny(tmp_path, mask="none"), device="cpu")
    assert same(before["model"], state(tiny(tmp_path))["model"])


def test_thirty_steps_end_to_end(tmp_path, capsys):
    cfg = tiny(tmp_path, steps=30, batch=64, lr=4e-3, num_samples=500)
    train.main(cfg, device="cpu")
    lines = [json.loads(line) for line in open(cfg.out + "/metrics.jsonl")]
    assert lines[-1]["step"] == 30 and lines[-1]["images"] == 1920
    assert lines[-1]["loss"] < 0.85 * lines[0]["loss"] and all(len(line["loss_bands"]) == 2 for line in lines)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "samples.png", "trajectory.png", "loss.png", "scores.json"}
    assert Config.from_dict(json.loads((tmp_path / "run" / "config.json").read_text())) == cfg
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["n"] == 500 and scores["nfe"] == 8 and 0 < scores["frechet_pixel"] < 10
    out = capsys.readouterr().out
    assert "NFE        4 + 4 = 8" in out and "frechet_pixel" in out and "next       python sample.py" in out


@pytest.mark.parametrize("settings", [dict(num_scales=1), dict(num_scales=3, size="32,2,2,1"), dict(experts="qkv"),
                                      dict(mask="self", experts="none", condition_tokens=False),
                                      dict(mask="none", noise="independent", path="gvp", full_range=False),
                                      dict(ema=0.0, clip=0.0, label_drop=0.0, precision="bfloat16", warmup=2)])
def test_every_option_trains_and_samples(tmp_path, settings):
    cfg = tiny(tmp_path, steps=3, log_every=1, **settings)
    train.main(cfg, device="cpu")
    run = runs.load_run(cfg.out, device="cpu")
    assert run.weights == ("ema" if cfg.ema else "raw") and run.step == 3


def test_an_image_folder_trains_unconditionally(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{i}.png")
    cfg = tiny(tmp_path, dataset="folder", data=str(tmp_path / "images"), res=16, steps=2)
    train.main(cfg, device="cpu")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert "swd_16" in scores and "label_agreement" not in scores


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
    train.main(cfg, device="cpu")
    assert calls == list(range(7))
    saved = state(cfg)
    assert not same(saved["model"], saved["ema"])
    for raw, key in ((False, "ema"), (True, "model")):
        assert same(dict(runs.load_run(cfg.out, raw=raw, device="cpu").model.state_dict()), saved[key])


def test_labels_are_dropped_per_example_at_the_stated_rate(tmp_path, monkeypatch):
    """One label for each example reaches all bands: the loss sees labels, not bands."""
    seen, loss = [], sample.loss

    def record(model, x1, y, *arguments, **settings):
        seen.append(y)
        return loss(model, x1, y, *arguments, **settings)

    monkeypatch.setattr(sample, "loss", record)
    train.main(tiny(tmp_path, steps=10, batch=200), device="cpu")
    labels = torch.cat(seen)
    assert (labels == 10).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert all(0.02 < (y == 10).float().mean() < 0.2 for y in seen)             # not whole batches


def test_checkpoints_hold_plain_values_and_the_last_two_are_kept(tmp_path):
    train.main(tiny(tmp_path, save_every=5), device="cpu")
    run = tmp_path / "run"
    assert [p.name for p in checkpoint.steps(run)] == ["step-00000020.pt", "step-00000015.pt"]
    loaded = torch.load(run / "step-00000020.pt", weights_only=True)
    assert set(loaded) == {"version", "step", "config", "data", "model", "ema", "optimizer"}
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in loaded["model"])
    assert not list(run.glob("*.tmp"))


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "version":                                    # of a later program
        return torch.save({**torch.load(path, weights_only=True), "version": 99}, path)
    if how == "flipped":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
        raw[largest.header_offset + 200] ^= 16
    path.write_bytes({"truncated": raw[: len(raw) // 2], "empty": b"", "flipped": raw, "text": b"hello"}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "text", "version"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys, how):
    train.main(tiny(tmp_path), device="cpu")
    newest, before = checkpoint.steps(tmp_path / "run")
    damage(newest, how)
    assert checkpoint.load_newest(tmp_path / "run")["step"] == 10
    assert newest.name in capsys.readouterr().err and newest.exists()
    damage(before, how)
    with pytest.raises(UserError, match="no checkpoint of .* can be used"):
        checkpoint.load_newest(tmp_path / "run")


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


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, {"step": 1})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError, match="No space left.*intact"):
        checkpoint.save(tmp_path, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_newest_run_is_the_one_saved_last(tmp_path):
    for i, name in enumerate(("b", "a", "c")):
        (tmp_path / name).mkdir()
        os.utime(checkpoint.save(tmp_path / name, {"step": 1}), (i, i))
    os.utime(tmp_path / "a" / "step-00000001.pt", (9, 9))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "a"
    with pytest.raises(UserError, match="no trained run"):
        checkpoint.newest_run(tmp_path / "nowhere")


def test_missing_runs_are_named(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        runs.load_run(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="holds no checkpoint"):
        runs.load_run(str(tmp_path))


def test_an_unwritable_run_directory_is_said_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written.*--out"):
        train.main(tiny(tmp_path, "file/run"), device="cpu")


def test_an_unknown_device_is_said(tmp_path):
    with pytest.raises(UserError, match="device"):
        train.main(tiny(tmp_path), device="gpu")


# ---------------------------------------------------------------------------------------------------------------------
# configuration


@pytest.mark.parametrize("settings, words", [
    (dict(res="8"), "res must be a whole number"), (dict(lr="fast"), "lr must be a number"),
    (dict(steps=True), "steps must be a whole number"), (dict(flip=1), "flip must be true or false"),
    (dict(starts=(0.0,)), "2 scales need 2 starts"), (dict(starts="0,0.5"), "starts must be a list"),
    (dict(batch=0), "batch must be at least 1"), (dict(ema=1.0), "ema"), (dict(label_drop=-0.1), "label_drop"),
    (dict(noise="pink"), "unknown noise"), (dict(stages="all"), "unknown stages"),
    (dict(precision="half"), "precision"),
    (dict(batch=1), "stratified stages need a batch of at least 2"),
    (dict(lr=float("nan")), "lr must be 0 or more"), (dict(rtol=0.0), "rtol must be a number above 0")])
def test_a_wrong_setting_is_named(settings, words):
    with pytest.raises(UserError, match=words):
        Config(**settings)


def test_starts_are_evenly_spaced_unless_given():
    assert Config(num_scales=4).starts == (0.0, 0.25, 0.5, 0.75)
    assert Config(starts=[0, 0.3]).starts == (0.0, 0.3)


def test_a_preset_yields_to_the_user(tmp_path):
    photos = config.resolve({"dataset": "photos", "batch": 3})
    assert photos.batch == 3 and photos.res == 64 and photos.out == "out/photos"
    assert config.resolve({}).out == "out/digits"
    assert config.resolve({"dataset": "photos", "res": 32}).out == "out/photos-32"
    with pytest.raises(UserError, match="unknown dataset 'dogs'"):
        config.resolve({"dataset": "dogs"})
    with pytest.raises(UserError, match="unknown settings.*colour"):
        Config.from_dict({"colour": 1})
    assert Config.from_dict(json.loads(config.show(photos))) == photos


def test_data_is_loaded_before_anything_is_written(tmp_path):
    cfg = tiny(tmp_path, dataset="folder", data=str(tmp_path / "none"))
    with pytest.raises(UserError):
        train.main(cfg, device="cpu")
    assert not (tmp_path / "run").exists()


def test_other_sampling_settings_of_a_finished_run_reach_its_checkpoint(tmp_path):
    train.main(tiny(tmp_path, steps=5), device="cpu")
    train.main(tiny(tmp_path, steps=5, solver="heun", solver_steps=6), device="cpu")
    assert runs.load_run(str(tmp_path / "run"), device="cpu").cfg.solver == "heun"


def test_guidance_that_cannot_work_is_said_before_training(tmp_path):
    with pytest.raises(UserError, match="guidance needs a null label"):
        train.main(tiny(tmp_path, cfg_scale=1.5, label_drop=0.0), device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_changed_is_not_continued(tmp_path):
    from PIL import Image

    for name in ("a", "b", "c"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / f"{name}.png")
    cfg = tiny(tmp_path, dataset="folder", data=str(tmp_path / "images"), res=16, steps=2)
    train.main(cfg, device="cpu")
    (tmp_path / "images" / "c.png").rename(tmp_path / "images" / "d.png")
    with pytest.raises(UserError, match="other images or classes"):
        train.main(cfg, device="cpu")


def test_checkpoints_at_multiples_stay_and_unfinished_ones_go(tmp_path):
    cfg = tiny(tmp_path, save_every=2, keep=1, keep_every=8)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-00000001.tmp").write_text("of a save that was killed")
    train.main(cfg, device="cpu")
    assert [p.name for p in sorted((tmp_path / "run").glob("step-*"))] == [
        "step-00000008.pt", "step-00000016.pt", "step-00000020.pt"]


def test_too_little_disk_for_the_checkpoints_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="the checkpoints need .* GB more, but there are 0.0 GB free"):
        train.main(tiny(tmp_path), device="cpu")


def test_samples_that_fail_in_the_midst_do_not_end_training(tmp_path, monkeypatch, capsys):
    generate, calls = sample.generate, []

    def fail_first(*arguments, **settings):
        calls.append(1)
        if len(calls) == 1:
            raise UserError("dopri5 cannot meet the tolerance")
        return generate(*arguments, **settings)

    monkeypatch.setattr(sample, "generate", fail_first)
    train.main(tiny(tmp_path, sample_every=5, eval_every=10), device="cpu")
    assert "no samples at step 5: dopri5 cannot meet the tolerance; training goes on" in capsys.readouterr().err
    run = tmp_path / "run"
    assert sorted(p.name for p in run.glob("samples-*.png")) == ["samples-00000010.png", "samples-00000015.png"]
    assert [json.loads(line)["step"] for line in open(run / "scores.jsonl")] == [10]
    assert state(tiny(tmp_path))["step"] == 20


def test_wandb_never_asks_and_continues_its_run(tmp_path, monkeypatch):
    """With a stand-in for the package: offline without a key, one run for each directory, numbers only."""
    import sys
    import types

    calls = []
    fake = types.SimpleNamespace(init=lambda **kw: (calls.append(kw), types.SimpleNamespace(
        log=lambda line, step: calls.append((step, line))))[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    train.main(tiny(tmp_path, logger="wandb", steps=5), device="cpu")
    assert calls[0]["mode"] == "offline" and calls[0]["id"] == "run" and calls[0]["resume"] == "allow"
    step, line = calls[1]
    assert step == 5 and {"loss", "loss_bands/0", "loss_bins/0/3", "lr"} <= set(line)
    assert all(isinstance(value, (int, float)) for value in line.values())
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--logger wandb needs its package: pip install wandb"):
        train.main(tiny(tmp_path, "other", logger="wandb"), device="cpu")
