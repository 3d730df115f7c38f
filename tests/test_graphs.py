"""Sampling with weights in bfloat16 and recorded passes. A stub records on the CPU: it runs the pass again, and writes
into the tensors of the recording, as a CUDA graph does."""

import contextlib
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

import baselines
import sample
from config import Config, UserError
from conftest import randomize
from data.conditions import Labels, Vectors
from extras import causal
from model import TimestepEmbedder
from run import graphs
from run.load import Run

FACTS = {"channels": 2, "side": 16, "classes": ["a", "b", "c"], "vectors": None, "count": 9, "latent": None,
         "fingerprint": ""}
CONDITIONS = {"labels": partial(Labels, FACTS["classes"]), "none": None,
              "vectors": lambda width: Vectors(4, width, torch.randn(6, 4))}
METHODS = ["lapflow", "pyramidal", "edify", "dfm", "separate", "lfm"]


class Rerun:
    """What CudaGraph is on a GPU: its tensors are overwritten at each replay."""

    def __init__(self, work, pool):
        self.work, self.pool, self.outputs = work, pool or object(), work()

    def replay(self):
        for place, v in zip(self.outputs, self.work(), strict=True):
            place.copy_(v)
        return self.outputs


def make_run(condition="labels", **settings) -> Run:
    """A run with random weights, whose decode keeps x1 as it is."""
    cfg = Config(**{"size": "32,2,2,2", "res": 16, "num_scales": 3, "label_drop": 0.1, **settings})
    torch.manual_seed(0)
    model = baselines.SYSTEMS[cfg.method].network(cfg, 2, CONDITIONS[condition], 16)
    run = Run(cfg, randomize(model).eval().requires_grad_(False), FACTS, Path("."), 1, "raw")
    run.decode = lambda x1: x1.numpy()
    return run


def of_method(method, condition="labels") -> Run:
    return make_run(condition, method=method, num_scales=1 if method == "lfm" else 2,
                    **({"size": "32,2,2,4"} if method == "dfm" else {}))


def images(run, num=5, batch=2, record=None, precision="float32", **settings) -> torch.Tensor:
    """x1 of `num` images, in batches with a smaller last one."""
    settings = {"precision": precision, **settings}
    if record:
        settings = graphs.speed_up(run, settings, graphs=True, record=record)
    y = None if run.condition is None else run.condition.draw(num)
    drawn = [x for _, x, _ in sample.draw_batches(run, sample.chunks_of(num, batch), y, 3, **settings)]
    return torch.cat([torch.from_numpy(x) for x in drawn])


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16 once


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("method", METHODS)
def test_weights_converted_once_give_the_numbers_of_autocast(method, condition):
    model = of_method(method, condition).model
    y = None if model.condition is None else model.condition.draw(3)
    passes = [model.stage_inputs(stage, 3) for stage in range(model.num_scales)]

    @torch.no_grad()
    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return [v for bands, t in passes for v in model(bands, t, y)]

    before = forward()
    graphs.to_bfloat16(model)
    for v, expected in zip(forward(), before, strict=True):
        assert v.dtype == expected.dtype and torch.equal(v, expected) and v.abs().sum() > 0
    assert model.blocks[0].mlp[0][0].weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for m in model.modules() if isinstance(m, TimestepEmbedder)
               for p in m.parameters())


def test_precision_bfloat16_gives_the_same_images_with_converted_weights():
    run = make_run()
    expected, fingerprint = images(run, solver="heun", steps=6, precision="bfloat16"), run.fingerprint
    run = make_run()
    graphs.speed_up(run, {"precision": "bfloat16"})
    assert torch.equal(images(run, solver="heun", steps=6, precision="bfloat16"), expected)
    assert run.fingerprint == fingerprint                   # a gallery goes on with the same run
    assert run.model.forward.captures == 0


# ---------------------------------------------------------------------------------------------------------------------
# recorded passes

SOLVERS = [dict(solver="dopri5", rtol=1e-2, atol=1e-2), *(dict(solver=name, steps=4) for name in (
    "euler", "midpoint", "heun", "rk4"))]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver["solver"])
def test_recorded_passes_give_the_same_images(solver, precision):
    run = make_run()
    expected = images(run, precision=precision, **solver)
    assert torch.equal(images(run, record=Rerun, precision=precision, **solver), expected)
    assert run.model.forward.captures == 3 * 2              # segments x batch sizes: 2 and the tail of 1


def test_threads_that_share_a_network_get_their_own_images():
    """A request of the demo may begin before the one it replaces has left the network."""
    run = make_run()
    graphs.speed_up(run, {"precision": "float32"}, graphs=True, record=Rerun)
    inputs = [(run.model.stage_inputs(0, 2)[0], torch.full((2,), 0.5), torch.tensor([i, i])) for i in range(2)]
    expected, wrong = [run.model(*one)[0] for one in inputs], []
    assert not torch.equal(*expected)

    def calls(i):
        wrong.extend(k for k in range(300) if not torch.equal(run.model(*inputs[i])[0], expected[i]))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=calls, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert wrong == []


@pytest.mark.parametrize("method", METHODS)
def test_every_system_can_be_recorded(method):
    run = of_method(method)
    expected = images(run, solver="euler", steps=4)
    assert torch.equal(images(run, record=Rerun, solver="euler", steps=4), expected)
    assert run.model.forward.captures == run.cfg.num_scales * 2


@pytest.mark.parametrize("condition", ["vectors", "none"])
def test_other_conditions_can_be_recorded(condition):
    run = make_run(condition)
    expected = images(run, solver="euler", steps=4)
    assert torch.equal(images(run, record=Rerun, solver="euler", steps=4), expected)


@pytest.mark.parametrize("interval, captures", [((0.0, 1.0), 6), ((0.2, 0.8), 8)])
def test_guidance_is_recorded_as_a_doubled_batch(interval, captures):
    """Outside of the interval the batch is not doubled; 4 images at a time guided, 2 guided (the tail), 2 and 1 not."""
    run, settings = make_run(), dict(solver="euler", steps=12, cfg_scale=2.0, interval=interval)
    expected = images(run, **settings)
    assert torch.equal(images(run, record=Rerun, **settings), expected)
    shapes = {(key[0][0][0], len(key)) for key in run.model.forward.recordings}
    assert run.model.forward.captures == len(shapes)
    assert len(shapes) == captures


def test_a_preview_uses_the_recordings_of_its_images():
    run, settings = make_run(), dict(solver="heun", steps=6)
    expected, _ = causal.preview(run, range(2), torch.tensor([0, 1]), seed=3, **settings)
    images(run, record=Rerun, **settings)
    before = run.model.forward.captures
    x1, _ = causal.preview(run, range(2), torch.tensor([0, 1]), seed=3, **settings)
    assert torch.equal(x1, expected) and run.model.forward.captures == before


def test_recordings_stay_for_the_next_call():
    run, settings = make_run(), dict(solver="euler", steps=4)
    first = images(run, record=Rerun, **settings)
    recorded = run.model.forward
    assert torch.equal(images(run, record=Rerun, **settings), first)
    assert run.model.forward is recorded and recorded.captures == 6


def test_outputs_are_not_those_of_the_recording():
    model = make_run().model
    recorded = graphs.Recorded(model, False, Rerun)
    bands, t = model.stage_inputs(1, 2)
    y = torch.tensor([0, 1])
    first = recorded(bands, t, y)
    copies = [v.clone() for v in first]
    recorded([-band for band in bands], t, y)
    assert all(torch.equal(v, copy) for v, copy in zip(first, copies, strict=True))
    assert recorded.captures == 1


def test_no_condition_means_the_null_condition():
    model = make_run().model
    bands, t = model.stage_inputs(2, 2)
    with torch.no_grad():
        expected = model(bands, t)
    recorded = graphs.Recorded(model, False, Rerun)
    assert all(torch.equal(a, b) for a, b in zip(recorded(bands, t), expected, strict=True))


def test_the_number_of_recordings_is_bounded(monkeypatch):
    monkeypatch.setattr(graphs, "LARGEST", 3)
    model = make_run().model
    recorded = graphs.Recorded(model, False, Rerun)
    for batch in (1, 2, 3, 4, 1):
        recorded(*model.stage_inputs(0, batch), torch.zeros(batch, dtype=torch.long))
    assert recorded.captures == 5 and len(recorded.recordings) == 3


class FakeCuda:
    """The parts of torch.cuda that a recording uses; notes what is done."""

    def __init__(self, monkeypatch, broken=False):
        self.calls = []
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, partial(self.context, name, broken and name == "graph"))
        for name in ("CUDAGraph", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda: self)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.calls.append("new") or self)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        graphs.side_stream.cache_clear()
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: self.calls.append("restored"))

    @contextlib.contextmanager
    def context(self, name, broken, *_, pool=None, **__):
        self.calls.append(name if pool is None else f"{name} in {pool}")
        yield
        if broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def wait_stream(self, stream):
        self.calls.append("wait")

    def pool(self):
        return "pool"

    def replay(self):
        self.calls.append("replay")


def test_a_cuda_graph_is_warmed_up_recorded_and_replayed(monkeypatch):
    cuda, works = FakeCuda(monkeypatch), []
    first = graphs.CudaGraph(lambda: works.append(1) or works, None)
    assert len(works) == 4 and cuda.calls == ["new", "wait", "stream", "wait", "graph", "restored"]
    assert first.replay() is works and cuda.calls[-1] == "replay"
    graphs.CudaGraph(lambda: works, first.pool)
    assert "graph in pool" in cuda.calls and cuda.calls.count("new") == 1           # one side stream for all


def test_a_broken_cuda_graph_gives_the_stream_back(monkeypatch, capsys):
    run, settings = make_run(), dict(solver="euler", steps=4)
    expected, cuda = images(run, **settings), FakeCuda(monkeypatch, broken=True)
    assert torch.equal(images(run, record=graphs.CudaGraph, **settings), expected)
    assert cuda.calls == ["new", "wait", "stream", "wait", "graph", "restored"] # once, then without
    assert "(CUDA error: operation failed due to a previous error during capture)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# what cannot be used


@pytest.mark.parametrize("problem", [RuntimeError("operation not permitted when stream is capturing\nmore"),
                                     torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                     NotImplementedError("this driver has no graphs")])
def test_a_failed_recording_is_reported_once_and_left_out(problem, capsys):
    def record(work, pool):
        work()
        raise problem

    run, settings = make_run(), dict(solver="euler", steps=4)
    expected = images(run, **settings)
    assert torch.equal(images(run, record=record, **settings), expected)
    err = capsys.readouterr().err
    assert err.count("CUDA graphs cannot be used") == 1 and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this build has CUDA graphs")
def test_a_build_without_graphs_samples_on(capsys):
    run, settings = make_run(), dict(solver="euler", steps=4)
    expected = images(run, **settings)
    assert torch.equal(images(run, record=graphs.CudaGraph, **settings), expected)
    err = capsys.readouterr().err
    assert err.startswith("note: CUDA graphs cannot be used (") and err.count("\n") == 1


def test_graphs_without_a_gpu_are_reported(capsys):
    run, settings = make_run(), {"precision": "float32", "solver": "euler", "steps": 4}
    expected = images(run, **settings)
    graphs.speed_up(run, settings, graphs=True)
    assert capsys.readouterr().err == "note: CUDA graphs need a CUDA GPU, and this is cpu: sampling without them\n"
    assert torch.equal(images(run, **settings), expected)


def test_an_old_gpu_samples_in_float32(monkeypatch, capsys):
    """A T4 emulates bfloat16, slowly."""
    run, settings = make_run(), {"precision": "bfloat16"}
    monkeypatch.setattr(Run, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert graphs.speed_up(run, settings) == {"precision": "float32"}
    assert run.model.blocks[0].qkv[0].weight.dtype == torch.float32
    assert capsys.readouterr().err == "note: Tesla T4 does not compute in bfloat16: sampling in float32\n"


@pytest.mark.parametrize("batch, advice", [(2, "a smaller --batch"), (1, "--precision bfloat16")])
def test_too_little_memory_is_one_sentence(batch, advice):
    run = make_run()

    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    run.model.forward = forward
    with pytest.raises(UserError, match=f"out of memory on cpu with {batch} images at a time: .*{advice}"):
        images(run, batch=batch, solver="euler", steps=4)
