"""Several processes train what a single process does; a killed worker costs nothing; micro-batches; compiled blocks."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import baselines
import config
import sample
import train
from config import UserError
from conftest import (
    FLAGS,
    ROOT,
    Forks,
    at_first_checkpoint,
    close,
    finished,
    losses,
    metrics,
    needs_fork,
    random_model,
    same,
    settings_of,
    start,
    state,
    tiny,
    weights,
    worker,
)
from data.batches import BatchRandom
from run import checkpoint, memory
from run.ranks import Ranks, fresh_part
from schedule import Schedule, loss


def train_by(world, cfg, folder, **options) -> list[str]:
    """Trains with so many processes, which all end with 0; their outputs."""
    codes, outputs = Forks(world, lambda: train.train(cfg, device="cpu", **options), folder).wait()
    assert codes == [0] * world, outputs
    return outputs


def distance(a: dict, b: dict, start: dict) -> float:
    """How far the updates from `start` to a and to b are apart, relative to their size."""
    apart, size = (sum((x[name] - y[name]).square().sum() for name in a) for x, y in ((a, b), (a, start)))
    return (apart / size).sqrt().item()


THREE = dict(num_scales=3, size="32,2,2,1", batch=12)       # 6 images a process, in two parts of 3
DFM = dict(num_scales=3, size="32,2,2,4", method="dfm", batch=24)       # stages 1 and 2 are rare: in few of the parts


@needs_fork
@pytest.mark.parametrize("settings, world", [
    (dict(stages="stratified", **DFM), 2),
    pytest.param(dict(stages="batch", shard=True, **THREE), 2, marks=pytest.mark.slow),
    pytest.param(dict(stages="stratified", **THREE), 2, marks=pytest.mark.slow),
    pytest.param(dict(stages="batch", **THREE), 2, marks=pytest.mark.slow),
    pytest.param(dict(stages="batch", seed=2, **DFM), 2, marks=pytest.mark.slow),
    pytest.param(dict(stages="stratified", stage_weights=(2, 2, 1), recompute=True, **THREE), 2,
                 marks=pytest.mark.slow),
    pytest.param(dict(stages="stratified", method="separate", **THREE), 2, marks=pytest.mark.slow),
    pytest.param(dict(stages="batch", method="edify", **THREE), 2, marks=pytest.mark.slow),
    pytest.param(dict(stages="stratified", **(DFM | dict(batch=48))), 4, marks=pytest.mark.slow)])
def test_several_processes_compute_what_a_single_process_does(tmp_path, monkeypatch, settings, world):
    """Losses, gradient norms and updates of six steps over all stages, with gradient accumulation; then each run goes
    on with the other number of processes. A larger epsilon: AdamW makes a step of full size of the rounding error in a
    gradient of zero, such as that of the bias of a fine band."""
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-3))

    def runs(steps, **more):
        return [tiny(tmp_path, name, **{**settings, "steps": steps, "log_every": 1, "lr": 1e-2, "save_every": 1,
                                        "keep": 20, **more}) for name in ("alone", "shared")]

    def compare():
        for a, b in zip(metrics(alone.out), metrics(shared.out), strict=True):
            for key in ("loss", "grad_norm"):
                assert a[key] == pytest.approx(b[key], rel=1e-5), (a["step"], key)
            assert [x or 0 for x in a["loss_bands"]] == pytest.approx([x or 0 for x in b["loss_bands"]], rel=1e-5)
        a, b = state(alone), state(shared)
        assert close(a["model"], b["model"], atol=1e-6) and close(a["ema"], b["ema"], atol=1e-6)
        assert distance(a["model"], b["model"], first[0]["model"]) < 1e-5       # of the updates
        steps = [{i: entry["step"].item() for i, entry in x["optimizer"]["state"].items()} for x in (a, b)]
        assert steps[0] == steps[1]                         # weights of an absent stage are skipped in both

    alone, shared = runs(6)
    train.train(alone, device="cpu")
    outputs = train_by(world, runs(6, micro_batch=3)[1], tmp_path)
    assert re.search(rf"= {world} x \d+ x 3 ", outputs[0]) and "batch" not in outputs[1]
    stages = {tuple(value != -1 for value in row) for row in losses(alone.out)}            # which bands they train
    assert len(stages) == (3 if settings["stages"] == "batch" else 1) and all(map(any, zip(*stages, strict=True)))
    first = [checkpoint.read(checkpoint.path(Path(cfg.out), 1)) for cfg in (alone, shared)]
    grads = [torch.cat([entry["exp_avg"].flatten() for entry in x["optimizer"]["state"].values()]) for x in first]
    assert (grads[0] - grads[1]).norm() < 1e-6 * grads[0].norm()                # of the first step, averaged
    compare()

    alone, shared = runs(8)
    assert "continuing" in train_by(world, alone, tmp_path)[0]
    train.train(shared, device="cpu")
    compare()


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("stages", ["stratified", "batch"])
@pytest.mark.parametrize("method", [name for name in config.METHODS if name not in ("lapflow", "dfm")])
def test_every_system_trains_in_two_processes(tmp_path, method, stages):
    """No weight may be left without a gradient: DistributedDataParallel would end the second step."""
    scales = dict(num_scales=1 if method == "lfm" else 2)
    runs = [tiny(tmp_path, name, steps=4, method=method, stages=stages, log_every=1, **scales)
            for name in ("alone", "shared")]
    train.train(runs[0], device="cpu")
    train_by(2, runs[1], tmp_path)
    for a, b in zip(*(losses(cfg.out) for cfg in runs), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@needs_fork
def test_the_weights_that_processes_start_from_are_the_same_and_each_trains_its_own_rows(tmp_path, monkeypatch):
    """Each process records the images it trains: together they are those of a single process, each once."""
    def record(file):
        original = baselines.lapflow.loss

        def recorded(model, x1, y, schedule, rng):
            with open(f"{file}-{os.environ.get('RANK', 'alone')}.jsonl", "a") as stream:
                stream.write(json.dumps([rng.rows.start, x1.flatten(1).sum(dim=1).tolist()]) + "\n")
            return original(model, x1, y, schedule, rng)

        return recorded

    monkeypatch.setattr(baselines.lapflow, "loss", record(tmp_path / "rows"))
    cfg = tiny(tmp_path, steps=2, micro_batch=4)
    train_by(2, cfg, tmp_path)
    train.train(tiny(tmp_path, "alone", steps=2), device="cpu")
    alone, *parts = (checkpoint_lines(tmp_path / f"rows-{name}.jsonl") for name in ("alone", 0, 1))
    for step in range(2):
        images = dict(part for lines in parts for part in lines[2 * step : 2 * step + 2])
        assert sorted(images) == [0, 4, 8, 12]
        assert sum((images[first] for first in sorted(images)), []) == pytest.approx(alone[step][1])


def checkpoint_lines(file: Path) -> list:
    return [json.loads(line) for line in file.read_text().splitlines()]


@needs_fork
@pytest.mark.slow
def test_each_process_keeps_its_share_of_the_optimizer_and_any_number_goes_on(tmp_path, monkeypatch):
    """Two, one, two processes with --shard, against one without; no checkpoint tells how it was made."""
    original = Ranks.optimizer_state

    def watched(ranks, optimizer):
        print("keeps", sum(x.numel() for entry in getattr(optimizer, "optim", optimizer).state.values()
                           for x in entry.values() if x.dim()), flush=True)
        return original(ranks, optimizer)

    monkeypatch.setattr(Ranks, "optimizer_state", watched)
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-3))
    whole = tiny(tmp_path, "whole", steps=12, lr_end=1e-3, ema=0.9)
    first_weights = train.setup(whole, Ranks(0, 1, torch.device("cpu"))).model.state_dict()
    train.train(whole, device="cpu")
    a = state(whole)
    total = sum(x.numel() for entry in a["optimizer"]["state"].values() for x in entry.values() if x.dim())
    for steps, shard, world in ((4, True, 2), (6, False, 1), (10, True, 2), (12, False, 2)):
        cfg = tiny(tmp_path, "shared", steps=steps, lr_end=1e-3, ema=0.9, shard=shard)
        if world == 1:
            train.train(cfg, device="cpu")
            continue
        kept = [int(re.search(r"keeps (\d+)", output)[1]) for output in train_by(world, cfg, tmp_path)]
        assert sum(kept) == total and min(kept) > 0.45 * total if shard else kept == [total] * 2
    b = state(cfg)
    assert distance(a["model"], b["model"], first_weights) < 1e-5
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert [*a["optimizer"]["state"]] == [*b["optimizer"]["state"]]
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert close(x, y, rtol=1e-3, atol=1e-7) and x["step"] == y["step"]


@needs_fork
@pytest.mark.slow
def test_gradients_in_bfloat16_travel_in_bfloat16(tmp_path, monkeypatch):
    """Six steps of two processes against one, in the same micro-batches: rounded to eight bits, and no more."""
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-3))
    settings = dict(steps=6, micro_batch=3, log_every=1, lr=1e-2, save_every=1, keep=20, precision="bfloat16", **THREE)
    alone, shared = (tiny(tmp_path, name, **settings) for name in ("alone", "shared"))
    train.train(alone, device="cpu")
    train_by(2, shared, tmp_path)
    first = [checkpoint.read(checkpoint.path(Path(cfg.out), 1)) for cfg in (alone, shared)]
    moments = [{str(i): entry["exp_avg"] for i, entry in x["optimizer"]["state"].items()} for x in first]
    zero = {name: torch.zeros_like(x) for name, x in moments[0].items()}
    assert 2**-11 < distance(*moments, zero) < 2**-8        # of the first gradient, averaged
    assert distance(weights(alone.out), weights(shared.out), first[0]["model"]) < 0.01     # of all updates


@needs_fork
@pytest.mark.parametrize("when", ["between", "at the end"])
def test_a_checkpoint_that_cannot_be_written_ends_all_with_one_sentence(tmp_path, monkeypatch, when):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    cfg = tiny(tmp_path, steps=100_000 if when == "between" else 5, save_every=5)
    codes, outputs = Forks(2, lambda: train.train(cfg, device="cpu"), tmp_path).wait()
    assert codes == [1, 1], outputs
    assert outputs[0].count("error in process 0: cannot write the checkpoint") == 1
    assert "No space left" in outputs[0] and not outputs[1] and "Traceback" not in outputs[0]


@needs_fork
@pytest.mark.parametrize("shard", [False, True])
def test_a_step_that_is_not_finite_in_a_single_process_is_skipped_in_all(tmp_path, monkeypatch, shard):
    original, calls = baselines.lapflow.loss, []

    def broken(model, x1, y, schedule, rng):
        total, errors = original(model, x1, y, schedule, rng)
        calls.append(1)
        return total * (float("nan") if len(calls) == 3 and rng.rows.start else 1), errors

    monkeypatch.setattr(baselines.lapflow, "loss", broken)
    cfg = tiny(tmp_path, steps=5, log_every=1, shard=shard)
    outputs = train_by(2, cfg, tmp_path)
    assert outputs[0].count("the norm of the gradient is nan at step 3: the step was not applied") == 1
    assert "not applied" not in outputs[1]
    assert [line["skipped"] for line in metrics(cfg.out)] == [0, 0, 1, 0, 0]
    saved = state(cfg)
    assert all(entry["step"] == 4 for entry in saved["optimizer"]["state"].values())
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


@needs_fork
@pytest.mark.parametrize("signals", [(signal.SIGUSR1,), (signal.SIGTERM, signal.SIGINT)])
def test_a_signal_to_one_process_saves_and_ends_all(tmp_path, signals):
    cfg = tiny(tmp_path, steps=100_000, save_every=10)
    forks = Forks(2, lambda: train.train(cfg, device="cpu"), tmp_path)
    at_first_checkpoint(tmp_path / "run")
    for number in signals:
        os.kill(forks.pids[1], number)
    codes, outputs = forks.wait()
    assert codes == [0, 0], outputs
    stopped = re.search(r"stopped at step (\d+), saved; the same command continues", outputs[0])
    assert checkpoint.steps(tmp_path / "run")[0].name == f"step-{int(stopped[1]):08d}.pt"


@needs_fork
def test_the_process_with_the_least_memory_chooses_the_micro_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1.0 if os.environ["RANK"] == "1" else math.inf)
    outputs = train_by(2, tiny(tmp_path, steps=1, stages="batch"), tmp_path)
    assert "16 images = 2 x 8 x 1 (processes, micro-batches, images)" in outputs[0]


@needs_fork
def test_all_processes_leave_together_when_time_is_up(tmp_path):
    cfg = tiny(tmp_path, steps=100_000)
    assert "stopped at step" in train_by(2, cfg, tmp_path, stop_after=0.5)[0]
    assert state(cfg)["step"] < 100_000


@needs_fork
def test_an_error_that_only_the_first_process_sees_ends_all_with_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    codes, outputs = Forks(2, lambda: train.train(tiny(tmp_path, "file/run"), device="cpu"), tmp_path).wait()
    assert codes == [1, 1] and "".join(outputs).count("cannot be written") == 1
    assert outputs[0].startswith("error in process 0: ") and not outputs[1] and "Traceback" not in outputs[0]


@needs_fork
def test_a_batch_that_cannot_be_shared_is_an_error(tmp_path):
    cfg = tiny(tmp_path, batch=7)
    codes, outputs = Forks(2, lambda: train.train(cfg, device="cpu"), tmp_path).wait()
    assert codes == [1, 1] and not (tmp_path / "run").exists()
    for rank, output in enumerate(outputs):
        assert output.startswith(f"error in process {rank}: a batch of 7 images cannot be shared equally by 2 "
                                 "processes: start 1")
    with pytest.raises(UserError, match="by 6 processes: start 4 of them"):
        Ranks(0, 6, torch.device("cpu")).rows(256, 0)


@needs_fork
def test_two_processes_draw_the_images_of_one(tmp_path, monkeypatch):
    """dopri5 too: which images share a batch does not depend on the number of processes. Interrupted, they go on."""
    train.train(tiny(tmp_path, steps=3), device="cpu")

    def draw(world, *arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", str(tmp_path / "run"), "-n", "20", "--batch", "4", "--solver",
                                          "dopri5", "--rtol", "0.1", "--atol", "0.1", "--device", "cpu", *arguments])
        codes, outputs = Forks(world, sample.main, tmp_path).wait() if world > 1 else ([sample.main()], [""])
        assert not any(codes), outputs
        return outputs[0]

    monkeypatch.chdir(tmp_path)
    draw(1, "--out", "one")
    out = draw(2, "--out", "two", "--format", "shards")
    assert out.count("NFE  ") == 1 and "5 shards" in out
    shards = sorted((tmp_path / "two").glob("shard-*.npz"))
    assert [shard.name for shard in shards] == [f"shard-{first:08d}.npz" for first in range(0, 20, 4)]
    with np.load(tmp_path / "one" / "samples.npz") as one:
        drawn = [np.load(shard) for shard in shards]
        assert np.array_equal(np.concatenate([part["images"] for part in drawn]), one["images"])
        assert np.array_equal(np.concatenate([part["labels"] for part in drawn]), one["labels"])
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["nfe"] == reports[1]["nfe"] and reports[1]["num"] == 20
    shards[2].unlink()                                      # as if it had been stopped there
    for file in (tmp_path / "two").glob("notes-*.jsonl"):
        lines = [line for line in file.read_text().splitlines() if '"first": 8' not in line]
        file.write_text("\n".join(lines))
    before = shards[0].stat().st_mtime_ns
    draw(1, "--out", "two", "--format", "shards")
    assert shards[0].stat().st_mtime_ns == before
    with np.load(shards[2]) as again:
        assert np.array_equal(again["images"], drawn[2]["images"])


# ---------------------------------------------------------------------------------------------------------------------
# torchrun itself


@pytest.mark.slow
def test_torchrun_trains_what_python_trains(tmp_path):
    """From the command line, scores included: printed once, equal losses, exit code 0."""
    out = finished(start(tmp_path, *FLAGS, "--steps", "10", "--log-every", "1", "--out", "two", "--micro-batch", "3"))
    assert "12 images = 2 x 2 x 3 " in out and out.count("frechet_pixel") == 1
    assert "Warning" not in out and "Traceback" not in out
    train.train(settings_of(tmp_path / "two", out=str(tmp_path / "one"), micro_batch=0), device="cpu")
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert close(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=2e-5)


@needs_fork
@pytest.mark.slow
def test_a_killed_worker_restarts_and_ends_with_the_same_weights(tmp_path):
    """torchrun --max-restarts: kill -9 between two checkpoints; the end is that of the undisturbed run, bit for bit."""
    process = start(tmp_path, *FLAGS, "--steps", "80", "--save-every", "10", "--log-every", "10", "--stages", "batch",
                    "--fresh", "--out", "killed", torchrun=["--max-restarts=2"])
    try:
        at_first_checkpoint(tmp_path / "killed")
        os.kill(worker(process.pid, 1), signal.SIGKILL)
        out = finished(process)
    finally:
        process.kill()
    assert "continuing killed at step" in out
    train_by(2, settings_of(tmp_path / "killed", out=str(tmp_path / "whole")), tmp_path)
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers through /proc")
def test_a_signal_to_one_worker_of_torchrun_saves_and_ends_all_with_zero(tmp_path):
    process = start(tmp_path, *FLAGS, "--steps", "100000", "--save-every", "10", "--out", "run")
    try:
        at_first_checkpoint(tmp_path / "run")
        os.kill(worker(process.pid, 1), signal.SIGTERM)
        out = finished(process)                             # torchrun ends with 0
    finally:
        process.kill()
    stopped = re.search(r"stopped at step (\d+), saved; the same command continues", out)
    assert checkpoint.steps(tmp_path / "run")[0].name == f"step-{int(stopped[1]):08d}.pt"


@pytest.mark.slow
def test_torchrun_fails_with_one_sentence_when_the_first_process_does(tmp_path):
    (tmp_path / "file").write_text("in the way")
    process = start(tmp_path, *FLAGS, "--steps", "1", "--out", "file/run")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and out.count("cannot be written") == 1


# ---------------------------------------------------------------------------------------------------------------------
# rows and micro-batches


def test_rows_of_all_processes_are_the_batch_once():
    for batch, world, micro in ((256, 8, 0), (256, 1, 100), (12, 2, 4), (128, 8, 5), (14, 2, 4)):
        ranks = [Ranks(r, world, torch.device("cpu")) for r in range(world)]
        parts = [part for r in ranks for part in r.rows(batch, micro)]
        assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
        assert len({part.stop - part.start for part in parts}) == 1             # equal: the mean of means is the mean
        assert parts[0].stop - parts[0].start <= (micro or batch)


@pytest.mark.parametrize("stages", ["batch", "stratified"])
@pytest.mark.parametrize("method", ["lapflow", "dfm"])
def test_micro_batches_train_what_the_whole_batch_does(tmp_path, stages, method):
    runs = [tiny(tmp_path, str(micro), steps=6, stages=stages, method=method, micro_batch=micro, log_every=1)
            for micro in (0, 5)]                            # 5: parts of 4
    for cfg in runs:
        train.train(cfg, device="cpu")
    for a, b in zip(*(metrics(cfg.out) for cfg in runs), strict=True):
        assert [x or 0 for x in a["loss_bands"]] == pytest.approx([x or 0 for x in b["loss_bands"]], rel=1e-5)
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-5)
    assert close(*(weights(cfg.out) for cfg in runs), atol=2e-5)


@needs_fork
def test_micro_batches_by_stage_train_what_the_whole_batch_does(tmp_path, monkeypatch):
    """In two processes too: as many images of a stage at a time as fit, against all of them in one process."""
    alone, shared = (tiny(tmp_path, name, steps=6, stages="batch", log_every=1, num_scales=3, size="32,2,2,1")
                     for name in ("alone", "shared"))
    sizes, loss = [], baselines.lapflow.loss

    def seen(model, x1, *arguments):
        total, errors = loss(model, x1, *arguments)
        sizes.append((len(errors) - 1, len(x1)))
        return total, errors

    monkeypatch.setattr(baselines.lapflow, "loss", seen)
    train.train(alone, device="cpu")
    monkeypatch.setattr(memory, "fit_micro_batch", lambda *arguments: (8, 4, 2)[arguments[-1]])
    train_by(2, shared, tmp_path)
    train.train(dataclasses.replace(shared, out=str(tmp_path / "sizes")), device="cpu")
    assert set(sizes[:6]) == {(0, 16), (1, 16), (2, 16)} and set(sizes[6:]) == {(0, 8), (1, 4), (2, 2)}
    for a, b in zip(*(metrics(cfg.out) for cfg in (alone, shared)), strict=True):       # rounding turns a few signs of
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-4)  # first updates


def test_too_small_a_share_for_all_stages_is_an_error(tmp_path):
    with pytest.raises(UserError, match="2 images at a time in every process, not 1.*--stages batch"):
        train.train(tiny(tmp_path, micro_batch=1), device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# the group


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the threads through /proc")
def test_no_thread_of_the_group_outlives_it():
    """They aborted the process when they dropped a tensor while the interpreter was going away."""
    code = """if True:
        import glob
        from run.ranks import Ranks
        def threads():
            return [name for name in map(lambda file: open(file).read(), glob.glob("/proc/self/task/*/comm"))
                    if "gloo" in name]
        with Ranks.start("cpu"):
            import torch._dynamo
            before = len(threads())
        print(before, len(threads()))"""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
                   "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    before, after = map(int, done.stdout.split())
    assert done.returncode == 0 and before > 0 and after == 0


def test_new_processes_do_not_meet_the_names_of_dead_processes():
    """A store with the entries of an attempt that was killed: the new processes agree on a part of their own."""
    store, attempts = dist.HashStore(), []
    for _ in range(3):
        parts = {}

        def join(rank, parts=parts):
            parts[rank] = fresh_part(store, rank, 3)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in (2, 0, 1)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)                                # the others wait, and see the old names
        for thread in threads:
            thread.join(timeout=30)
        assert sorted(parts) == [0, 1, 2]
        parts[0].set("address", b"new")
        assert parts[1].get("address") == parts[2].get("address") == b"new"
        attempts.append(parts[0])
    attempts[0].set("address", b"old")
    assert attempts[2].get("address") == b"new"


def test_stop_after_saves_and_the_same_command_goes_on(tmp_path, capsys):
    cfg = tiny(tmp_path, steps=8)
    train.train(cfg, device="cpu", stop_after=0.0)
    assert "stopped at step 1, saved; the same command continues" in capsys.readouterr().out
    train.train(cfg, device="cpu")
    assert state(cfg)["step"] == 8
    assert config.seconds("90") == 90 and config.seconds("1.5h") == 5400 and config.seconds("2m") == 120
    assert config.seconds("") == float("inf") and config.seconds(f"@{time.time() + 60}") == pytest.approx(60, abs=5)
    with pytest.raises(UserError, match="--stop-after takes a time"):
        config.seconds("soon")


# ---------------------------------------------------------------------------------------------------------------------
# compiled blocks, recomputed activations, bfloat16


@pytest.fixture
def graphs(monkeypatch):
    """Blocks compile with a backend that keeps the graphs and runs them as they are."""
    import torch._dynamo

    torch._dynamo.reset()
    graphs, compile_ = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_(self, backend=backend, **kw))
    yield graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("stages, settings", [
    pytest.param("batch", dict(), marks=pytest.mark.slow),
    pytest.param("stratified", dict(), marks=pytest.mark.slow),
    pytest.param("batch", dict(recompute=True), marks=pytest.mark.slow),
    pytest.param("batch", dict(precision="bfloat16", ema=0.0, sample_every=10, micro_batch=6), marks=pytest.mark.slow)])
def test_blocks_compile_once_for_each_stage_and_never_again(tmp_path, graphs, stages, settings):
    """One graph for each stage, shared by all blocks, over 20 steps; the loss is that of the plain model."""
    settings = {**THREE, "size": "32,3,2,1", "stages": stages, "log_every": 1, **settings}
    runs = [tiny(tmp_path, str(compiled), compile=compiled, **settings) for compiled in (False, True)]
    for cfg in runs:
        train.train(cfg, device="cpu")
        assert len(graphs) == (3 if cfg.compile else 0)
    for a, b in zip(*(losses(cfg.out) for cfg in runs), strict=True):
        assert a == pytest.approx(b, rel=0.02 if settings.get("precision") else 1e-4)
    assert not any("_orig_mod" in name for name in weights(runs[1].out))


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("stages", ["batch", "stratified"])
def test_compiled_blocks_train_in_several_processes(tmp_path, graphs, stages):
    runs = [tiny(tmp_path, str(world), steps=6, compile=world == 2, stages=stages, log_every=1) for world in (1, 2)]
    train.train(runs[0], device="cpu")
    train_by(2, runs[1], tmp_path)
    for a, b in zip(*(losses(cfg.out) for cfg in runs), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_recomputed_activations_give_the_same_gradients():
    model, schedule = random_model(), Schedule((0.0, 0.33, 0.67), stages="stratified")
    grads = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        loss(model, torch.ones(6, 2, 16, 16), None, schedule, BatchRandom(0, 0, 6))[0].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_bfloat16_keeps_norms_time_and_residuals_in_float32():
    model, dtypes, residuals = random_model(), {}, []

    def note(name):
        def hook(module, inputs, output):
            dtypes[name] = inputs[0].dtype, output.dtype

        return hook

    model.time.register_forward_hook(note("time"))
    model.blocks[0].norm.register_forward_hook(note("norm"))
    model.blocks[0].mlp[0].register_forward_hook(note("mlp"))
    bands = [torch.randn(2, 2, s, s) for s in (4, 8, 16)]
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: residuals.extend(x.dtype for x in inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        model(bands, torch.rand(2))
    assert dtypes["time"][1] == torch.float32 and set(residuals) == {torch.float32}
    assert dtypes["norm"] == (torch.float32, torch.float32)
    assert dtypes["mlp"][1] == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_in_bfloat16_with_compiled_blocks(tmp_path):
    runs = [tiny(tmp_path, str(i), size="64,2,2,2", batch=64, steps=40, log_every=40, **settings)
            for i, settings in enumerate((dict(), dict(precision="bfloat16", compile=True)))]
    for cfg in runs:
        train.train(cfg, device="cuda")
    assert losses(runs[0].out)[0] == pytest.approx(losses(runs[1].out)[0], rel=0.03)
