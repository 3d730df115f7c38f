"""What a GPU does with this code: one command for the day when there is one, within a budget of seconds.

    python -m studies.gpu --budget 560 --out DIR                   speed and memory of the paper's models, gradients
    python -m studies.gpu quality --budget 480 --out DIR --data FASHION    the systems on Fashion-MNIST at patch 2
    python -m studies.gpu colour --budget 300 --out DIR            LapFlow on 64 x 64 photographs: pictures, previews

Each section is a process with a time limit, and each figure is a line of DIR/gpu.jsonl, written at once: what fails or
is cut off loses nothing else. Warnings and progress go to DIR/log.txt. Weights and data are random where only speed is
measured, and never zero: a GPU is faster on zeros. --dry-run does all of it with toy sizes, on the CPU.

quality takes LapFlow, LFM and Pyramidal Flow with three seeds, then the other systems, as far as the budget goes;
FASHION is the folder of the four files of Fashion-MNIST.
"""

import copy
import dataclasses
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import config
import sample
import train
from config import Config, UserError, first_line
from data import batches, fashion
from data.batches import BatchRandom, ImageRandom
from extras import causal
from run import checkpoint, graphs, load, log, memory, paper, pictures
from run.ranks import Ranks, StopSignals, best_device
from run.solver import solver_settings
from schedule import Schedule, loss
from scores.classifier import load_classifier
from studies import bench, compare

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 3                                                  # exit code of a section


@dataclass
class Job:
    """A section at work: where its lines go, whether sizes are toys, and when it ends (time.monotonic).

    data: folder of Fashion-MNIST; commit: of this code, asked for once.
    """

    section: str
    out: Path
    dry: bool
    ends: float
    data: str
    commit: str

    @cached_property
    def device(self) -> torch.device:
        device = torch.device("cpu") if self.dry else best_device()
        if device.type != "cuda" and not self.dry:
            print("error: there is no CUDA GPU here: add --dry-run for toy sizes on the CPU", file=sys.stderr)
            sys.exit(NO_GPU)
        return device

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def say(self, figure: str, **numbers) -> None:
        """One figure: a line of gpu.jsonl, and of the terminal."""
        log.record(self.out / "gpu.jsonl", None, self.device,
                   {"what": "gpu", "dry_run": self.dry, "section": self.section, "figure": figure, **numbers})
        values = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        print(f"{self.section:10s} {figure:32s} {values[:400]}", flush=True)

    def seconds(self, work: Callable, rounds: int = 5) -> float:
        """Median of one call, after one that does not count."""
        times = [bench.seconds(work, self.device) for _ in range(2 if self.dry else rounds + 1)]
        return statistics.median(times[1:])

    def preset(self, name: str) -> Config:
        cfg = Config(**paper.PRESETS[name].settings)
        return dataclasses.replace(cfg, size="32,2,2,2", res=128, batch=6, num_samples=8) if self.dry else cfg


def random_network(cfg: Config, device: torch.device) -> torch.nn.Module:
    """The network of a preset with weights that are random everywhere, the zeros of a new one too."""
    torch.manual_seed(0)
    model = load.build_model(cfg, facts_of(cfg), device=device).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def facts_of(cfg: Config) -> dict:
    return {**memory.paper_facts(cfg), "fingerprint": "random", "latent": None}


@dataclass(frozen=True)
class OneStage(Schedule):
    """A schedule that trains one stage."""

    only: int = 0

    def stage_of_rows(self, rng: BatchRandom) -> np.ndarray:
        return np.full(rng.batch, self.only)[rng.rows]


def training_pass(model: torch.nn.Module, cfg: Config, stage: int, batch: int, precision: str) -> Callable:
    """Loss and gradients of one stage, of the same random images at each call; returns the loss."""
    device = next(model.parameters()).device
    objective = train.Objective(model, loss, OneStage(cfg.starts, cfg.path, only=stage), precision)
    x1 = BatchRandom(1, stage, batch, device=device).randn(model.in_channels, model.resolution, model.resolution)
    y = None if model.condition is None else model.condition.draw(batch).to(device)

    def work():
        model.zero_grad(set_to_none=True)
        value, _ = objective(x1, y, BatchRandom(0, stage, batch, device=device))
        value.backward()
        return value.detach()

    return work


# ---------------------------------------------------------------------------------------------------------------------
# the machine, attention, gradients


def machine(job: Job) -> None:
    """Versions, and the rates that everything else is a share of."""
    device = job.device
    smi, query = shutil.which("nvidia-smi"), "--query-gpu=driver_version,memory.total,clocks.max.sm"
    driver = smi and subprocess.run([smi, query, "--format=csv,noheader"], capture_output=True, text=True,
                                    check=False).stdout.strip()
    job.say("versions", python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(), driver=driver, cores=os.cpu_count(),
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            flash=torch.backends.cuda.flash_sdp_enabled(), cudnn_attention=torch.backends.cuda.cudnn_sdp_enabled())
    sizes = ((8192, 8192, 8192), (65536, 1024, 3072), (65536, 4096, 1024), (16896, 1024, 4096))
    for rows, inner, columns in ((64, 64, 64),) if job.dry else sizes:
        for dtype in (torch.bfloat16, torch.float32):
            a = torch.randn(rows, inner, device=device).to(dtype)
            b = torch.randn(inner, columns, device=device).to(dtype)
            taken = job.seconds(lambda a=a, b=b: a @ b, 10)
            job.say("product", rows=rows, inner=inner, columns=columns, dtype=str(dtype),
                    tflops=2 * rows * inner * columns / taken / 1e12)
    x = torch.randn(2**16 if job.dry else 2**29, device=device)
    y = torch.empty_like(x)
    job.say("copy", gigabytes_per_second=8 * x.numel() / job.seconds(lambda: y.copy_(x), 10) / 1e9)


PAIRS = ((64, 65), (256, 321), (256, 322), (1024, 1345), (256, 257), (1024, 1281), (4096, 5377), (64, 64), (1024, 1344))
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION}            # cuDNN's backward has given NaN at such lengths


def attend(tensors: list, dtype: torch.dtype, backend: SDPBackend | None) -> list[torch.Tensor]:
    """Output and gradients of one attention."""
    inputs = [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
    with sdpa_kernel([backend]) if backend else nullcontext():
        out = F.scaled_dot_product_attention(*inputs)
        out.backward(torch.ones_like(out) + out.detach())
    return [out.detach(), *(x.grad for x in inputs)]


def attention(job: Job) -> None:
    """Each backend at our lengths, forward and backward, against float32 products; then the tests on this GPU."""
    for queries, keys in ((4, 5), (4, 6)) if job.dry else PAIRS:
        def draw(batch, queries=queries, keys=keys):
            return [torch.randn(batch, 16, n, 64, device=job.device) for n in (queries, keys, keys)]

        tensors, timed = draw(2), [x.to(torch.bfloat16) for x in draw(2 if job.dry else max(4, 32768 // queries))]
        exact = attend(tensors, torch.float32, SDPBackend.MATH)
        chosen = torch._fused_sdp_choice(*(x[:1] for x in timed))
        for name, backend in BACKENDS.items():
            figures = {"queries": queries, "keys": keys, "backend": name, "chosen": SDPBackend(chosen).name}
            try:
                results = attend(tensors, torch.bfloat16, backend)
                errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)]
                milliseconds = 1000 * job.seconds(lambda t=timed, b=backend: attend(t, torch.bfloat16, b))
                job.say("attention", **figures, milliseconds=milliseconds, batch=len(timed[0]), errors=errors,
                        finite=all(bool(x.isfinite().all()) for x in results))
            except RuntimeError as problem:
                job.say("attention", **figures, unavailable=first_line(problem))
    if job.device.type == "cuda":
        files = ["tests/test_gpu.py", "tests/test_graphs.py"]
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT, capture_output=True, text=True,
                               check=False)
        print(tests.stdout, file=sys.stderr)
        job.say("tests", result=next(iter(tests.stdout.splitlines()[-1:]), tests.stderr[-200:]))


def gradients(job: Job) -> None:
    """Loss and gradients of each stage against full float32; then fused AdamW against the plain one."""
    cfg = job.preset("celebahq-256")
    model, batch = random_network(cfg, job.device), 4 if job.dry else 32
    exact = {}
    for mode, precision, matmul in (("float32", "float32", "highest"), ("TF32", "float32", "high"),
                                    ("bfloat16", "bfloat16", "high"), ("compiled", "bfloat16", "high")):
        torch.set_float32_matmul_precision(matmul)
        if mode == "compiled":
            load.compile_blocks(model)
        for stage in range(cfg.num_scales):
            value = float(training_pass(model, cfg, stage, batch, precision)())
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            reference = exact.setdefault(stage, (value, flat))
            job.say("gradients", stage=stage, mode=mode, loss=value, loss_difference=value / reference[0] - 1,
                    gradient_error=float((flat - reference[1]).norm() / reference[1].norm()),
                    finite=bool(flat.isfinite().all()))
    results = {}
    for fused in (False, True):
        weights = [p.detach().clone().requires_grad_() for p in model.parameters() if p.grad is not None]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=fused)
        optimizer.step()
        results[fused] = torch.cat([w.detach().flatten() for w in weights])
        job.say("AdamW", fused=fused, milliseconds=1000 * job.seconds(optimizer.step))
        del optimizer, weights
    job.say("AdamW", largest_difference=float((results[True] - results[False]).abs().max()))


# ---------------------------------------------------------------------------------------------------------------------
# training speed, by stage


def time_stages(job: Job, name: str, model: torch.nn.Module, mode: str, micro: int) -> int:
    """Seconds, share of the peak and memory of each stage, with a micro-batch that fits. Returns its size."""
    cfg, peak = job.preset(name), memory.peak_flops(job.device)
    flops, taken, stage = memory.forward_flops(memory.meta_model(cfg, facts_of(cfg))), [], 0
    while stage < cfg.num_scales:
        if job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        try:
            work = training_pass(model, cfg, stage, micro, cfg.precision)
            work()
            first = time.monotonic() - began
            taken.append(job.seconds(work, 3))
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            job.say("out of memory", preset=name, mode=mode, stage=stage, micro_batch=micro)
            if micro == 1:
                return micro
            micro, taken, stage = max(n for n in range(1, micro) if cfg.batch % n == 0), [], 0
            continue
        plan = 4 * 2 * memory.parameters(model) + micro * memory.activation_bytes(model, stage, cfg.precision)
        job.say("stage", preset=name, mode=mode, stage=stage, micro_batch=micro, milliseconds=1000 * taken[-1],
                mfu=3 * micro * flops[stage] / taken[-1] / peak if peak else None, seconds_first=first,
                memory_gb=memory.peak_memory(job.device), plan_gb=plan / 1e9)
        stage += 1
    mean = memory.mean_of_stages(cfg, taken)
    job.say("images per second", preset=name, mode=mode, without_optimizer=micro / mean,
            mfu=3 * micro * memory.mean_of_stages(cfg, flops) / mean / peak if peak else None)
    return micro


def time_optimizer(job: Job, name: str, model: torch.nn.Module) -> None:
    """Clipping, AdamW and the moving average, once a step."""
    cfg, ema = job.preset(name), copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    def work():
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        train.update_ema(ema, model, cfg.ema, 10)

    job.say("optimizer", preset=name, milliseconds=1000 * job.seconds(work))


def profile(job: Job, name: str, model: torch.nn.Module, micro: int) -> None:
    """The kernels of one pass of the finest stage, longest first."""
    cfg = job.preset(name)
    work = training_pass(model, cfg, cfg.num_scales - 1, micro, cfg.precision)
    with torch.profiler.profile() as profiler:
        bench.seconds(work, job.device)
    kind, key = torch.autograd.DeviceType.CPU, "self_cpu_time_total"
    if job.device.type == "cuda":                           # the kernels, not the operators that start them
        kind, key = torch.autograd.DeviceType.CUDA, "self_device_time_total"
    events = sorted((e for e in profiler.key_averages() if e.device_type == kind and getattr(e, key) > 0),
                    key=lambda e: -getattr(e, key))
    total = sum(getattr(e, key) for e in events)
    job.say("profile", preset=name, milliseconds=total / 1000,
            kernels=[[e.key[:80], round(getattr(e, key) / total, 4), e.count] for e in events[:5 if job.dry else 25]])


def stages_of(job: Job, names: tuple) -> None:
    """Each preset: its stages eager and compiled, its optimizer, and of the first one the kernels."""
    for name in names:
        if job.left < 15 and not job.dry:
            job.say("no time left", preset=name)
            continue
        torch.set_float32_matmul_precision("high")
        cfg, model = job.preset(name), random_network(job.preset(name), job.device)
        free = memory.free_memory(job.device)
        micro = memory.fit_micro_batch(model, dataclasses.replace(cfg, stages="batch"), cfg.batch, free)
        micro = time_stages(job, name, model, "eager", micro)
        load.compile_blocks(model)
        micro = time_stages(job, name, model, "compiled", micro)
        time_optimizer(job, name, model)
        if name == "celebahq-256":
            profile(job, name, model, micro)
        del model
        if job.device.type == "cuda":
            torch.cuda.empty_cache()


def stages_256(job: Job) -> None:
    stages_of(job, ("celebahq-256",))


def stages_others(job: Job) -> None:
    stages_of(job, ("celebahq-1024", "celebahq-512", "imagenet-256-B", "imagenet-256-XL"))


# ---------------------------------------------------------------------------------------------------------------------
# sampling speed


def random_run(job: Job, name: str) -> load.Run:
    cfg = job.preset(name)
    model = random_network(cfg, job.device).eval().requires_grad_(False)
    return load.Run(cfg, model, facts_of(cfg), job.out, 0, "random")


def draw(run: load.Run, settings: dict, batch: int) -> torch.Tensor:
    """x1 (B, C, H, W): latents, not decoded."""
    load.full_float32()
    guided = sample.Guided(run.model, precision=settings["precision"])
    y = None if run.condition is None else run.condition.draw(batch).to(run.device)
    return run.system.sample(guided, ImageRandom(0, range(batch), run.device), y, run.schedule, run.shape, sample.solve,
                             solver="euler", steps=settings["steps"])


def time_sampling(job: Job, name: str, modes: tuple, batch: int = 1) -> None:
    """Seconds for an image with as many Euler steps as the paper reports NFE, and how far its latents are from those of
    the first mode. The modes change the network in place: each goes further than the one before."""
    run, steps, first = random_run(job, name), 4 if job.dry else paper.PRESETS[name].paper.get("nfe", 80), None
    plain = run.model.forward
    for mode in modes:
        settings = {"precision": "float32" if mode == "float32" else "bfloat16", "steps": steps}
        if "compiled" in mode and first is None:
            load.compile_blocks(run.model)
        if "weights" in mode or "graphs" in mode:
            run.model.forward = plain
            graphs.speed_up(run, settings, "graphs" in mode)
        began = time.monotonic()
        x1 = draw(run, settings, batch)
        first = x1 if first is None else first
        began, taken = time.monotonic() - began, job.seconds(lambda s=settings: draw(run, s, batch), 3)
        job.say("sampling", preset=name, mode=mode, batch=batch, nfe=steps, seconds_per_image=taken / batch,
                seconds_first=began, difference=float((x1 - first).norm() / first.norm()),
                captures=getattr(run.model.forward, "captures", 0))


def sampling(job: Job) -> None:
    """Batch 1: float32, autocast, weights converted once, graphs; then all compiled."""
    names = ("celebahq-256", "celebahq-512", "celebahq-1024")
    for modes in (("float32", "bfloat16", "bfloat16 weights", "bfloat16 weights, graphs"),
                  ("bfloat16 weights, compiled", "bfloat16 weights, compiled, graphs")):
        for name in names:
            if job.left < 10 and not job.dry:
                job.say("no time left", preset=name)
            else:
                time_sampling(job, name, modes)


# ---------------------------------------------------------------------------------------------------------------------
# real training


def train_here(cfg: Config, device: torch.device, ends: float) -> list[dict]:
    """The training loop, without checkpoints; the lines of its metrics."""
    train.save = lambda job: None                           # a process of its own: nobody else sees it
    with tempfile.TemporaryDirectory() as folder, StopSignals() as stop:
        stop.immediate = False
        cfg = dataclasses.replace(cfg, out=f"{folder}/run", latents=f"{folder}/cache", save_every=10**9)
        if cfg.space == "latent":
            bench.random_cache(Path(cfg.latents), cfg)
        job = train.setup(cfg, Ranks(0, 1, device))
        train.resume(job, fresh=True)
        train.loop(job, stop, time.perf_counter() + ends - time.monotonic())
        return checkpoint.read_lines([Path(cfg.out) / "metrics.jsonl"])


def curves(job: Job) -> None:
    """The same runs in float32 and in bfloat16: their losses must lie on each other."""
    for dataset, steps in (("digits", 400), ("photos", 200)):
        for precision in ("float32", "bfloat16"):
            cfg = paper.resolve({"dataset": dataset, "precision": precision, "steps": 4 if job.dry else steps,
                                 "log_every": 2 if job.dry else 20, **({"size": "32,2,2,4"} if job.dry else {})})
            lines = train_here(cfg, job.device, job.ends - 2)
            job.say("curve", dataset=dataset, precision=precision, steps=lines[-1]["step"],
                    loss=[line["loss"] for line in lines], grad_norm=[line["grad_norm"] for line in lines],
                    images_per_second=lines[-1]["images_per_second"], skipped=sum(line["skipped"] for line in lines))


def spare(job: Job) -> None:
    """What the time is left for: the real loop, larger batches of samples, and cuDNN's attention."""
    cfg = dataclasses.replace(job.preset("celebahq-256"), steps=4 if job.dry else 60, log_every=2 if job.dry else 10)
    lines = train_here(cfg, job.device, job.ends - 2)
    half = lines[len(lines) // 2 :]
    job.say("loop", preset="celebahq-256", memory_gb=half[-1]["memory_gb"], data_wait=half[-1]["data_wait"],
            images_per_second=statistics.harmonic_mean([line["images_per_second"] for line in half]))
    for batch in (2,) if job.dry else (8, 64):
        time_sampling(job, "celebahq-256", ("bfloat16 weights", "bfloat16 weights, graphs"), batch)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("high")
    model = random_network(job.preset("celebahq-1024"), job.device)
    time_stages(job, "celebahq-1024", model, "eager, cuDNN attention", 2 if job.dry else 16)


# ---------------------------------------------------------------------------------------------------------------------
# the second and the third command


FIRST = ("LapFlow", "LFM", "Pyramidal Flow")


def quality_runs(job: Job, folder: Path) -> tuple[list, Namespace]:
    """The runs in their order, and the arguments of studies.compare for them."""
    dataset = "digits" if job.dry else "fashion"
    if job.data:
        fashion.DEBIAN = Path(job.data)                     # studies.compare looks for the files here
    args = Namespace(dataset=dataset, ablation=None, seeds=1 if job.dry else 3, steps=4 if job.dry else 3000,
                     size="32,2,2,2" if job.dry else "128,6,4,2", jobs=2 if job.dry else 4, out=str(folder),
                     record=job.out / "quality.jsonl", device=None)
    changes = {"data": str(Path(job.data).resolve()) if job.data else "", "eval_every": 0}
    changes |= {"num_samples": 10, "solver": "euler", "solver_steps": 2, "warmup": 0} if job.dry else {
        "lr": 2e-3, "batch": 256, "precision": "bfloat16"}
    planned = [(name, dataclasses.replace(cfg, **changes)) for name, cfg in compare.plan_runs(args)]
    if job.dry:
        planned = planned[: len(FIRST)]
    return sorted(planned, key=lambda run: (run[0] not in FIRST, run[1].seed)), args


def quality(job: Job) -> None:
    """Trains and judges as many runs as fit; each has its line in quality.jsonl."""
    log.check_record(job.out / "quality.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        planned, args = quality_runs(job, Path(folder))
        dataset = batches.load(planned[0][1])
        if not job.dry:                                     # one judge for all, before several ask for it
            load_classifier(dataset, batches.to_images, job.device)
        signal.signal(signal.SIGALRM, lambda *_: sys.exit("the time is over"))
        signal.alarm(max(1, int(job.left - 45)))
        try:
            compare.run_all(planned, args)
        except SystemExit as stop:
            print(stop, file=sys.stderr)
        signal.alarm(0)
        lines = checkpoint.read_lines([args.record])
        done = [(name, cfg) for name, cfg in planned if compare.finished(lines, cfg, "run")]
        job.say("quality", runs=[[name, cfg.seed] for name, cfg in done])
        if done:
            by_name = {name: [compare.finished(lines, cfg, "run") for other, cfg in done if other == name]
                       for name, _ in done}
            (job.out / "quality.md").write_text(compare.table(by_name, dict.fromkeys(by_name), {}) + "\n")
            compare.draw_samples(job.out / "quality.png", done, None)


def colour(job: Job) -> None:
    """Trains LapFlow on 64 x 64 crops of photographs for as long as there is time, then draws samples and previews."""
    given = {"dataset": "photos", "precision": "bfloat16", "compile": not job.dry, "batch": 64, "num_samples": 64}
    given |= {"size": "32,2,2,4", "steps": 3, "log_every": 1, "batch": 6, "num_samples": 6, "solver": "euler",
              "solver_steps": 3} if job.dry else {"size": "384,8,6,4", "steps": 60, "log_every": 20, "lr": 1e-3}
    torch.set_float32_matmul_precision("high")
    began = time.monotonic()
    rate = train_here(paper.resolve(given), job.device, job.ends)[-1]["images_per_second"] / given["batch"]
    room = job.left - (5 if job.dry else 60) - 0.5 * (time.monotonic() - began)     # it compiles once more
    given["steps"] = 3 if job.dry else max(100, int(0.9 * room * rate))
    job.say("speed", steps_per_second=rate, steps=given["steps"])
    with tempfile.TemporaryDirectory() as folder, StopSignals() as stop:
        stop.immediate = False
        cfg = dataclasses.replace(paper.resolve(given), out=folder, save_every=10**9)
        state = train.setup(cfg, Ranks(0, 1, job.device))
        train.resume(state, fresh=True)
        train.loop(state, stop, time.perf_counter() + job.left - (3 if job.dry else 40))
        run = train.trained(state)
        run.model.eval().requires_grad_(False)
        scores = train.finish(state)
        job.say("colour", steps=state.step, loss=checkpoint.read_lines([run.folder / "metrics.jsonl"])[-1]["loss"],
                scores={key: value for key, value in scores.items() if isinstance(value, float)})
        preview(job, run)
        for name in ("samples.png", "trajectory.png", "loss.png"):
            shutil.copy(run.folder / name, job.out / name)


def preview(job: Job, run: load.Run) -> None:
    """Eight images by their bands: one row for each prefix."""
    count, rows, settings = 2 if job.dry else 8, [], solver_settings(run.cfg)
    y = None if run.condition is None else run.condition.draw(count)
    for bands in range(1, run.cfg.num_scales + 1):
        x1, nfe = causal.preview(run, range(count), y, bands=bands, **settings)
        rows.append(list(batches.to_images(F.interpolate(x1, run.cfg.res))))
        job.say("preview", bands=bands, nfe=nfe)
    names = [f"{n + 1} of {len(rows)} bands" for n in range(len(rows))]
    pictures.draw_images(job.out / "previews.png", rows, [], [], names)


# ---------------------------------------------------------------------------------------------------------------------
# the sections as processes

COMMANDS = {
    "speed": {"machine": (machine, 30), "attention": (attention, 60), "gradients": (gradients, 60),
              "stages 256": (stages_256, 75), "sampling": (sampling, 100), "stages": (stages_others, 190),
              "curves": (curves, 70), "spare": (spare, 10**6)},
    "quality": {"quality": (quality, 10**6)},
    "colour": {"colour": (colour, 10**6)}}


def work_in_child(work: Callable, job: Job) -> None:
    """A section: figures go to the terminal, all else to log.txt. A failure is a line, too."""
    os.setsid()                                             # compilers that it starts end with it
    sys.stderr = open(job.out / "log.txt", "a", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)                         # of the libraries, and of what the section starts
    log.commit = lambda: job.commit
    if job.dry:
        torch.set_num_threads(1)                            # threads do not survive a fork
        torch.compiler.set_stance("force_eager")
    try:
        work(job)
    except Exception as problem:
        traceback.print_exc()
        job.say("failed", error=f"{type(problem).__name__}: {first_line(problem)}")
        sys.exit(1)


def measure(command: str, out: Path, budget: float, dry: bool, data: str = "") -> list[dict]:
    """Runs the sections of a command; returns how each ended. The parent never touches the GPU: children are forks."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    log.check_record(out / "gpu.jsonl")
    commit = log.commit() if shutil.which("git") else "unknown"
    ends, results = time.monotonic() + budget, []
    for name, (work, limit) in COMMANDS[command].items():
        began = time.monotonic()
        limit = min(limit, ends - began)
        if limit < 1:
            ended = "no time left"
        else:
            child = multiprocessing.get_context("fork").Process(
                target=work_in_child, args=(work, Job(name, out, dry, began + limit, data, commit)))
            child.start()
            child.join(limit)
            ended = {None: "cut off", 0: "finished"}.get(child.exitcode, "failed")
            if child.exitcode is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.join()
            if child.exitcode == NO_GPU:
                raise UserError("there is no CUDA GPU here: add --dry-run for toy sizes on the CPU")
        results.append({"what": "gpu section", "dry_run": dry, "section": name, "ended": ended, "limit": limit,
                        "seconds": time.monotonic() - began})
        checkpoint.append_line(out / "gpu.jsonl", results[-1])
        print(f"{name:10s} {ended} after {results[-1]['seconds']:.0f} s", flush=True)
    return results


def main() -> None:
    parser = config.parser(__doc__, "python -m studies.gpu [speed | quality | colour] --budget SECONDS --out DIR")
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="speed", help="[speed]")
    parser.add_argument("--budget", type=float, default=560, help="seconds for all sections together [560]")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="directory of the lines [out/gpu]")
    parser.add_argument("--data", default="", help="quality: folder of the files of Fashion-MNIST [that of Debian]")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on the CPU")
    args = parser.parse_args()
    if not args.budget > 0:
        raise UserError(f"--budget must be above 0 seconds, not {args.budget}")
    results = measure(args.command, args.out, args.budget, args.dry_run, args.data)
    print(json.dumps({result["section"]: result["ended"] for result in results}))


if __name__ == "__main__":
    config.run(main)
