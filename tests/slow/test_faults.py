"""Faults of a week of training: kills, signals, full disks, numbers that are not finite, too little memory, time.

`pytest -m '' tests/slow/test_faults.py` ends with a table: what was broken on purpose, how often, and what it cost.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import baselines
import train
from config import Config, UserError
from conftest import (
    FAULTS,
    FLAGS,
    TINY,
    at_first_checkpoint,
    close,
    damage,
    fork,
    losses,
    metrics,
    needs_fork,
    same,
    settings_of,
    start,
    state,
    tiny,
    worker,
)
from run import checkpoint, log
from run.ranks import StopSignals

# ---------------------------------------------------------------------------------------------------------------------
# kills and signals

TRIES = int(os.environ.get("LAPFLOW_TRIES", 5))             # 50 by hand, before a change of checkpoints is shared
STEPS = max(80, 5 * TRIES)


def newest(cfg: Config) -> int:
    """The step of the newest checkpoint, 0 without any."""
    names = [path.stem for path in checkpoint.steps(Path(cfg.out))]
    return int(names[0][5:]) if names else 0


def attempt(cfg: Config, signals: list, early: bool = True) -> int:
    """A run in a child; the signals come after a random moment, or a moment after its first new checkpoint. How it
    ended, for os.WIFSIGNALED."""
    def work():
        StopSignals().__enter__()                           # before train.train installs its own, and after
        os.write(ready[1], b".")
        job = train.train(cfg, device="cpu")
        StopSignals.ignore()                                # as train.main
        if job:
            with StopSignals(immediate=True):
                train.finish(job)

    before, ready = newest(cfg), os.pipe()
    child = fork(work, os.devnull)
    os.read(ready[0], 1)
    os.close(ready[0]), os.close(ready[1])
    if signals:
        until = time.time() + 60
        while not early and newest(cfg) == before < cfg.steps and time.time() < until:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.3 if early else 0.03))
        for number in signals:
            os.kill(child, number)
            time.sleep(0.002)
    return os.waitpid(child, 0)[1]


def attempts(tmp_path, draw_signals, count: int) -> tuple[Config, Config, dict]:
    """A run that nothing disturbs, and one with so many attempts, the last left alone."""
    random.seed(0)
    whole, broken = (tiny(tmp_path, name, steps=STEPS, save_every=1) for name in ("whole", "broken"))
    assert attempt(whole, []) == 0
    ends, saved, inside = [], [], 0
    for number in range(count):
        ends.append(attempt(broken, draw_signals(), number % 5 == 0))
        inside += len(list(Path(broken.out).glob("step-*.tmp")))
        saved.append(newest(broken))
    return whole, broken, {"ends": ends, "saved": saved, "inside": inside, "last": attempt(broken, [])}


@needs_fork
@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path):
    """Also inside the write: a checkpoint is written after each step. The last attempt is left alone."""
    whole, broken, done = attempts(tmp_path, lambda: [signal.SIGKILL], TRIES)
    assert all(os.WIFSIGNALED(end) and os.WTERMSIG(end) == signal.SIGKILL for end in done["ends"])
    assert done["saved"] == sorted(done["saved"])           # nothing saved was lost again
    assert done["saved"][-1] > TRIES // 3
    assert done["last"] == 0 and (done["inside"] or TRIES < 50)                 # some came in the midst of a write
    assert state(whole)["step"] == state(broken)["step"] == STEPS
    assert same(state(whole)["model"], state(broken)["model"]) and same(state(whole)["ema"], state(broken)["ema"])
    assert losses(whole.out) == losses(broken.out) and len(losses(whole.out)) == STEPS
    FAULTS.append(("kill -9", TRIES, TRIES, f"no checkpoint; {done['inside']} inside a write"))


@needs_fork
@pytest.mark.slow
def test_signals_at_random_moments_save_and_leave_with_zero(tmp_path):
    """SIGINT, SIGTERM, SIGUSR1, two in a row: before the first step, in the loop, while it samples."""
    whole, broken, done = attempts(tmp_path, lambda: random.choices(StopSignals.SIGNALS, k=2), TRIES)
    assert done["ends"] == [0] * TRIES and done["last"] == 0 and done["saved"] == sorted(done["saved"])
    assert state(whole)["step"] == state(broken)["step"] and same(state(whole)["model"], state(broken)["model"])
    FAULTS.append(("SIGINT, SIGTERM, SIGUSR1, two in a row", TRIES, TRIES, "no step"))


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGUSR1)])
def test_a_second_signal_while_the_process_leaves_changes_nothing(tmp_path, numbers):
    """python train.py itself: a signal saves and leaves with 0, whatever comes while the interpreter ends."""
    process = start(tmp_path, *FLAGS, "--steps", "100000", "--save-every", "10", "--out", "run", processes=1)
    at_first_checkpoint(tmp_path / "run")
    for number in numbers[:1] + 10 * numbers[1:]:
        process.send_signal(number)
        time.sleep(0.05)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in out, out
    assert "stopped at step" in out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the worker through /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hung_worker_ends_the_others(tmp_path, number, monkeypatch):
    """Dead: at once. Hung (stopped): after the time limit, here six seconds."""
    monkeypatch.setenv("LAPFLOW_TIMEOUT_MINUTES", "0.1")
    process = start(tmp_path, *FLAGS, "--steps", "100000", "--save-every", "10", "--out", "run")
    try:
        at_first_checkpoint(tmp_path / "run")
        other, victim = (worker(process.pid, rank) for rank in (0, 1))
        os.kill(victim, number)
        began = time.time()
        while Path(f"/proc/{other}").exists():              # torchrun buries it
            assert time.time() - began < 60
            time.sleep(0.05)
        took = time.time() - began
        if Path(f"/proc/{victim}").exists():                # torchrun would, after 30 seconds
            os.kill(victim, signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode != 0                      # of torchrun
    finally:
        process.kill()
    left = state(settings_of(tmp_path / "run"))["step"]
    train.train(settings_of(tmp_path / "run", steps=left + 2), device="cpu")
    assert state(settings_of(tmp_path / "run"))["step"] == left + 2
    FAULTS.append((f"a worker of two gets {signal.Signals(number).name}", 1, 1,
                   f"at most 10 steps; the other ended after {took:.0f} s"))


# ---------------------------------------------------------------------------------------------------------------------
# disks and damaged files


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Config:
    """A run that nothing disturbs, with checkpoints at steps 15 and 20."""
    cfg = tiny(tmp_path_factory.mktemp("whole"), save_every=5)
    train.train(cfg, device="cpu")
    return cfg


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "text", "version"])
def test_a_damaged_checkpoint_costs_one_interval_and_is_not_overwritten_unnamed(tmp_path, whole, capsys, how):
    """The same command names it, goes on from the one before it, and ends with the weights of an undisturbed run."""
    cfg = tiny(tmp_path, save_every=5)
    shutil.copytree(whole.out, cfg.out)
    newest = checkpoint.steps(Path(cfg.out))[0]
    damage(newest, how)
    wrong = newest.read_bytes()
    with pytest.raises(UserError):
        checkpoint.read(newest)
    assert checkpoint.load_newest(Path(cfg.out))["step"] == 15 and newest.read_bytes() == wrong
    assert newest.name in capsys.readouterr().err
    train.train(cfg, device="cpu")
    assert same(state(cfg)["model"], state(whole)["model"]) and state(cfg)["step"] == 20
    FAULTS.append((f"newest checkpoint: {how}", 1, 1, "5 of 5 steps since the one before it"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of eight megabytes, where this machine lets us make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)],
                                                    capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("only root may mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(monkeypatch, at: int, use):
    """Calls use() after step `at`."""
    update = train.update_ema

    def then(ema, model, decay, step):
        update(ema, model, decay, step)
        if step == at - 1:
            use()

    monkeypatch.setattr(train, "update_ema", then)


def test_a_full_disk_stops_with_a_sentence_and_the_previous_checkpoint_is_whole(small_disk, monkeypatch):
    cfg = Config(**{**TINY, "out": str(small_disk / "run"), "steps": 20, "save_every": 5, "keep": 1})

    def fill_disk():
        with open(small_disk / "ballast", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    with monkeypatch.context() as patch:
        fill(patch, 8, fill_disk)
        with pytest.raises(UserError, match="cannot write the checkpoint .*step-00000010.*the previous one is intact"):
            train.train(cfg, device="cpu")
    assert state(cfg)["step"] == 5 and not list(Path(cfg.out).glob("*.tmp"))
    (small_disk / "ballast").unlink()
    train.train(cfg, device="cpu")
    assert state(cfg)["step"] == 20
    FAULTS.append(("full disk while saving", 1, 1, "5 steps; the checkpoint before it is whole"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the file size")
def test_a_write_that_is_refused_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    """As a full disk, for those who may not mount one: files may not grow beyond 20,000 bytes from step 8 on."""
    import resource

    cfg, before = tiny(tmp_path, save_every=5), resource.getrlimit(resource.RLIMIT_FSIZE)
    fill(monkeypatch, 8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1])))
    try:
        with pytest.raises(UserError, match="cannot write the checkpoint .*step-00000010"):
            train.train(cfg, device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert state(cfg)["step"] == 5 and not list(Path(cfg.out).glob("*.tmp"))
    FAULTS.append(("write refused while saving", 1, 1, "5 steps; the checkpoint before it is whole"))


# ---------------------------------------------------------------------------------------------------------------------
# time


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_two_hundred_epochs_need_no_more_memory_than_twenty(tmp_path, monkeypatch):
    """200 epochs of 32 image files with a small network: memory and open files, epoch by epoch."""
    usage, update = [], train.update_ema
    for i in range(32):
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8)).astype(np.uint8)).save(
            tmp_path / "images" / str(i % 2) / f"{i}.png")

    def look(ema, model, decay, step):
        update(ema, model, decay, step)
        if (step + 1) % 2 == 0:                             # 2 x 16 images are an epoch
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            usage.append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(train, "update_ema", look)
    train.train(tiny(tmp_path, dataset="folder", data=str(tmp_path / "images"), res=8, steps=400, save_every=20,
                    log_every=10), device="cpu")
    early, late = usage[19], usage[-1]
    assert len(usage) == 200 and late[0] - early[0] < 6 and late[1] == early[1]
    FAULTS.append(("200 epochs", 1, 1, f"memory {late[0] - early[0]:+.1f} MB, open files {late[1] - early[1]:+d}"))


def test_the_same_seed_gives_the_same_run_bit_for_bit(tmp_path):
    runs = [tiny(tmp_path, name, steps=5, seed=seed) for name, seed in (("first", 0), ("second", 0), ("third", 1))]
    for cfg in runs:
        train.train(cfg, device="cpu")
    first, second, third = (state(cfg)["model"] for cfg in runs)
    assert same(first, second) and not same(first, third)


# ---------------------------------------------------------------------------------------------------------------------
# numbers that are not finite


def break_steps(monkeypatch, steps, what="loss"):
    """The loss (with its band 1, at the first example) or only the gradient of these steps is nan."""
    loss, calls = baselines.lapflow.loss, []

    def broken(model, *arguments, **settings):
        total, errors = loss(model, *arguments, **settings)
        calls.append(torch.is_grad_enabled())
        if sum(calls) in steps and calls[-1]:
            total = total * float("nan")
            if what == "loss":
                errors[1][1][0] = float("nan")
        return total, errors

    monkeypatch.setattr(baselines.lapflow, "loss", broken)


def test_a_step_that_is_not_finite_is_named_and_not_applied(tmp_path, monkeypatch, capsys):
    cfg = tiny(tmp_path, steps=8, save_every=6)
    train.train(cfg, device="cpu")
    before = checkpoint.read(checkpoint.path(Path(cfg.out), 6))
    capsys.readouterr()
    break_steps(monkeypatch, {7, 8})
    broken = tiny(tmp_path, "broken", steps=8, save_every=6)
    train.train(broken, device="cpu")
    errors = capsys.readouterr().err
    assert "the loss of band 1 is nan at step 7" in errors and "the loss of band 1 is nan at step 8" in errors
    assert errors.count("the step was not applied") == 2
    after = state(broken)
    assert after["step"] == 8 and same(after["model"], before["model"])         # as after step 6
    assert all(entry["step"] == 6 for entry in after["optimizer"]["state"].values())
    lines = metrics(broken.out)
    assert [line["skipped"] for line in lines] == [0, 0, 2] and lines[2]["loss"] is None and lines[1]["loss"] > 0


def test_a_gradient_that_is_not_finite_is_named(tmp_path, monkeypatch, capsys):
    break_steps(monkeypatch, {3}, "gradient")
    train.train(tiny(tmp_path, steps=5), device="cpu")
    assert "the norm of the gradient is nan at step 3" in capsys.readouterr().err
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [1] and lines[0]["loss"] > 0


def test_ten_in_a_row_stop_the_run_and_the_last_checkpoint_is_good(tmp_path, monkeypatch):
    cfg = tiny(tmp_path, steps=40)
    with monkeypatch.context() as patch, pytest.raises(
            UserError, match=r"loss of band 1 is nan at step 20: 10 steps in a row were not finite.*"
                             r"checkpoint is .*step-00000010\.pt"):
        break_steps(patch, set(range(11, 99)))
        train.train(cfg, device="cpu")
    saved = state(cfg)
    assert saved["step"] == 10 and all(t.isfinite().all() for t in saved["model"].values())
    train.train(tiny(tmp_path, steps=12), device="cpu")                         # and it goes on from there
    assert state(cfg)["step"] == 12


def test_nine_in_a_row_do_not(tmp_path, monkeypatch):
    assert log.PATIENCE == 10
    break_steps(monkeypatch, set(range(2, 11)))
    train.train(tiny(tmp_path, steps=12), device="cpu")
    assert state(tiny(tmp_path))["step"] == 12


# ---------------------------------------------------------------------------------------------------------------------
# memory


@pytest.mark.parametrize("most, words", [(5, r"try --micro-batch 8 \(the same batch"), (0, "no smaller micro-batch")])
def test_on_out_of_memory_the_error_suggests_what_fits(tmp_path, monkeypatch, most, words):
    """The loss refuses more images than fit; half, and half again, as the sentence suggests, trains in the end."""
    loss = baselines.lapflow.loss

    def small(model, x1, *arguments, **settings):
        if len(x1) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return loss(model, x1, *arguments, **settings)

    monkeypatch.setattr(baselines.lapflow, "loss", small)
    cfg = tiny(tmp_path, steps=2, micro_batch=16 if most else 2)
    with pytest.raises(UserError, match=f"out of memory on cpu with {cfg.micro_batch} images at a time.*{words}"):
        train.train(cfg, device="cpu")
    if most:
        train.train(tiny(tmp_path, steps=2, micro_batch=4), device="cpu")
        assert state(cfg)["step"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# optimizers that are not fused: Apple's MPS


def test_without_a_fused_optimizer_a_step_is_skipped_too_and_runs_move_between_devices(tmp_path, monkeypatch,
                                                                                       capsys):
    """The same weights, skipping included, by the plain loop; and a run continues with either, whatever saved it."""
    whole, parts = (tiny(tmp_path, name, lr_end=1e-3) for name in ("whole", "parts"))       # lr stays as it is
    with monkeypatch.context() as patch:
        break_steps(patch, {4})
        train.train(whole, device="cpu")
    with monkeypatch.context() as patch:
        break_steps(patch, {4})
        patch.setattr(train, "FUSED", ())
        train.train(tiny(tmp_path, "parts", steps=12, lr_end=1e-3), device="cpu")
        assert state(parts)["optimizer"]["param_groups"][0]["fused"] is False
    train.train(parts, device="cpu")                                            # fused again
    assert state(parts)["optimizer"]["param_groups"][0]["fused"] is True
    assert capsys.readouterr().err.count("the step was not applied") == 2
    assert close(state(whole)["model"], state(parts)["model"], atol=1e-5)
    steps = [{entry["step"].item() for entry in state(cfg)["optimizer"]["state"].values()} for cfg in (whole, parts)]
    assert steps == [{19}, {19}]
