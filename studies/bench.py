"""Speed, measured on this machine. Every line of a table is a run of the code that users run.

    python -m studies.bench count                                  parameters, tokens, FLOPs: every preset, every system
    python -m studies.bench train --preset celebahq-256 --record results/bench.jsonl
    torchrun --nproc_per_node=8 -m studies.bench train --preset celebahq-1024 --steps 200
    python -m studies.bench sample --preset celebahq-256           or a trained run, by its directory
    python -m studies.bench compare                                against diffusers' DiT and another LapFlow
    python -m studies.bench fid                                    Frechet distance of FID-50k, without its network

train: the training loop of a preset on random latents of its real shapes, then forward and backward of each stage.
images_per_second is the batch over the mean of the stages' seconds, without data and optimizer. When a batch trains one
stage, images_per_second_loop is up to 20% off either way, by the stages drawn. TMPDIR must hold a checkpoint.

sample: batches of 1 and 64 images: seconds and NFE with and without the autoencoder's decoder, and for a preview. A
preset has random weights, whose NFE mean nothing: it takes as many Euler steps as the paper reports NFE (or 80), and an
autoencoder of Stable Diffusion's shape. Without diffusers, or with --latents-only, nothing is decoded.

compare: forward and backward (then forward alone, as in sampling; no optimizer) of a MoT-DiT of width 384 and depth 6,
mean over its stages, against one pass of diffusers' DiTTransformer2DModel of the same width over the whole latent, and
against the LapFlowDiT of the package rectified-flow-pytorch (pip install --no-deps rectified-flow-pytorch einops einx).
In turn; ratios of medians. `limit` is the ratio of our FLOPs to those of our own single scale.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import fid
import sample
import train
from config import Config, UserError
from data import latents
from data.conditions import choose
from extras import causal
from model import MoTDiT
from run import checkpoint, load, log, memory, paper
from run.ranks import Ranks, StopSignals, best_device
from run.solver import solver_settings
from scores.reference import Statistics
from studies import plan
from studies.output import markdown


def bench_count() -> list[dict]:
    """Every preset, and DFM, which has none. share: of the FLOPs of LFM, the same trunk at one scale; attention: see
    plan.attention_share."""
    presets, rows = plan.rows(), []
    presets["celebahq-256-dfm"] = dataclasses.replace(presets["celebahq-256"], method="dfm", starts=())
    for name, cfg in presets.items():
        ours = plan.cost(cfg)
        whole = plan.cost(dataclasses.replace(cfg, method="lfm", num_scales=1, starts=(), mask="causal", path="linear"))
        attention = plan.attention_share(cfg.num_scales, cfg.mask) if cfg.method == "lapflow" else None
        rows.append({"preset": name, "method": cfg.method, **dataclasses.asdict(ours),
                     "share": ours.flops_mean / whole.flops_mean, "attention": attention})
    print(markdown(
        ["preset", "method", "parameters, M", "tokens by stage", "GFLOPs by stage", "mean", "of LFM", "attention"],
        [[row["preset"], row["method"], f"{row['parameters'] / 1e6:.1f}", ", ".join(map(str, row["tokens"])),
          ", ".join(f"{n / 1e9:.1f}" for n in row["flops"]), f"{row['flops_mean'] / 1e9:.1f}", f"{row['share']:.3f}",
          f"{row['attention']:.3f}" if row["attention"] else ""] for row in rows]))
    return rows


def seconds(work: Callable, device: torch.device) -> float:
    """Of one call, the queue of this GPU included."""
    wait = {"cuda": lambda: torch.cuda.synchronize(device), "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def in_turn(works: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Medians of the seconds of each: every round calls all of them, after a first one that does not count."""
    times = {name: [] for name in works}
    for number in tqdm(range(rounds + 1), desc="measuring", leave=False):
        for name, work in works.items():
            taken = seconds(work, device)
            if number:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def passes(model: torch.nn.Module, inputs: list[tuple], y: torch.Tensor | None, precision: str,
           backward: bool) -> dict[str, Callable]:
    """A pass of each stage: forward alone, or with backward. inputs: of each stage, from model.stage_inputs."""
    def run(bands, t):
        with torch.set_grad_enabled(backward), torch.autocast(t.device.type, torch.bfloat16,
                                                              enabled=precision == "bfloat16"):
            out = model(list(bands), t, y)
        if backward:
            sum(v.float().square().mean() for v in out).backward()
            model.zero_grad(set_to_none=True)

    return {f"stage {stage}": lambda given=given: run(*given) for stage, given in enumerate(inputs)}


# ---------------------------------------------------------------------------------------------------------------------
# train


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


def bench_train(cfg: Config, ranks: Ranks, rounds: int) -> dict:
    """Trains cfg.steps steps, then times the stages. Images per second are of all processes."""
    job = train.setup(cfg, ranks)
    train.resume(job, fresh=True)
    with StopSignals() as stop:
        train.loop(job, stop, math.inf)
    lines = checkpoint.read_lines([Path(cfg.out) / "metrics.jsonl"] if ranks.first else [])
    later = {key: [line[key] for line in lines[len(lines) // 2 :] if line[key] is not None]     # all is compiled, warm
             for key in ("images_per_second", "mfu", "memory_gb", "data_wait")}
    micro_batch = job.parts[0].stop - job.parts[0].start
    inputs = [job.model.stage_inputs(stage, micro_batch, ranks.device) for stage in range(cfg.num_scales)]
    y = None if job.model.condition is None else job.model.condition.draw(micro_batch).to(ranks.device)
    taken = in_turn(passes(job.model, inputs, y, cfg.precision, backward=True), rounds, ranks.device)
    rate = ranks.world * micro_batch / memory.mean_of_stages(cfg, list(taken.values()))
    result = {"row": paper.find_row(cfg), "processes": ranks.world, "batch": cfg.batch, "micro_batch": micro_batch,
              "parameters": memory.parameters(job.model), "images_per_second": rate,
              "images_per_second_loop": statistics.harmonic_mean(later.pop("images_per_second") or [math.nan]),
              **{key: statistics.median(values) if values else None for key, values in later.items()},
              "seconds_first_line": cfg.log_every * cfg.batch / lines[0]["images_per_second"] if lines else None}
    peak, flops = memory.peak_flops(ranks.device), memory.forward_flops(memory.meta_model(cfg, job.facts))
    for (name, value), count in zip(taken.items(), flops, strict=True):
        result[f"{name}, ms"] = 1000 * value
        result[f"{name}, mfu"] = 3 * micro_batch * count / value / peak if peak else None
    return result


def measure_training(args: argparse.Namespace, given: dict) -> None:
    given = {"steps": 200, "log_every": 10, "save_every": 10**9, "keep": 1, "sample_every": 0, "logger": "", **given}
    with tempfile.TemporaryDirectory() as folder, Ranks.start(args.device) as ranks:
        cfg = paper.resolve({**given, "out": f"{folder}/run", "latents": f"{folder}/cache"})
        if cfg.space == "latent":
            random_cache(Path(cfg.latents), cfg)
        result = bench_train(cfg, ranks, args.rounds)
        if ranks.first:
            finish(args, result, cfg, ranks.device)


# ---------------------------------------------------------------------------------------------------------------------
# sample


def random_run(cfg: Config, folder: Path, device: torch.device, decode: bool) -> load.Run:
    """A run of a preset that was never trained; decode: with an autoencoder of Stable Diffusion's shape."""
    facts = {**memory.paper_facts(cfg), "fingerprint": "random", "latent": None}
    torch.manual_seed(0)
    model = load.build_model(cfg, facts, device=device).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if decode and cfg.space == "latent":
        from diffusers import AutoencoderKL

        AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                      block_out_channels=(128, 256, 512, 512), layers_per_block=2).save_pretrained(folder / "vae")
        cfg = dataclasses.replace(cfg, vae=str(folder / "vae"))
        facts["latent"] = latents.Autoencoder(cfg.vae, "cpu").facts
    return load.Run(cfg, model.eval().requires_grad_(False), facts, folder, 0, "random")


def bench_sample(run: load.Run, settings: dict, rounds: int, sizes: tuple = (1, 64)) -> dict:
    """Seconds for an image, by batch: without decoding, with it, and of a preview."""
    result, reports = {"weights": run.weights, **settings}, []

    def image(batch, y):
        reports.append(sample.generate(run, batch, y, batch=batch, progress=False, **settings)[1])

    for batch in sizes:
        y = choose(run.condition, batch)
        works = {"image": partial(image, batch, y),
                 "decoding": partial(run.decode, torch.randn(batch, *run.shape, device=run.device))}
        if run.cfg.method == "lapflow" and run.cfg.num_scales > 1:
            works["preview"] = partial(causal.preview, run, range(batch), y, **settings)
        taken = in_turn(works, rounds, run.device)
        alone = taken["image"] - taken["decoding"]
        decoded = run.cfg.space == "pixel" or run.facts["latent"] is not None
        result[f"batch {batch}"] = {
            "seconds_per_image": alone / batch, "nfe": reports[-1]["nfe"],
            "seconds_with_decoding": taken["image"] / batch if decoded else None,
            "preview_speed_up": alone / taken["preview"] if "preview" in taken else None}
    return {**result, "memory_gb": memory.peak_memory(run.device)}


def measure_sampling(args: argparse.Namespace, given: dict) -> None:
    if args.run and given:
        raise UserError("a trained run has its own settings: leave them out, or the directory")
    device = best_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        run = load.load_run(args.run, device=args.device) if args.run else None
        cfg = run.cfg if run else paper.resolve(given)
        row, settings = paper.find_row(cfg), solver_settings(cfg)
        decode = not args.latents_only and (cfg.space == "pixel" or importlib.util.find_spec("diffusers") is not None)
        if run is None:
            if cfg.dataset not in memory.KNOWN:
                raise UserError("studies.bench sample needs a --preset of the paper, or the directory of a trained run")
            run = random_run(cfg, Path(folder), device, decode)
            nfe = paper.PRESETS[row].paper.get("nfe", 80) if row else 80
            settings = {**solver_settings(dataclasses.replace(cfg, solver="euler", solver_steps=nfe)),
                        "precision": cfg.precision}         # of training: sample.py takes float32 unless told otherwise
        if cfg.compile and device.type == "cuda":
            load.compile_blocks(run.model)
        if not decode:
            run.facts = {**run.facts, "latent": None}
        finish(args, {"row": row, **bench_sample(run, settings, args.rounds)}, cfg, device)


# ---------------------------------------------------------------------------------------------------------------------
# compare

WIDTH, DEPTH, HEADS, CLASSES = 384, 6, 6, 1000
SCALES = {32: 2, 64: 3, 128: 3}                             # K by side of the latents


def ours(side: int, num_scales: int) -> MoTDiT:
    return MoTDiT((WIDTH, DEPTH, HEADS, 2), 4, side, num_scales, CLASSES)


def diffusers_dit(side: int) -> torch.nn.Module:
    """The whole latent through one DiT; called like a MoTDiT."""
    from diffusers import DiTTransformer2DModel

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dit = DiTTransformer2DModel(num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS,
                                             in_channels=4, out_channels=4, num_layers=DEPTH, sample_size=side,
                                             patch_size=2, num_embeds_ada_norm=CLASSES)

        def forward(self, bands, t, y):
            return [self.dit(bands[-1], timestep=(1000 * t).long(), class_labels=y).sample]

    return Whole()


def other_lapflow(side: int, num_scales: int) -> torch.nn.Module | None:
    """LapFlowDiT of rectified-flow-pytorch, from its own file: its package needs more than this file does. None when it
    is not installed."""
    package = importlib.util.find_spec("rectified_flow_pytorch")
    if package is None:
        print("rectified-flow-pytorch is not installed: compared with diffusers alone")
        return None
    spec = importlib.util.spec_from_file_location("lap_flow", Path(package.origin).parent / "lap_flow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LapFlowDiT(side, 2, WIDTH, DEPTH, HEADS, 4 * WIDTH, channels=4, dim_head=WIDTH // HEADS,
                             num_scales=num_scales, accept_cond=True, cond_as_labels=True, num_classes=CLASSES)


def bench_compare(side: int, rounds: int, device: torch.device, precision: str) -> dict:
    """Ratios of medians, at one size of the latents; every model on random weights."""
    num_scales = SCALES.get(side, 3)
    models = {"ours": ours(side, num_scales), "diffusers DiT": diffusers_dit(side)}
    if (lapflow := other_lapflow(side, num_scales)) is not None:
        models["rectified-flow-pytorch"] = lapflow
    packages = ["diffusers"] + ["rectified-flow-pytorch"] * (lapflow is not None)
    flops, (flops_whole,) = (memory.forward_flops(ours(side, scales).to("meta")) for scales in (num_scales, 1))
    batch = max(1, (65536 if device.type == "cuda" else 2048) // models["ours"].num_tokens[-1])
    inputs = [models["ours"].stage_inputs(stage, batch, device) for stage in range(num_scales)]
    y = torch.randint(CLASSES, (batch,), device=device)
    result = {"side": side, "num_scales": num_scales, "batch": batch, "precision": precision,
              "packages": {name: importlib.metadata.version(name) for name in packages},
              "limit": statistics.mean(flops) / flops_whole,
              "parameters": {name: memory.parameters(model) for name, model in models.items()}}
    for model in models.values():
        model.to(device)
        for parameter in model.parameters():                # the untrained models return zeros
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
    for what, backward in (("forward and backward", True), ("forward", False)):
        works = {}
        for name, model in models.items():
            stages = passes(model, inputs, y, precision, backward)
            works.update({f"{name}, {stage}": work for stage, work in stages.items()
                          if name != "diffusers DiT" or stage == f"stage {num_scales - 1}"})
        taken = in_turn(works, rounds, device)
        means = {name: statistics.mean(value for key, value in taken.items() if key.startswith(name + ","))
                 for name in models}
        result[what] = {"seconds": taken, "over": {name: means["ours"] / means[name]
                                                   for name in models if name != "ours"}}
        for name, ratio in result[what]["over"].items():
            limit = f" (FLOPs: {result['limit']:.3f})" if name == "diffusers DiT" else ""
            print(f"{side:4d} latents, K = {num_scales}  {what:20s} ours / {name:24s} {ratio:.3f}{limit}", flush=True)
    return result


def measure_comparison(args: argparse.Namespace) -> None:
    if not all(side.isdecimal() and int(side) % 8 == 0 and int(side) for side in args.sides.split(",")):
        raise UserError(f"--sides must be numbers divisible by 8, like 32,64; not {args.sides}")
    device = best_device(args.device)
    for side in map(int, args.sides.split(",")):
        finish(args, bench_compare(side, args.rounds, device, args.precision), None, device)


# ---------------------------------------------------------------------------------------------------------------------


def bench_fid(count: int = 50_000, dim: int = 2048, batch: int = 250) -> dict:
    """Seconds and peak memory of what fid.py does with the features of `count` images."""
    generator, sides, began = np.random.default_rng(0), [], time.perf_counter()
    for scale in (1.0, 1.1):
        total = Statistics({}, count)
        for _ in range(count // batch):
            drawing = time.perf_counter()
            features = scale * generator.standard_normal((batch, dim), np.float32)
            began += time.perf_counter() - drawing          # making them up does not count
            total.add(features)
        sides.append((total.mean, total.cov))
    added = time.perf_counter()
    distance = fid.frechet_distance(*sides[0], *sides[1])
    return {"images": count, "features": dim, "seconds_statistics_of_one": (added - began) / 2,
            "seconds_distance": time.perf_counter() - added, "frechet": distance,
            "memory_gb": memory.peak_memory(torch.device("cpu"))}


def finish(args: argparse.Namespace, result: dict, cfg: Config | None, device: torch.device) -> None:
    """Prints a result, unless that is done, and appends it to --record."""
    for name, value in {} if args.what in ("count", "compare") else result.items():
        print(f"{name:26s} {'unknown' if value is None else value}")
    if args.record:
        log.record(args.record, cfg, device, {"what": args.what, **result})


def main() -> None:
    parser = config.parser(__doc__, "python -m studies.bench WHAT [DIR] [--preset NAME] [--SETTING VALUE ...]")
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    flags = {what: commands.add_parser(what, usage=f"python -m studies.bench {what} [options]", allow_abbrev=False)
             for what in ("count", "train", "sample", "compare", "fid")}
    flags["sample"].add_argument("run", nargs="?", metavar="DIR", help="a trained run, in place of random weights")
    flags["sample"].add_argument("--latents-only", action="store_true", help="without the autoencoder")
    flags["compare"].add_argument("--sides", default="32,64,128", help="sizes of the latents [32,64,128]")
    flags["compare"].add_argument("--precision", choices=config.PRECISIONS, default="float32", help="[float32]")
    for what, command in flags.items():
        command.add_argument("--record", metavar="FILE", help="append the result and how it was made to a .jsonl file")
        if what in ("train", "sample", "compare"):
            command.add_argument("--rounds", type=int, default=7, help="repetitions that the medians are taken of [7]")
            command.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
        if what in ("train", "sample"):
            config.add_config_flags(command)
    args = parser.parse_args()
    if getattr(args, "rounds", 1) < 1:
        raise UserError("--rounds must be at least 1")
    if args.what != "train" and "RANK" in os.environ:
        raise UserError(f"studies.bench {args.what} is one process: start it with python")
    log.check_record(args.record)
    given = {name: value for name, value in vars(args).items() if name == "preset" or hasattr(Config, name)}
    if args.what == "count":
        finish(args, {"rows": bench_count()}, None, torch.device("cpu"))
    elif args.what == "fid":
        finish(args, bench_fid(), None, torch.device("cpu"))
    elif args.what == "compare":
        measure_comparison(args)
    else:
        {"train": measure_training, "sample": measure_sampling}[args.what](args, given)


if __name__ == "__main__":
    config.run(main)
