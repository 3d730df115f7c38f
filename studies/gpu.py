"""What a GPU does with this code: the sections of `python -m studies.bench gpu`, within a budget of seconds.

Each section is a process with a time limit, and each figure is a line of OUT/gpu.jsonl, written at once: what fails or
is cut off loses nothing else. Warnings and progress go to OUT/log.txt. Weights and data are random where only speed is
measured, and never zero: a GPU is faster on zeros. A dry run does all of it with toy sizes, on the CPU.
"""

import copy
import dataclasses
import gc
import gzip
import json
import multiprocessing
import os
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
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn.attention import SDPBackend, sdpa_kernel

import sample
import train
from config import Config, UserError, first_line
from data import batches, crops, fashion
from data.batches import BatchRandom, ImageRandom
from extras import causal
from run import checkpoint, graphs, load, log, memory, paper, pictures
from run.ranks import Ranks, best_device
from run.solver import solver_settings
from schedule import Schedule, loss
from scores.classifier import load_classifier
from studies import compare, timing

NO_GPU = 3                                                  # exit code of a section


@dataclass
class Job:
    """A section at work: where its lines go, whether sizes are toys, and when it ends (time.monotonic).

    folder: for what nobody reads later; data: where Fashion-MNIST is.
    """

    section: str
    out: Path
    folder: Path
    dry: bool
    data: str
    ends: float

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else best_device("cuda")

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def say(self, figure: str, **numbers) -> None:
        """One figure: a line of gpu.jsonl, and of the terminal."""
        log.record(self.out / "gpu.jsonl", None, self.device,
                   {"what": "gpu", "dry_run": self.dry, "section": self.section, "figure": figure, **numbers})
        print(f"{self.section:10s} {figure:16s} {json.dumps(numbers)[:400]}", flush=True)

    def seconds(self, work: Callable, rounds: int = 5) -> float:
        """Median of one call, after one that does not count."""
        return timing.in_turn({"": work}, 1 if self.dry else rounds, self.device)[""]

    def preset(self, name: str) -> Config:
        cfg = Config(**paper.PRESETS[name].settings)
        return dataclasses.replace(cfg, size="32,1,2,2", res=64, batch=6, num_samples=8) if self.dry else cfg


def random_network(cfg: Config, device: torch.device) -> torch.nn.Module:
    """The network of a preset, all weights random; torch's own generator may refuse after a recording that fails."""
    generator = torch.Generator(device).manual_seed(0)
    model = load.build_model(cfg, memory.paper_facts(cfg), device="meta").to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    model.compute_positions()                               # of numbers now, and not of shapes alone
    return model.to(device)


def random_cache(folder: Path, cfg: Config, count: int = 1024) -> None:
    """A latent cache of noise in the real shapes."""
    facts, generator = memory.paper_facts(cfg), np.random.default_rng(0)
    channels, side, classes = facts["channels"], facts["side"], facts["classes"]
    folder.mkdir()
    moments = generator.standard_normal((count, 2, 2 * channels, side, side), np.float32)
    moments.astype(np.float16).tofile(folder / "moments.f16")
    np.save(folder / "labels.npy", generator.integers(0, max(1, len(classes)), count))
    vae = {"name": cfg.vae, "sha256": "", "shift": [0.0] * channels, "scale": [1.0] * channels}
    (folder / "header.json").write_text(json.dumps({
        **facts, "complete": True, "dataset": cfg.dataset, "split": "train", "res": cfg.res, "count": count,
        "fingerprint": "random", "vae": vae}))


def training_pass(model: torch.nn.Module, cfg: Config, stage: int, batch: int, precision: str) -> Callable:
    """Loss and gradients of one stage, of the same random images at each call; returns the loss."""
    device = next(model.parameters()).device
    objective = train.Objective(model, loss, Schedule(cfg.starts, stages="batch"), precision)
    x1 = BatchRandom(1, stage, batch, device=device).randn(model.in_channels, model.resolution, model.resolution)
    y = None if model.condition is None else model.condition.draw(batch).to(device)

    def work():
        model.zero_grad(set_to_none=True)
        rng = BatchRandom(0, stage, batch, device=device)
        rng.choice = lambda shares: stage                   # what the schedule draws for a batch
        value, _ = objective(x1, y, rng)
        value.backward()
        return value.detach()

    return work


# ---------------------------------------------------------------------------------------------------------------------
# the machine, attention, gradients


def machine(job: Job) -> None:
    """Versions, and the rates that everything else is a share of."""
    device, backends = job.device, torch.backends
    job.say("versions", cuda=torch.version.cuda, cudnn=backends.cudnn.version(), cores=os.cpu_count(),
            flash=backends.cuda.flash_sdp_enabled(), cudnn_attention=backends.cuda.cudnn_sdp_enabled())
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


# Queries and keys of our bands, with condition tokens and without; cuDNN's backward has given NaN at such lengths.
PAIRS = ((65, 65), (66, 66), (256, 321), (256, 322), (1024, 1345), (257, 257), (1024, 1281), (4096, 5377), (64, 64),
         (256, 320), (1024, 1344))
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION}


def attend(inputs: list, backend: SDPBackend, upstream: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of one attention; upstream: the gradient of its output. Nothing else takes time."""
    with sdpa_kernel([backend]):
        out = F.scaled_dot_product_attention(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def attention(job: Job) -> None:
    """Each backend at our lengths, with gradients, against float32 products; cuDNN last: its faults may end this."""
    for name, (queries, keys) in product(BACKENDS, ((4, 5),) if job.dry else PAIRS):
        tensors = [torch.randn(2, 16, n, 64, device=job.device) for n in (queries, keys, keys, queries)]
        rounded = [x.to(torch.bfloat16) for x in tensors]                           # q, k, v, gradient of the output
        timed = [x.repeat(1 if job.dry else max(2, 16384 // queries), 1, 1, 1) for x in rounded]
        for x in (*tensors[:3], *rounded[:3], *timed[:3]):
            x.requires_grad_()
        exact = attend(tensors[:3], SDPBackend.MATH, tensors[3])
        chosen = SDPBackend(torch._fused_sdp_choice(*(x[:1] for x in timed[:3]))).name
        try:
            results = attend(rounded[:3], BACKENDS[name], rounded[3])
            errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)]
            taken = job.seconds(partial(attend, timed[:3], BACKENDS[name], timed[3]))
            figures = {"milliseconds": 1000 * taken, "batch": len(timed[0]), "errors": errors,
                       "finite": all(bool(x.isfinite().all()) for x in results)}
        except RuntimeError as problem:
            figures = {"unavailable": first_line(problem)}
        job.say("attention", queries=queries, keys=keys, backend=name, chosen=chosen, **figures)


def tests(job: Job) -> None:
    """The tests on this GPU; DIR/tests.txt has what they print, also when they are cut off."""
    files = [f"tests/test_{name}.py" for name in ("model", "train", "ranks", "gpu", "graphs")]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "gpu or graphs", *files, *["--collect-only"] * job.dry]
    with open(job.out / "tests.txt", "w") as file:
        subprocess.run(command, cwd=compare.ROOT, stdout=file, stderr=file, check=False)
    job.say("tests", result=next(iter((job.out / "tests.txt").read_text().splitlines()[-1:]), ""))


def gradients(job: Job) -> None:
    """Fused AdamW against the plain one; then loss and gradients of each stage against full float32."""
    cfg = job.preset("celebahq-256")
    model, batch = random_network(cfg, job.device), 4 if job.dry else 32
    results, exact = {}, {}
    for fused in (False, True):                             # first: compiling takes the longest
        weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
        for weight in weights:
            weight.grad = weight.detach().clone()           # any numbers
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=fused)
        optimizer.step()
        results[fused] = torch.cat([w.detach().flatten() for w in weights])
        job.say("AdamW", fused=fused, milliseconds=1000 * job.seconds(optimizer.step),
                largest_difference=float((results[fused] - results[False]).abs().max()))
    del weights, optimizer, results
    for mode, precision, matmul in (("float32", "float32", "highest"), ("TF32", "float32", "high"),
                                    ("bfloat16", "bfloat16", "high"), ("compiled", "bfloat16", "high")):
        torch.set_float32_matmul_precision(matmul)
        if mode == "compiled":
            load.compile_blocks(model)
        for stage in range(cfg.num_scales):
            value = float(training_pass(model, cfg, stage, batch, precision)())
            flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            reference = exact.setdefault(stage, (value, flat))
            job.say("gradients", stage=stage, mode=mode, loss=value, loss_difference=value / reference[0] - 1,
                    gradient_error=float((flat - reference[1]).norm() / reference[1].norm()),
                    finite=bool(flat.isfinite().all()))


# ---------------------------------------------------------------------------------------------------------------------
# training speed, by stage


def end_of_step(model: torch.nn.Module, ema: torch.nn.Module | None, optimizer: torch.optim.Optimizer,
                cfg: Config) -> None:
    """Clipping, AdamW and the moving average, as in train.loop."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    Ranks(0, 1, norm.device).step(optimizer, norm)
    if ema is not None:
        train.update_ema(ema, model, cfg.ema, 10)


def time_stages(job: Job, name: str, model: torch.nn.Module, mode: str, sizes: list[int], end: float) -> list[int]:
    """Seconds, share of the peak and memory of each stage, with a micro-batch that fits: these are returned; then
    images per second of whole steps. end: seconds that a step needs for its end."""
    cfg, peak, cuda = job.preset(name), memory.peak_flops(job.device), job.device.type == "cuda"
    flops = memory.forward_flops(memory.meta_model(cfg, memory.paper_facts(cfg)))
    state, taken, used, sizes = memory.memory_bytes(model, cfg, 0), [], [], list(sizes)
    while len(taken) < cfg.num_scales:
        stage, micro = len(taken), sizes[len(taken)]
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            work = training_pass(model, cfg, stage, micro, cfg.precision)
            first = timing.seconds(work, job.device)        # it may compile
            taken.append(job.seconds(work, 3))
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            job.say("out of memory", preset=name, mode=mode, stage=stage, micro_batch=micro)
            sizes[stage] = max(n for n in range(1, micro) if cfg.batch % n == 0)
            continue
        used.append(memory.peak_memory(job.device))
        plan = state + micro * memory.activation_bytes(model, stage, cfg.precision, mode == "compiled")
        job.say("stage", preset=name, mode=mode, stage=stage, micro_batch=micro, milliseconds=1000 * taken[-1],
                mfu=3 * micro * flops[stage] / taken[-1] / peak if peak else None, seconds_first=first,
                memory_gb=used[-1], plan_gb=plan / 1e9)
    step = cfg.batch * memory.mean_of_stages(cfg, [t / n for t, n in zip(taken, sizes, strict=True)]) + end
    job.say("training", preset=name, mode=mode, micro_batches=sizes, images_per_second=cfg.batch / step,
            memory_gb=max(used),
            mfu=3 * cfg.batch * memory.mean_of_stages(cfg, flops) / step / peak if peak else None)
    return sizes


def profile(job: Job, name: str, model: torch.nn.Module, micro: int) -> None:
    """The kernels of one pass of the finest stage, longest first."""
    cfg = job.preset(name)
    work = training_pass(model, cfg, cfg.num_scales - 1, micro, cfg.precision)
    with torch.profiler.profile() as profiler:
        timing.seconds(work, job.device)
    spent = attrgetter("self_device_time_total" if job.device.type == "cuda" else "self_cpu_time_total")
    kernels = [e for e in profiler.key_averages() if e.device_type.name == job.device.type.upper()      # no operators,
               and not getattr(e, "is_user_annotation", False)]                     # and nothing counted twice
    kernels = sorted(kernels, key=spent, reverse=True)
    job.say("profile", preset=name, milliseconds=sum(map(spent, kernels)) / 1000,
            kernels=[[e.key[:80], spent(e) / 1000, e.count] for e in kernels[:25]])


def stages(job: Job, name: str) -> None:
    """A preset: the end of a step, the stages eager and compiled beside the optimizer's state, and the kernels."""
    torch.set_float32_matmul_precision("high")
    cfg, free = job.preset(name), memory.free_memory(job.device)
    model = random_network(cfg, job.device)
    ema = copy.deepcopy(model).requires_grad_(False) if cfg.ema else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    end = job.seconds(partial(end_of_step, model, ema, optimizer, cfg))
    job.say("end of a step", preset=name, milliseconds=1000 * end)
    sizes = [memory.fit_micro_batch(model, cfg, cfg.batch, free, stage=stage) for stage in range(cfg.num_scales)]
    time_stages(job, name, model, "eager", sizes, end)      # perhaps with smaller ones, if these are too large
    load.compile_blocks(model)
    profile(job, name, model, time_stages(job, name, model, "compiled", sizes, end)[-1])


# ---------------------------------------------------------------------------------------------------------------------
# sampling speed


def time_sampling(job: Job, name: str, modes: tuple, batch: int = 1) -> None:
    """Seconds for an image with as many Euler steps as the paper reports NFE, without decoding, and how far its latents
    are from the first mode's, or from float32. The modes change the network in place: each goes further."""
    gc.collect()                                            # the network before: recorded, it refers to itself
    cfg, steps = job.preset(name), 3 if job.dry else paper.PRESETS[name].paper["nfe"]
    model = random_network(cfg, job.device).eval().requires_grad_(False)
    run, plain = load.Run(cfg, model, memory.paper_facts(cfg), job.out, 0, "random"), model.forward
    load.full_float32()

    def draw(precision):
        rng, guided = ImageRandom(0, range(batch), job.device), sample.Guided(model, precision=precision)
        return run.system.sample(guided, rng, None, run.schedule, run.shape, sample.solve, solver="euler", steps=steps)

    exact = None
    if "compiled" in modes[0]:
        exact = draw("float32")
        load.compile_blocks(model)
    for mode in modes:
        precision, began = mode.split()[0], time.monotonic()
        if "weights" in mode:
            model.forward = plain
            graphs.speed_up(run, {"precision": precision}, "graphs" in mode)
        x1, opening = draw(precision), time.monotonic() - began
        exact = x1 if exact is None else exact
        job.say("sampling", preset=name, mode=mode, batch=batch, nfe=steps, seconds_first=opening,
                seconds_per_image=job.seconds(partial(draw, precision), 1 if mode == "float32" else 3) / batch,
                difference=float((x1 - exact).norm() / exact.norm()), captures=getattr(model.forward, "captures", 0))


def sampling(job: Job) -> None:
    """Batch 1: float32, autocast, weights converted once, graphs; then all compiled."""
    for modes in (("float32", "bfloat16", "bfloat16 weights", "bfloat16 weights, graphs"),
                  ("bfloat16 weights, compiled", "bfloat16 weights, compiled, graphs")):
        for name in ("celebahq-256", "celebahq-512", "celebahq-1024"):
            time_sampling(job, name, modes)


# ---------------------------------------------------------------------------------------------------------------------
# real training


def train_here(job: Job, cfg: Config, spare: float = 2.0) -> tuple[train.Job, list[dict]]:
    """The training loop, without checkpoints, until `spare` seconds before the section ends: its state, its lines."""
    train.save = lambda state: None                         # a process of its own: nobody else sees it
    prepare = checkpoint.prepare
    checkpoint.prepare = lambda cfg, fresh, room, finished: prepare(cfg, fresh, 0, finished)        # nor the disk
    cfg = dataclasses.replace(cfg, out=str(job.folder / "run"), latents=str(job.folder / "cache"))
    if cfg.space == "latent":
        random_cache(job.folder / "cache", cfg)
    state = train.setup(cfg, Ranks(0, 1, job.device))
    train.resume(state, fresh=True)
    train.loop(state, Namespace(asked=False), time.perf_counter() + job.left - spare)
    return state, checkpoint.read_lines([Path(cfg.out) / "metrics.jsonl"])


def photographs(job: Job) -> dict:
    """The settings of a folder of 64 x 64 crops of scikit-learn's two photographs, each a class; written here."""
    for number, photo in enumerate(load_sample_images().images):
        folder, random = job.folder / "photographs" / str(number), np.random.default_rng(number)
        folder.mkdir(parents=True)
        for i, crop in enumerate(crops.crops_of(Image.fromarray(photo), 8 if job.dry else 1024, 64, random)):
            crop.save(folder / f"{i:04d}.png")
    return {"dataset": "folder", "res": 64, "data": str(job.folder / "photographs")}


def curves(job: Job) -> None:
    """The same runs in float32 (products in TF32) and in bfloat16: their losses must lie on each other."""
    toy = {"size": "32,1,2,4", "steps": 2, "log_every": 1} if job.dry else {}
    for data, precision in product(({"steps": 400}, {**photographs(job), "steps": 200}), ("float32", "bfloat16")):
        cfg = paper.resolve({**data, "precision": precision, "log_every": 20, **toy})
        _, lines = train_here(job, cfg)
        job.say("curve", dataset=cfg.dataset, precision=precision, steps=lines[-1]["step"],
                loss=[line["loss"] for line in lines], grad_norm=[line["grad_norm"] for line in lines],
                images_per_second=lines[-1]["images_per_second"], skipped=sum(line["skipped"] for line in lines))


def spare(job: Job) -> None:
    """What the time is left for: the real loop, and larger batches of samples."""
    cfg = dataclasses.replace(job.preset("celebahq-256"), steps=2 if job.dry else 60, log_every=1 if job.dry else 10)
    _, lines = train_here(job, cfg)
    later = lines[len(lines) // 2 :]
    means = {key: statistics.harmonic_mean([line[key] for line in later]) for key in ("images_per_second", "mfu")
             if later[-1][key]}                             # of few steps, so images/s depends on the stages drawn
    job.say("loop", preset="celebahq-256", memory_gb=later[-1]["memory_gb"], data_wait=later[-1]["data_wait"],
            alloc_retries=torch.cuda.memory_stats().get("num_alloc_retries"), **means)      # parts of a stage its size
    for batch in (2,) if job.dry else (8, 64):
        time_sampling(job, "celebahq-256", ("bfloat16 weights", "bfloat16 weights, graphs"), batch)


# ---------------------------------------------------------------------------------------------------------------------
# the second and the third command


FIRST = ("LapFlow", "LFM", "Pyramidal Flow")                # before the others


def random_clothes(folder: Path, count: int = 320) -> str:
    """The files of Fashion-MNIST, of noise; returns the folder."""
    folder.mkdir()
    pixels, labels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8), np.arange(count) % 10
    for prefix, (kind, array) in product(fashion.PREFIX.values(), (("images-idx3", pixels), ("labels-idx1", labels))):
        header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
        with gzip.open(folder / f"{prefix}-{kind}-ubyte.gz", "wb") as file:
            file.write(header + array.astype(np.uint8).tobytes())
    return str(folder)


def plan_quality(job: Job) -> tuple[Namespace, list]:
    """The arguments of studies.compare, and its runs; DFM's coarsest patches would be half a pixel."""
    args = Namespace(dataset="fashion", data=job.data, res=None, ablation=None, seeds=3, steps=3000, jobs=3,
                     only=[name for name in compare.IMAGES if name != "DFM"], size="128,6,4,2", out=str(job.folder),
                     record=job.out / "quality.jsonl", device=None)
    changes = {"lr": 2e-3, "batch": 256, "precision": "bfloat16", "eval_every": 0}
    if job.dry:                                             # its lines are not kept
        vars(args).update(data=random_clothes(job.folder / "clothes"), seeds=1, steps=2, size="32,1,2,4", device="cpu",
                          only=["LapFlow", "LFM", "LapFlow, finer noise x 0.85"], record=job.folder / "quality.jsonl")
        changes = {"num_samples": 150, "solver": "euler", "solver_steps": 3, "warmup": 0, "eval_every": 0}
    return args, [(name, dataclasses.replace(cfg, **changes)) for name, cfg in compare.plan_runs(args)]


def quality(job: Job) -> None:
    """The systems on Fashion-MNIST, seed by seed, FIRST before the others: a line of quality.jsonl for each run, the
    table and the pictures of the runs so far."""
    args, planned = plan_quality(job)
    log.check_record(args.record)
    load_classifier(batches.load(planned[0][1]), batches.to_images, job.device)     # before several runs ask for it
    args.out, done = str(job.out), []                       # from here on: of the table and the pictures
    for first, seed in product((True, False), range(args.seeds)):
        part = [(name, cfg) for name, cfg in planned if (name in FIRST) == first and cfg.seed == seed]
        compare.run_all(part, args)
        done += part
        compare.report(done, args)
        job.say("quality", runs=[[name, cfg.seed] for name, cfg in done])


def colour(job: Job) -> None:
    """Trains LapFlow on 64 x 64 crops of photographs for as long as there is time, then draws samples and previews."""
    given = {**photographs(job), "size": "384,8,6,4", "batch": 64, "num_samples": 64, "lr": 1e-3, "steps": 60,
             "log_every": 20, "precision": "bfloat16", "compile": True}
    if job.dry:
        given |= {"size": "32,1,2,4", "batch": 6, "num_samples": 6, "steps": 2, "log_every": 1, "solver": "euler",
                  "solver_steps": 3}
    cfg, began = paper.resolve(given), time.monotonic()
    rate = train_here(job, cfg)[1][-1]["images_per_second"] / cfg.batch
    room = job.left - 60 - 0.5 * (time.monotonic() - began)                     # it compiles once more
    cfg = cfg if job.dry else dataclasses.replace(cfg, steps=max(100, int(0.9 * room * rate)))
    job.say("speed", steps_per_second=rate, steps=cfg.steps)
    state, lines = train_here(job, cfg, spare=3 if job.dry else 40)
    run, scores = train.trained(state), train.finish(state)
    job.say("colour", steps=state.step, loss=lines[-1]["loss"],
            scores={key: value for key, value in scores.items() if isinstance(value, float)})
    for name in ("samples.png", "trajectory.png", "loss.png"):
        shutil.copy(run.folder / name, job.out / name)
    rows, count = {}, 2 if job.dry else 8
    for bands in range(1, cfg.num_scales + 1):
        x1, _ = causal.preview(run, range(count), run.condition.draw(count), bands=bands, **solver_settings(cfg))
        rows[f"{bands} of {cfg.num_scales} bands"] = list(run.decode(F.interpolate(x1, cfg.res)))
    pictures.draw_images(job.out / "previews.png", list(rows.values()), [], [], list(rows))


# ---------------------------------------------------------------------------------------------------------------------
# the sections as processes

COMMANDS = {                                                # sections and their limits in seconds
    "gpu": {"machine": (machine, 20), "attention": (attention, 30), "tests": (tests, 40), "gradients": (gradients, 50),
            "celebahq-256": (partial(stages, name="celebahq-256"), 60), "sampling": (sampling, 100),
            **{name: (partial(stages, name=name), limit) for name, limit in (
                ("celebahq-1024", 60), ("celebahq-512", 50), ("imagenet-256-B", 35), ("imagenet-256-XL", 45))},
            "curves": (curves, 70), "spare": (spare, 10**6)},
    "gpu-quality": {"quality": (quality, 10**6)},
    "gpu-colour": {"colour": (colour, 10**6)}}


def work_in_child(work: Callable, job: Job) -> None:
    """A section: figures go to the terminal, all else to log.txt. A failure is a line, too."""
    os.setsid()                                             # compilers that it starts end with it
    sys.stderr = open(job.out / "log.txt", "a", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)                         # of the libraries, and of what the section starts
    if job.dry:
        torch.set_num_threads(1)                            # threads do not survive a fork
        torch.compiler.set_stance("force_eager")
    elif not torch.cuda.is_available():
        sys.exit(NO_GPU)
    try:
        work(job)
    except Exception as problem:
        traceback.print_exc()
        job.say("failed", error=f"{type(problem).__name__}: {first_line(problem)}")
        sys.exit(1)


def measure(command: str, out: Path, budget: float, dry: bool, data: str = "") -> list[dict]:
    """Runs the sections of a command; returns how each ended. The parent never touches the GPU: children are forks."""
    if not budget > 0:
        raise UserError(f"--budget must be above 0 seconds, not {budget}")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch._dynamo  # noqa: F401                      (a second, here and not in each child)

    log.check_record(out / "gpu.jsonl")
    log.commit()                                            # git is asked once, here
    ends, results = time.monotonic() + budget, []
    for name, (work, limit) in COMMANDS[command].items():
        began = time.monotonic()
        limit, ended = min(limit, ends - began), "no time left"
        if limit >= 1:
            with tempfile.TemporaryDirectory() as folder:
                child = multiprocessing.get_context("fork").Process(
                    target=work_in_child, args=(work, Job(name, out, Path(folder), dry, data, began + limit)))
                child.start()
                try:
                    child.join(limit)
                    ended = {None: "cut off", 0: "finished"}.get(child.exitcode, "failed")
                finally:                                    # also after Ctrl-C
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
