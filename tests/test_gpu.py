"""The code on a GPU. Without one: on fake CUDA tensors, which have a shape, a type and a device but no numbers.

They show mixed devices, types, and host syncs (places where Python waits for a number of the GPU). They cannot show
backward: autograd's engine asks for a real GPU. The last tests need one, and are skipped without.
"""

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import baselines
import sample
import train
from config import Config, UserError
from conftest import needs_fork, randomize
from data import batches
from data.batches import BatchRandom, ImageRandom
from data.conditions import Labels, Vectors
from run import checkpoint, graphs, load, log, memory, paper, pictures, ranks
from studies import bench, gpu, tables

aten = torch.ops.aten
GPU = torch.device("cuda:0")
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
         aten._unique2.default}


def register_guard() -> ctypes.Array:
    """The CPU build of torch has no guard for CUDA: the meta device's, which does nothing, takes its place."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    try:
        guards = (ctypes.c_void_p * 20).in_dll(ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError) as problem:
        pytest.skip(f"this build of torch hides its device guards: {problem}")
    if not guards[1]:                                       # places of c10's DeviceType: 1 is CUDA, 14 is meta
        guards[1] = guards[14]
    return guards


class Watch(TorchDispatchMode):
    """Counts what a GPU run must avoid: host syncs, and copies between devices; and attention by its type.

    answers: how often Python gets True where it waits for a truth value, then False; a mask selects everything.
    None: a wait is an error of torch's.
    """

    def __init__(self, answers: int | None = None):
        super().__init__()
        self.answers, self.waits, self.attention = answers, 0, Counter()
        self.to_device = self.to_host = self.blocking = 0                           # blocking: copies Python waits for

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func in WAITS and first.device.type == "cuda":
            self.waits += 1
            if self.answers is not None:
                return self.answer(func, first)
        if func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.waits += 1
            if self.answers is not None:
                return first.clone()
        out = func(*args, **kwargs)
        if func is aten._to_copy.default and first.device != out.device:
            self.to_device += out.device.type == "cuda"
            self.blocking += not kwargs.get("non_blocking")
            self.to_host += out.device.type == "cpu"
        return out


    def answer(self, func: Callable, x: torch.Tensor) -> torch.Tensor | tuple | bool | float:
        if func is aten._unique2.default:                   # all are different
            places = torch.arange(len(x), device=x.device)
            return x.clone(), places, torch.ones_like(places)
        if func is aten.nonzero.default:
            return torch.arange(len(x), device=x.device)[:, None]
        self.answers -= 1
        return self.answers >= 0 if x.dtype == torch.bool else 0.5


@pytest.fixture
def fake(monkeypatch):
    """A function that enters fake mode and gives a Watch: `with fake() as watch:`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    guards, real, attention = register_guard(), torch.cuda.is_available(), F.scaled_dot_product_attention
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)

    @contextlib.contextmanager
    def enter(answers=None):
        with FakeTensorMode(allow_non_fake_inputs=True), Watch(answers) as watch:
            def counted(q, *others):
                watch.attention[q.dtype] += 1
                return attention(q, *others)

            monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
            yield watch

    yield enter
    if not real:
        guards[1] = None


class NoNumbers(BatchRandom):
    """A BatchRandom on a fake GPU, which has no generator."""

    def __init__(self, batch: int = 12):
        super().__init__(0, 0, batch)
        self.device, self.generator = GPU, None


CONDITIONS = {"labels": partial(Labels, ["cat", "dog"]), "none": None,
              "vectors": lambda width: Vectors(5, width, torch.zeros(7, 5))}
SMALL = dict(size="64,2,2,4", num_scales=2, precision="bfloat16")
SYSTEMS = [dict(SMALL, method=name) for name in baselines.SYSTEMS if name != "lfm"]
SYSTEMS += [dict(SMALL, method="lfm", num_scales=1), dict(SMALL, mask="none"), dict(SMALL, mask="self"),
            dict(SMALL, experts="qkv"), dict(SMALL, precision="float32"),
            dict(SMALL, condition_tokens=False), dict(SMALL, noise="independent"),
            dict(SMALL, stages="batch"), dict(SMALL, stages="batch", method="dfm")]


def conditions_on_gpu(condition: torch.nn.Module | None, batch: int) -> torch.Tensor | None:
    return None if condition is None else condition.draw(batch).to(GPU)


def make(cfg: Config, condition: str = "labels", side: int = 32) -> torch.nn.Module:
    """The network of a configuration, built on the GPU as run/load.py does."""
    with GPU:
        model = baselines.SYSTEMS[cfg.method].network(cfg, 4, CONDITIONS[condition], side)
    for module in model.modules():                          # fake parameters cannot be moved: buffers alone
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(GPU))
    return model


def check_loss(cfg: Config, watch: Watch, condition: str = "labels") -> int:
    """Training loss of a batch; returns the number of attention calls."""
    system, model = baselines.SYSTEMS[cfg.method], make(cfg, condition)
    objective = train.Objective(model, system.loss, system.schedule(cfg), cfg.precision)
    x1, y = torch.randn(12, 4, 32, 32, device=GPU), conditions_on_gpu(model.condition, 12)
    watch.to_device = watch.blocking = 0
    watch.attention.clear()
    loss, errors = objective(x1, y, NoNumbers())
    assert (loss.device, loss.dtype, loss.shape) == (GPU, torch.float32, ())
    for t, error in errors:
        assert t.device == error.device == GPU and error.dtype == torch.float32 and t.shape == error.shape
    assert watch.waits == watch.to_host == watch.blocking == 0
    assert watch.to_device <= (cfg.num_scales if cfg.stages == "stratified" else 1)     # rows: schedule.rows_by_stage
    assert set(watch.attention) == {getattr(torch, cfg.precision)}
    return sum(watch.attention.values())


@pytest.mark.parametrize("condition, size, depth", [
    pytest.param("labels", "L/2", 24, marks=pytest.mark.slow), ("labels", "1024,4,16,2", 4),
    ("vectors", "1024,4,16,2", 4), ("none", "1024,4,16,2", 4)])
def test_loss_of_the_large_model_stays_on_the_gpu(condition, size, depth, fake):
    with fake() as watch:
        calls = check_loss(Config(size=size, num_scales=3, precision="bfloat16"), watch, condition)
    assert calls == depth * (1 + 2 + 3)                     # stage s has s + 1 bands


def name_of(settings: dict) -> str:
    return "-".join(str(value) for name, value in settings.items() if name not in SMALL) or "lapflow"


@pytest.mark.parametrize("settings", SYSTEMS, ids=name_of)
def test_loss_of_every_system_stays_on_the_gpu(settings, fake):
    with fake() as watch:
        check_loss(Config(**settings), watch)


@pytest.mark.slow
def test_large_baseline_stays_on_the_gpu(fake):
    with fake() as watch:
        check_loss(Config(method="pyramidal", size="L/2", num_scales=2, precision="bfloat16"), watch)


@pytest.mark.parametrize("condition, precision, size, num_scales", [
    ("labels", "bfloat16", "L/2", 2), ("vectors", "bfloat16", "64,2,2,2", 3), ("vectors", "float32", "64,2,2,2", 3)])
def test_forward_of_each_stage_under_guidance(condition, precision, size, num_scales, fake):
    with fake() as watch:
        model = make(Config(size=size, num_scales=num_scales), condition)
        guided, y = sample.Guided(model, 1.5, precision=precision), conditions_on_gpu(model.condition, 2)
        watch.to_device = 0
        for stage in range(num_scales):
            bands, _ = model.stage_inputs(stage, 2, GPU)
            out = guided(bands, torch.rand(2, device=GPU, dtype=torch.float64), y)
            assert [v.shape for v in out] == [x.shape for x in bands]
            assert {(v.device, v.dtype) for v in out} == {(GPU, torch.float32)}
        assert guided.passes == 2 * num_scales and watch.to_device == watch.to_host == watch.waits == 0
        assert set(watch.attention) == {getattr(torch, precision)}


def test_guidance_in_an_interval_waits_for_the_time(fake):
    """`Guided` compares the time with an interval in Python, at each call; without an interval it waits for nothing."""
    for interval, waits in (((0.2, 0.8), 2), ((0.0, 1.0), 0)):
        with fake(answers=99) as watch:
            model = make(Config(**SMALL))
            guided = sample.Guided(model, 1.5, interval)
            guided(*model.stage_inputs(1, 2, GPU), conditions_on_gpu(model.condition, 2))
            assert (watch.waits, guided.passes) == (waits, 2)


SOLVED = [("lapflow", "euler"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [
    *(("lapflow", solver) for solver in ("midpoint", "heun", "rk4")),
    *((method, "euler") for method in ("pyramidal", "edify", "dfm", "separate"))])]


@pytest.mark.parametrize("method, solver", SOLVED)
def test_fixed_step_solvers_on_the_gpu(method, solver, fake):
    """The whole of a sampling run: noise from the CPU, all segments, on one device and in float32."""
    cfg = Config(**{**SMALL, "method": method})
    with fake(answers=10**6) as watch:
        system, model = baselines.SYSTEMS[method], make(cfg)
        guided, y = sample.Guided(model, precision="bfloat16"), conditions_on_gpu(model.condition, 3)
        watch.to_device = 0
        x1 = system.sample(guided, ImageRandom(0, range(3), GPU), y, system.schedule(cfg), (4, 32, 32), sample.solve,
                           solver=solver, steps=4)
        assert (x1.shape, x1.device, x1.dtype) == ((3, 4, 32, 32), GPU, torch.float32)
        assert watch.to_host == 0 and watch.attention[torch.float32] == 0
        calls, passes = sum(guided.calls.values()), {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}[solver]
        # torchdiffeq waits seven times in two steps, Field once for each segment: were its velocities finite?
        assert watch.waits <= calls * 3.5 / passes + cfg.num_scales


def test_adaptive_solver_on_the_gpu(fake):
    """dopri5 up to its first step: it reads the number of its step times, and the answers here are made up."""
    cfg = Config(**SMALL)
    with fake(answers=40) as watch:
        model = make(cfg)
        guided, y = sample.Guided(model), conditions_on_gpu(model.condition, 2)
        watch.to_device = 0
        with pytest.raises(ValueError, match="repeated"):
            baselines.SYSTEMS["lapflow"].sample(guided, ImageRandom(0, range(2), GPU), y,
                                                baselines.SYSTEMS["lapflow"].schedule(cfg), (4, 32, 32), sample.solve)
        assert guided.calls[16] == 2 and watch.to_host == 0


def test_batches_for_the_gpu(fake, monkeypatch):
    """What the loop gets: pixels, labels with some dropped and the random numbers, on the GPU."""
    cfg, dataset = Config(batch=12), batches.load(Config())
    monkeypatch.setattr(batches, "BatchRandom", lambda *_: NoNumbers())
    with fake() as watch:
        with GPU:
            condition = Labels(dataset.classes, 8)
        stream = batches.micro_batches(dataset, cfg, 0, lambda step: [slice(0, 12)], GPU, condition)
        ((x1, y, rng),) = next(stream)
        stream.close()
        assert x1.device == y.device == rng.rand().device == GPU and x1.dtype == torch.float32
        assert watch.to_device == 2 and watch.waits == watch.to_host == 0


def test_a_step_waits_for_nothing(fake):
    """Clipping, fused AdamW with found_inf, the moving average and the log, as in train.loop; gradients are made up."""
    cfg = Config(**SMALL, dataset="imagenet", res=32, batch=12)
    with fake() as watch:
        system, model, ema = baselines.SYSTEMS["lapflow"], make(cfg), make(cfg)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        metrics = log.Log.__new__(log.Log)                  # its constructor asks for the GPU's name
        metrics.cfg, metrics.ranks, metrics.shares = cfg, ranks.Ranks(0, 1, GPU), system.schedule(cfg).shares
        metrics.clear()
        objective = train.Objective(model, system.loss, system.schedule(cfg), cfg.precision)
        watch.to_device = 0
        loss, errors = objective(torch.randn(12, 4, 32, 32, device=GPU), conditions_on_gpu(model.condition, 12),
                                 NoNumbers())
        metrics.add(loss, errors, 12)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        train.update_ema(ema, model, 0.99, 3)
        assert watch.waits == watch.to_host == 0
        assert all(value.device == GPU for state in optimizer.state.values() for value in state.values())


# ---------------------------------------------------------------------------------------------------------------------
# what a user may ask of a GPU that it cannot do


@pytest.mark.parametrize("name, problem", [
    ("cuda:7", RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be reported later")),
    ("cuda", AssertionError("Torch not compiled with CUDA enabled")),
    ("cuda", RuntimeError("Found no NVIDIA driver on your system.\nPlease check"))])
def test_a_device_that_is_not_there(name, problem, monkeypatch):
    def zeros(*_, **__):
        raise problem

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=f"^the device '{name}' cannot be used: [^\n]*; choose one of (.*)$") as error:
        ranks.best_device(name)
    assert str(error.value).endswith("one of cpu, cuda:0, cuda:1")


def test_an_old_gpu_does_not_train_in_bfloat16(monkeypatch, give_up, tmp_path):
    """A T4 emulates it, slowly. Told before data are read, and before anything is written."""
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    error = give_up("train.py", "--device", "cuda:0", "--precision", "bfloat16")
    assert error == "error: cuda:0 is too old to compute in bfloat16: add --precision float32"
    assert not list(tmp_path.iterdir()) and ranks.best_device("cuda:0") == GPU


def test_cudnn_attention_is_off_on_a_gpu(monkeypatch):
    """Its gradients are wrong where the number of keys leaves 64 over a multiple of 128 (pytorch issue 196678)."""
    asked = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    assert ranks.best_device("cuda:0") == GPU and asked == [False]
    ranks.best_device("cpu")
    assert asked == [False]


def test_training_builds_its_network_on_the_device(tmp_path, monkeypatch):
    """And does not move it there: 38 s on one thread of a CPU at the size of the paper."""
    places, device, network = [], torch.device("cpu", 0), baselines.SYSTEMS["lapflow"].network
    monkeypatch.setattr(baselines.SYSTEMS["lapflow"], "network", lambda *given: (
        places.append(torch.get_default_device()), network(*given))[1])
    train.setup(Config(out=str(tmp_path / "run")), ranks.Ranks(0, 1, device))
    assert places[0] == device != torch.device("cpu")


def test_a_model_larger_than_the_gpu_is_one_sentence(monkeypatch):
    def network(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(baselines.SYSTEMS["lapflow"], "network", network)
    with pytest.raises(UserError, match="^cpu has too little free memory for this model: choose another --device$"):
        load.build_model(Config(), {"channels": 1, "side": 8, "classes": []})


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried 2.00 GiB", "Triton Error [CUDA]: out of memory",
                                  "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"])
def test_too_little_memory_for_averages_or_moments_is_one_sentence(tmp_path, monkeypatch, text):
    def deepcopy(model):
        raise RuntimeError(text)

    monkeypatch.setattr(train.copy, "deepcopy", deepcopy)
    with pytest.raises(UserError, match="^cpu has too little free memory for this model: choose another --device$"):
        train.train(Config(out=str(tmp_path / "run"), steps=1), device="cpu")


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="^shapes do not fit$"), ranks.within_memory("cpu"):
        raise RuntimeError("shapes do not fit")


def test_what_fits_counts_weights_once(monkeypatch):
    """The free memory is read when the weights are on the GPU already, and the estimate has them too."""
    cfg = Config(batch=8, num_scales=1, stages="batch")
    model = load.build_model(cfg, batches.facts(batches.load(Config())), device="meta")
    need, weights = memory.memory_bytes(model, cfg, 4) / 0.9 + 1, 4 * memory.parameters(model)
    for free, rows in ((need - weights, 4), (need - weights - 2, 2)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert memory.split_batch(model, cfg, ranks.Ranks(0, 1, torch.device("cpu"))).sizes == [rows]


def test_blocks_are_compiled_whole_on_several_gpus():
    """Dynamo cuts graphs where DistributedDataParallel has a bucket's worth of weights, unless it is told not to."""
    torch._dynamo.config.optimize_ddp = True
    load.compile_blocks(torch.nn.Identity())
    assert torch._dynamo.config.optimize_ddp is False


def test_a_network_compiled_for_training_is_watched_as_it_is_written(tmp_path, monkeypatch):
    """Pictures have other batches than training: each would be compiled."""
    stances = []

    def force(stance):
        stances.append(stance)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.compiler, "set_stance", force)
    cfg = Config(compile=True, solver="euler", solver_steps=2)
    model = load.build_model(cfg, facts := batches.facts(batches.load(Config())))
    run = load.Run(cfg, model, facts, tmp_path, 1, "raw")
    pictures.watch(run, sample.Guided(model), sample.solve, model.condition.draw(3), steps=2)
    train.draw(run, 2, progress=False)
    assert stances == ["force_eager"] * 2


def test_a_trained_network_is_put_on_the_device():
    cfg, facts = Config(size="32,2,2,2"), batches.facts(batches.load(Config()))
    weights = load.build_model(cfg, facts).state_dict()
    model = load.restore_model(cfg, facts, weights, Path("run"), torch.device("meta"))
    assert {x.device.type for x in [*model.parameters(), *model.buffers()]} == {"meta"}


# ---------------------------------------------------------------------------------------------------------------------
# studies.bench gpu, the command for the day when there is a GPU


@pytest.mark.slow
@needs_fork
def test_a_section_that_fails_or_hangs_loses_nothing_else(tmp_path, monkeypatch, capfd):
    def good(job):
        job.say("figure", seconds=1.5)

    def bad(job):
        good(job)
        raise ZeroDivisionError("no time")

    def hang(job):
        good(job)
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(60)

    def crash(job):
        good(job)
        os.kill(os.getpid(), signal.SIGKILL)

    sections = {"good": (good, 9), "bad": (bad, 9), "hang": (hang, 4), "crash": (crash, 9), "last": (good, 9)}
    monkeypatch.setitem(gpu.COMMANDS, "gpu", sections)
    ends = {result["section"]: result["ended"] for result in gpu.measure("gpu", tmp_path, 60, dry=True)}
    assert ends == {"good": "finished", "bad": "failed", "hang": "cut off", "crash": "failed", "last": "finished"}
    lines = checkpoint.read_lines([tmp_path / "gpu.jsonl"])
    assert [line["section"] for line in lines if line.get("figure") == "figure"] == list(sections)
    assert [line["error"] for line in lines if line.get("figure") == "failed"] == ["ZeroDivisionError: no time"]
    assert "ZeroDivisionError" in (tmp_path / "log.txt").read_text()
    assert 'figure           {"seconds": 1.5}' in capfd.readouterr().out
    stat = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"              # what it started ended with it


def test_the_sections_fit_the_budget():
    assert sum(limit for _, limit in gpu.COMMANDS["gpu"].values() if limit < 10**6) <= 560


@needs_fork
@pytest.mark.slow
def test_no_section_begins_after_the_budget(tmp_path, monkeypatch):
    sections = {"first": (lambda job: time.sleep(9), 99), "second": (lambda job: job.say("figure"), 99)}
    monkeypatch.setitem(gpu.COMMANDS, "gpu", sections)
    began = time.monotonic()
    assert [r["ended"] for r in gpu.measure("gpu", tmp_path, 2, dry=True)] == ["cut off", "no time left"]
    assert time.monotonic() - began < 6


@needs_fork
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_asks_for_a_dry_run(tmp_path, give_up):
    error = give_up("studies.bench", "gpu", "--out", str(tmp_path))
    assert error == "error: there is no CUDA GPU here: add --dry-run for toy sizes on the CPU"
    assert "--budget must be above 0" in give_up("studies.bench", "gpu", "--budget", "0")


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("command, figures", [
    ("gpu", {"versions", "product", "copy", "attention", "tests", "gradients", "AdamW", "stage", "training",
             "end of a step", "profile", "sampling", "curve", "loop"}),
    ("gpu-quality", {"quality"}), ("gpu-colour", {"speed", "colour"})])
def test_dry_run_of_every_section(command, figures, tmp_path, monkeypatch, capfd):
    """All sections finish on a CPU, without diffusers, from the command line to the lines."""
    monkeypatch.setitem(sys.modules, "diffusers", None)     # not on that machine
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", command, "--dry-run", "--budget", "200", "--out", "out"])
    bench.main()
    lines = checkpoint.read_lines([tmp_path / "out" / "gpu.jsonl"])
    ended = {line["section"]: line["ended"] for line in lines if line["what"] == "gpu section"}
    assert ended == dict.fromkeys(gpu.COMMANDS[command], "finished"), (tmp_path / "out" / "log.txt").read_text()
    assert {line["figure"] for line in lines if line["what"] == "gpu"} == figures
    assert all("tests collected" in line["result"] for line in lines if line.get("figure") == "tests")
    assert not [file for file in tmp_path.rglob("step-*.pt")]
    assert all(line["dry_run"] for line in lines) and not list((tmp_path / "out").glob("quality.jsonl"))
    assert len(list((tmp_path / "out").iterdir())) <= 8     # few to copy back
    assert "finished after" in capfd.readouterr().out
    monkeypatch.setattr(tables, "lines", lambda name: lines)
    assert tables.gpu().count("not measured") == 5 * 8      # a dry run is not shown
    lines = [{**line, "dry_run": False} for line in lines]
    if command == "gpu":                                    # all but the share of an unknown peak, and two presets
        assert tables.gpu().count("not measured") == 5 + 2 * 4


# ---------------------------------------------------------------------------------------------------------------------
# on a real GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LENGTHS = sorted({keys for _, keys in gpu.PAIRS})            # of the presets, with condition tokens and without


@needs_gpu
@pytest.mark.parametrize("keys", LENGTHS)
def test_attention_and_its_gradients_on_the_gpu(keys):
    """The backend that is chosen in bfloat16, against plain float32 products."""
    ranks.best_device("cuda")
    generator = torch.Generator("cuda").manual_seed(keys)
    q, k, v = (torch.randn(2, 16, keys, 64, device="cuda", generator=generator) for _ in range(3))
    results = []
    for dtype, backends in ((torch.float32, [SDPBackend.MATH]), (torch.bfloat16, None)):
        inputs = [x.detach().to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(backends) if backends else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(*inputs)
        out.float().square().sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    for exact, rounded in zip(*results, strict=True):
        assert rounded.isfinite().all()
        assert (rounded.float() - exact).norm() < 0.02 * exact.norm() and math.isfinite(exact.norm())


def test_the_lengths_of_attention_that_are_tried_are_those_of_the_presets(monkeypatch):
    """Queries and keys of each band, with its condition tokens; PAIRS has some without, too."""
    pairs, attention = set(), F.scaled_dot_product_attention

    def noted(q, k, v):
        pairs.add((q.shape[-2], k.shape[-2]))
        return attention(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    for name in ("celebahq-256", "celebahq-512", "celebahq-1024", "imagenet-256-B"):
        cfg = Config(**paper.PRESETS[name].settings)
        memory.forward_flops(memory.meta_model(cfg, memory.paper_facts(cfg)))
    assert pairs <= set(gpu.PAIRS) and len(pairs) == 8


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recorded_passes_on_the_gpu_give_the_images_of_plain_ones(precision):
    """Also a second time, with other noise and labels in the same recordings."""
    cfg, drawn = Config(**SMALL), []
    torch.manual_seed(0)
    model = randomize(make(cfg)).eval().requires_grad_(False)
    run, y = load.Run(cfg, model, {}, Path("."), 1, "raw"), torch.tensor([0, 1, 1], device=GPU)
    run.fingerprint = ""
    for speed in (False, True):
        if speed:
            graphs.speed_up(run, {"precision": precision}, graphs=True)
        drawn.append([baselines.SYSTEMS["lapflow"].sample(
            sample.Guided(model, 1.5, precision=precision), ImageRandom(seed, range(3), GPU), y.roll(seed),
            baselines.SYSTEMS["lapflow"].schedule(cfg), (4, 32, 32), sample.solve, solver="heun", steps=6)
            for seed in (0, 1)])
    assert model.forward.captures == cfg.num_scales and not torch.equal(*drawn[0])
    for plain, recorded in zip(*drawn, strict=True):
        assert (plain - recorded).norm() < 1e-3 * plain.norm()


@needs_gpu
def test_training_step_on_the_gpu_does_not_wait():
    """torch reports host syncs itself."""
    cfg, system = Config(**SMALL), baselines.SYSTEMS["lapflow"]
    model = make(cfg)
    objective = train.Objective(model, system.loss, system.schedule(cfg), cfg.precision)
    x1, y, rng = torch.randn(12, 4, 32, 32, device=GPU), torch.zeros(12, dtype=torch.long, device=GPU), BatchRandom(
        0, 0, 12, device=GPU)
    objective(x1, y, rng)[0].backward()
    with warnings.catch_warnings(record=True) as caught:    # the mode itself warns once that it is a prototype
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            objective(x1, y, rng)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
