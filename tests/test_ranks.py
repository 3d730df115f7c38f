"""Several processes train what one does; a killed one costs nothing; compiled blocks; micro-batches."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import config
import train
from config import Config, UserError
from conftest import ROOT, random_model
from ranks import Ranks
from schedule import Schedule, loss

TINY = ["--size", "32,2,2,2", "--batch", "12", "--solver", "midpoint", "--solver-steps", "4", "--num-samples", "6",
        "--warmup", "0", "--lr", "1e-3"]


def start(tmp_path, *arguments, processes=2, script="train.py", torchrun=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
    return subprocess.Popen([sys.executable, *(launcher if processes > 1 else []), str(ROOT / script),
                             *map(str, arguments)], cwd=tmp_path, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(process) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def at_first_checkpoint(process, run: Path) -> None:
    """Waits until there is one."""
    until = time.time() + 120
    while not list(run.glob("step-*.pt")):
        assert time.time() < until and process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def losses(run: Path) -> list:
    """The losses of the bands at each step, -1 where a band took no part."""
    rows = [json.loads(line)["loss_bands"] for line in open(run / "metrics.jsonl")]
    return [[-1 if value is None else value for value in row] for row in rows]


def weights(run: Path) -> dict:
    return checkpoint.load_newest(run)["model"]


@pytest.mark.slow
@pytest.mark.parametrize("stages, method", [("batch", "lapflow"), ("stratified", "lapflow"), ("stratified", "dfm")])
def test_two_processes_compute_what_one_does(tmp_path, stages, method):
    """Ten steps over both stages, on the digits: the same losses to 1e-5, whoever holds which rows."""
    common = [*TINY, "--steps", "10", "--log-every", "1", "--stages", stages, "--method", method]
    out = finished(start(tmp_path, *common, "--out", "two", "--micro-batch", "3"))
    assert "12 = 2 processes x 2 micro-batches x at most 3 images" in out and out.count("frechet_pixel") == 1
    finished(start(tmp_path, *common, "--out", "one", processes=1))
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(one) == 10 and {row[1] == -1 for row in one} == ({True, False} if stages == "batch" else {False})
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-5) for name in ours)
    # the run of two goes on as one, as if it had always been one: data, randomness, optimizer and average
    assert "continuing two at step 10" in finished(start(tmp_path, *common, "--out", "two", "--steps", "14",
                                                         processes=1))
    finished(start(tmp_path, *common, "--out", "one", "--steps", "14", processes=1))
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    ours, theirs = (checkpoint.load_newest(tmp_path / name)["ema"] for name in ("one", "two"))
    assert all(torch.allclose(ours[name], theirs[name], atol=5e-5) for name in ours)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the worker through /proc")
def test_a_killed_worker_restarts_and_ends_with_the_same_weights(tmp_path):
    """torchrun --max-restarts: kill -9 between two checkpoints; the end is that of the undisturbed run, bit for bit."""
    common = [*TINY, "--steps", "120", "--save-every", "10", "--log-every", "10", "--stages", "batch"]
    process = start(tmp_path, *common, "--out", "killed", torchrun=["--max-restarts=2"])
    try:
        at_first_checkpoint(process, tmp_path / "killed")
        os.kill(worker(process.pid, 1), signal.SIGKILL)
        out = finished(process)
    finally:
        process.kill()
    assert "continuing killed at step" in out
    finished(start(tmp_path, *common, "--out", "whole"))
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def worker(torchrun: int, rank: int) -> int:
    """The process number of a worker of this torchrun."""
    for folder in Path("/proc").iterdir():
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == torchrun and (
                    f"\0RANK={rank}\0".encode() in (folder / "environ").read_bytes()):
                return int(folder.name)
        except (OSError, IndexError):
            continue
    raise AssertionError(f"torchrun has no worker {rank}")


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers through /proc")
@pytest.mark.parametrize("signals", [(signal.SIGUSR1,), pytest.param((signal.SIGTERM, signal.SIGINT),
                                                                      marks=pytest.mark.slow)])
def test_a_signal_to_one_worker_saves_and_ends_all(tmp_path, signals):
    process = start(tmp_path, *TINY, "--steps", "100000", "--save-every", "10", "--out", "run")
    try:
        at_first_checkpoint(process, tmp_path / "run")
        struck = worker(process.pid, 1)
        for number in signals:
            os.kill(struck, number)
        out = finished(process)                             # torchrun ends with 0
    finally:
        process.kill()
    stopped = re.search(r"stopped at step (\d+), saved; the same command continues", out)
    assert checkpoint.steps(tmp_path / "run")[0].name == f"step-{int(stopped[1]):08d}.pt"


def test_what_only_the_first_process_finds_ends_all_with_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    process = start(tmp_path, *TINY, "--steps", "1", "--out", "file/run")
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and out.count("cannot be written") == 1


def test_a_batch_that_cannot_be_shared_is_said(tmp_path):
    process = start(tmp_path, "--batch", "7", "--steps", "1", "--size", "32,2,2,2")
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "a batch of 7 images cannot be shared equally by 2 processes: start 1" in out
    with pytest.raises(UserError, match="by 6 processes: start 4 of them"):
        Ranks(0, 6, torch.device("cpu")).rows(256, 0)


def test_rows_of_all_processes_are_the_batch_once():
    for batch, world, micro in ((256, 8, 0), (256, 1, 100), (12, 2, 4), (128, 8, 5)):
        ranks = [Ranks(r, world, torch.device("cpu")) for r in range(world)]
        parts = [part for r in ranks for part in r.rows(batch, micro)]
        assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
        sizes = {part.stop - part.start for part in parts}
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= (micro or batch)


@pytest.mark.parametrize("stages", ["batch", "stratified"])
def test_micro_batches_train_what_the_whole_batch_does(tmp_path, stages):
    runs = []
    for micro in (0, 5):
        cfg = Config(size="32,2,2,2", batch=16, steps=6, stages=stages, micro_batch=micro, log_every=1, warmup=0,
                     lr=1e-3, solver="midpoint", solver_steps=4, num_samples=6, out=str(tmp_path / str(micro)))
        train.main(cfg, device="cpu")
        runs.append((losses(Path(cfg.out)), weights(Path(cfg.out))))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert all(torch.allclose(runs[0][1][name], runs[1][1][name], atol=2e-5) for name in runs[0][1])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the threads through /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """They aborted the process when they dropped a tensor while the interpreter was going away."""
    code = """if True:
        import glob
        from ranks import Ranks
        def threads():
            return [name for name in map(lambda file: open(file).read(), glob.glob("/proc/self/task/*/comm"))
                    if "gloo" in name]
        ranks = Ranks.start("cpu")
        import torch._dynamo
        before = len(threads())
        ranks.stop()
        print(before, len(threads()))"""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
                   "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    before, after = map(int, done.stdout.split())
    assert done.returncode == 0 and before > 0 and after == 0


def test_too_small_a_share_for_all_stages_is_said(tmp_path):
    cfg = Config(size="32,2,2,2", batch=16, steps=1, micro_batch=1, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="2 images at a time in every process, not 1.*--stages batch"):
        train.main(cfg, device="cpu")


@pytest.mark.parametrize("stages, settings", [
    ("batch", dict()), ("stratified", dict()), ("batch", dict(recompute=True)),
    ("batch", dict(precision="bfloat16", ema=0.0, sample_every=10, micro_batch=6))])
def test_blocks_compile_once_for_each_stage_and_never_again(tmp_path, monkeypatch, stages, settings):
    """One graph for each stage, shared by all blocks, over 20 steps; the loss is that of the plain model."""
    import torch._dynamo

    torch._dynamo.reset()
    graphs, compile_ = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_(self, backend=backend, **kw))
    results = []
    for compiled in (False, True):
        cfg = Config(size="32,3,2,1", num_scales=3, batch=12, steps=20, stages=stages, compile=compiled, log_every=1,
                     warmup=0, lr=1e-3, solver="midpoint", solver_steps=4, num_samples=6,
                     out=str(tmp_path / str(compiled)), **settings)
        train.main(cfg, device="cpu")
        results.append(losses(Path(cfg.out)))
        assert len(graphs) == (3 if compiled else 0)
    for a, b in zip(*results, strict=True):
        assert a == pytest.approx(b, rel=0.02 if settings.get("precision") else 1e-4)
    keys = weights(tmp_path / "True")
    assert not any("_orig_mod" in name for name in keys)


def test_recomputed_activations_give_the_same_gradients():
    model, schedule = random_model(), Schedule((0.0, 0.33, 0.67))
    from data import BatchRandom

    grads = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        loss(model, torch.ones(6, 2, 16, 16), None, schedule, BatchRandom(0, 0, 6), stages="stratified")[0].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_bfloat16_keeps_norms_time_and_residuals_in_float32():
    model = random_model()
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            seen[name] = inputs[0].dtype, output.dtype

        return hook

    model.time.register_forward_hook(note("time"))
    model.blocks[0].norm.register_forward_hook(note("norm"))
    model.blocks[0].mlp[0].register_forward_hook(note("mlp"))
    bands = [torch.randn(2, 2, s, s) for s in (4, 8, 16)]
    residuals = []
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: residuals.extend(x.dtype for x in inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        model(bands, torch.rand(2))
    assert seen["time"][1] == torch.float32 and set(residuals) == {torch.float32}
    assert seen["norm"] == (torch.float32, torch.float32)
    assert seen["mlp"][1] == torch.bfloat16


def test_stop_after_saves_and_the_same_command_goes_on(tmp_path, capsys):
    cfg = Config(size="32,2,2,2", batch=16, steps=8, solver="midpoint", solver_steps=4, num_samples=6,
                 out=str(tmp_path / "run"))
    train.main(cfg, device="cpu", stop_after=0.0)
    assert "stopped at step 1, saved; the same command continues" in capsys.readouterr().out
    train.main(cfg, device="cpu")
    assert checkpoint.load_newest(tmp_path / "run")["step"] == 8
    assert config.seconds("90") == 90 and config.seconds("1.5h") == 5400 and config.seconds("2m") == 120
    with pytest.raises(UserError, match="--stop-after takes a time"):
        config.seconds("soon")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_in_bfloat16_with_compiled_blocks(tmp_path):
    results = []
    for settings in (dict(), dict(precision="bfloat16", compile=True)):
        cfg = Config(size="64,2,2,2", batch=64, steps=40, log_every=40, num_samples=6, solver="midpoint",
                     solver_steps=4, out=str(tmp_path / str(len(results))), **settings)
        train.main(cfg, device="cuda")
        results.append(losses(Path(cfg.out))[0])
    assert results[0] == pytest.approx(results[1], rel=0.03)


def test_the_benchmark_trains_a_row_of_the_paper_on_random_latents(tmp_path, monkeypatch, capsys):
    """Its real cache and loop; on the CPU with a tiny network, so only the presence of the figures is asserted."""
    import bench

    monkeypatch.chdir(tmp_path)
    bench.main(dict(what="train", preset="imagenet-256-B", size="32,2,2,2", steps=4, log_every=1, batch=8,
                    compile=False, record="bench.jsonl", device="cpu", rounds=1, sides="32", run=None))
    line = json.loads((tmp_path / "bench.jsonl").read_text())
    assert line["images_per_second"] > 0 and line["mfu"] is None and line["config"]["batch"] == 8
    assert line["processes"] == 1 and "images_per_second" in capsys.readouterr().out


def test_new_processes_do_not_meet_the_names_of_dead_ones():
    """A store with the entries of an attempt that was killed: the new processes agree on a part of their own."""
    import threading

    import torch.distributed as dist

    from ranks import fresh_part

    store, attempts = dist.HashStore(), []
    for _ in range(3):
        parts = {}

        def join(rank, parts=parts):
            parts[rank] = fresh_part(store, rank, 3)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in (2, 0, 1)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)                                # the others wait, with old names before their eyes
        for thread in threads:
            thread.join(timeout=30)
        assert sorted(parts) == [0, 1, 2]
        parts[0].set("address", b"mine")
        assert parts[1].get("address") == parts[2].get("address") == b"mine"
        attempts.append(parts[0])
    attempts[0].set("address", b"old")
    assert attempts[2].get("address") == b"mine"


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(tmp_path):
    """dopri5 too: which images share a batch does not depend on the number of processes. Interrupted, they go on."""
    finished(start(tmp_path, *TINY, "--steps", "3", "--out", "run", processes=1))
    common = ["run", "-n", "20", "--batch", "4", "--solver", "dopri5", "--device", "cpu"]
    finished(start(tmp_path, *common, "--out", "one", processes=1, script="sample.py"))
    out = finished(start(tmp_path, *common, "--out", "two", "--format", "shards", script="sample.py"))
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
    notes = [(file, file.read_text().splitlines()) for file in (tmp_path / "two").glob("notes-*.jsonl")]
    for file, lines in notes:
        file.write_text("\n".join(line for line in lines if '"first": 8' not in line))
    before = shards[0].stat().st_mtime_ns
    finished(start(tmp_path, *common, "--out", "two", "--format", "shards", processes=1, script="sample.py"))
    assert shards[0].stat().st_mtime_ns == before
    with np.load(shards[2]) as again:
        assert np.array_equal(again["images"], drawn[2]["images"])
