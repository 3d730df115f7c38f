"""Speed, measured. Every line of a table is a real run of the code that users run, on this machine.

    python bench.py count                                          parameters, tokens, FLOPs: every preset, every system
    python bench.py train --preset celebahq-256 --record results/bench.jsonl
    torchrun --nproc_per_node=8 bench.py train --preset celebahq-1024 --steps 200
    python bench.py sample --preset celebahq-256                   or a trained run, by its directory
    python bench.py compare                                        against diffusers' DiT and another LapFlow
    python bench.py fid

train: the preset's own training loop (its batch, precision, compilation, cache) on random latents of its real shapes;
from its metrics, over the second half, the medians of images per second and share of the peak, and the peak of memory.
Then forward and backward of each stage alone. The temporary directory (TMPDIR) must hold a checkpoint.

sample: batches of 1 and 64 images: seconds and NFE with and without the autoencoder's decoder, and for a preview. A
trained run takes its own solver and tolerance. A preset has random weights, whose NFE mean nothing: it takes as many
Euler steps as the paper reports NFE (or 80), and an autoencoder of Stable Diffusion's shape.

compare: forward and backward (then forward alone, as in sampling; no optimizer) of a MoT-DiT of width 384 and depth 6,
mean over its stages, against one pass of diffusers' DiTTransformer2DModel of the same width over the whole latent, and
against the LapFlowDiT of the package rectified-flow-pytorch (pip install --no-deps rectified-flow-pytorch einops einx).
In turn, on one machine; ratios of medians. `limit` is the ratio of our FLOPs to those of our own single scale. Of the
settings it takes --precision alone.

fid: statistics of 50,000 x 2,048 random features, as of FID-50k, added up in batches, and the Frechet distance of two
such sets; without the network, which is the larger part of an evaluation.
"""

import copy
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import config

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python bench.py WHAT [DIR] [--preset NAME] [--setting VALUE ...] [--record FILE]")
    PARSER.add_argument("what", choices=("count", "train", "sample", "compare", "fid"))
    config.add_config_flags(PARSER)
    PARSER.add_argument("run", nargs="?", metavar="DIR", help="sample: a trained run, in place of random weights")
    PARSER.add_argument("--rounds", type=int, default=7, help="repetitions that the medians are taken of [7]")
    PARSER.add_argument("--sides", default="32,64,128", help="compare: sizes of the latents [32,64,128]")
    PARSER.add_argument("--record", metavar="FILE", help="append the result and how it was made to a .jsonl file")
    PARSER.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    ARGUMENTS = vars(PARSER.parse_intermixed_args())

import numpy as np
import torch
from tqdm import tqdm

import causal
import data
import features
import fid
import latents
import plan
import runs
import sample
import train
from baselines import lfm
from config import Config, UserError
from model import MoTDiT
from ranks import Ranks, best_device
from schedule import noise_bands

# ---------------------------------------------------------------------------------------------------------------------
# count


def bench_count() -> list[dict]:
    """Every preset, and DFM, which has none. share: of the FLOPs of LFM, the same trunk at one scale. attention: query-
    key pairs in units of LFM's, under the mask and without one (the paper's appendix C: 0.608 for K = 3)."""
    rows = []
    settings = {name: preset.settings for name, preset in config.PRESETS.items() if preset.paper}
    settings["celebahq-256-dfm"] = {**settings["celebahq-256-lfm"], "method": "dfm", "num_scales": 2, "size": "L/2",
                                    "starts": (0.0, 0.9)}
    for name, given in settings.items():
        cfg = Config(**given)
        channels, classes, side, _ = plan.shapes(cfg)
        model = plan.meta_model(cfg, channels, classes, side)
        with torch.device("meta"):
            whole = lfm.network(cfg, channels, classes, side)
        row = {"preset": name, "method": cfg.method, "parameters": model.count_parameters(),
               "tokens": [model.tokens(s) for s in range(model.num_scales)],
               "gflops": [model.flops(s) / 1e9 for s in range(model.num_scales)], "mean": model.mean_flops() / 1e9,
               "share": model.mean_flops() / whole.mean_flops()}
        if cfg.method == "lapflow":
            row["attention"] = [attention_share(model, mask) for mask in ("causal", "none")]
        rows.append(row)
    return rows


def attention_share(model: MoTDiT, mask: str) -> float:
    """Mean over the stages of the query-key pairs of image tokens, in units of one scale's."""
    bare = copy.copy(model)
    bare.mask, bare.num_cond = mask, 0
    return statistics.mean(bare.attention_pairs(s) for s in range(bare.num_scales)) / bare.num_tokens[-1] ** 2


def show_count(rows: list[dict]) -> None:
    print(f"{'preset':32s} {'method':10s} {'M':>7s}  {'tokens by stage':22s} {'GFLOPs forward by stage':>30s} "
          f"{'mean':>8s}  {'of LFM':>6s}  attention")
    for row in rows:
        gflops = " ".join(f"{g:.1f}" for g in row["gflops"])
        attention = " unmasked ".join(f"{share:.3f}" for share in row.get("attention", []))
        print(f"{row['preset']:32s} {row['method']:10s} {row['parameters'] / 1e6:7.1f}  "
              f"{', '.join(map(str, row['tokens'])):22s} {gflops:>30s} {row['mean']:8.1f}  {row['share']:6.3f}  "
              f"{attention}")


# ---------------------------------------------------------------------------------------------------------------------
# seconds


def seconds(work: Callable, device: torch.device) -> float:
    """Of one call, the GPU's queue included."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def in_turn(works: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Medians of the seconds of each: every round calls all of them, after a first one that does not count."""
    times = {name: [] for name in works}
    for done in tqdm(range(rounds + 1), desc="measuring", leave=False):
        for name, work in works.items():
            taken = seconds(work, device)
            if done:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def passes(model: MoTDiT, bands: list, t, y, precision: str, backward: bool) -> dict[str, Callable]:
    """A pass of each stage: forward alone, or with backward."""
    def run(stage):
        with torch.set_grad_enabled(backward), torch.autocast(t.device.type, torch.bfloat16,
                                                              enabled=precision == "bfloat16"):
            out = model(bands[: stage + 1], t, y)
        if backward:
            sum(v.float().square().mean() for v in out).backward()
            model.zero_grad(set_to_none=True)

    return {f"stage {stage}": lambda stage=stage: run(stage) for stage in range(len(bands))}


def random_inputs(model: MoTDiT, batch: int, device) -> tuple:
    """bands, t, y"""
    shape = (model.in_channels, model.resolution, model.resolution)
    bands = noise_bands(data.ImageRandom(0, range(batch), device), shape, model.num_scales, "independent")
    y = torch.randint(model.num_classes, (batch,), device=device) if model.num_classes else None
    return bands, torch.rand(batch, device=device), y


# ---------------------------------------------------------------------------------------------------------------------
# train


def random_cache(folder: Path, cfg: Config, count: int = 1024) -> data.Latents:
    """A latent cache of noise in the real shapes, read by the real code."""
    channels, classes, side, _ = plan.shapes(cfg)
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    moments = generator.standard_normal((count, 2, 2 * channels, side, side), np.float32).astype(np.float16)
    moments[:, :, channels:] = np.abs(moments[:, :, channels:]) * 0.1
    moments.tofile(folder / "moments.f16")
    np.save(folder / "labels.npy", generator.integers(0, max(1, classes), count))
    vae = {"name": cfg.vae, "sha256": "", "shift": [0.0] * channels, "scale": [1.0] * channels}
    dataset = data.Latents(folder, {"count": count, "channels": channels, "side": side, "vae": vae,
                                    "fingerprint": "random", "classes": [str(i) for i in range(classes)]}, cfg.flip)
    dataset.latent = None                                   # nothing will be decoded
    return dataset


def bench_train(cfg: Config, ranks: Ranks, folder: Path, rounds: int) -> dict:
    """Trains cfg.steps steps into `folder` and summarises its metrics. Images per second are of all processes."""
    dataset = random_cache(folder / "cache", cfg) if cfg.space == "latent" else data.load(cfg)
    run, _, _ = train.train(cfg, True, ranks, None, float("inf"), dataset)
    written = (run.folder / "metrics.jsonl").read_text().splitlines() if ranks.first else []
    lines = [json.loads(line) for line in written]
    later = lines[len(lines) // 2 :]                        # compilation and warm-up are over

    def median(key):
        values = [line[key] for line in later if line[key] is not None]
        return statistics.median(values) if values else None

    result = {"row": config.find_row(cfg), "processes": ranks.world, "images_per_second": median("images_per_second"),
              "mfu": median("mfu"), "memory_gb": median("memory_gb"), "data_wait": median("data_wait"),
              "seconds_first_line": cfg.log_every * cfg.batch / lines[0]["images_per_second"] if lines else None,
              "parameters": run.model.count_parameters(), "batch": cfg.batch}
    if cfg.method == "lapflow":
        model, whole = run.model.requires_grad_(True), dataclasses.replace(cfg, stages="batch")
        micro_batch = cfg.micro_batch or plan.fit_micro_batch(model, whole, cfg.batch // ranks.world,
                                                              plan.free_memory(ranks.device), ranks.world)
        result["micro_batch"] = micro_batch                 # of the stages alone, below
        if cfg.compile and run.weights == "ema":            # the trained one is compiled already
            runs.compile_blocks(model)
        stages = passes(model, *random_inputs(model, micro_batch, ranks.device), cfg.precision, backward=True)
        for stage, (name, taken) in enumerate(in_turn(stages, rounds, ranks.device).items()):
            peak = plan.peak_flops(ranks.device)
            result[f"{name}, ms"] = 1000 * taken
            result[f"{name}, mfu"] = 3 * micro_batch * model.flops(stage) / taken / peak if peak else None
    return result


# ---------------------------------------------------------------------------------------------------------------------
# sample


def random_run(cfg: Config, folder: Path, device: torch.device) -> runs.Run:
    """A run of a preset that was never trained, with an autoencoder of Stable Diffusion's shape."""
    channels, classes, side, count = plan.shapes(cfg)
    torch.manual_seed(0)
    model = runs.build_model(cfg, channels, classes, side)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    facts = {"channels": channels, "side": side, "classes": [str(i) for i in range(classes)], "count": count,
             "fingerprint": "random", "latent": None}
    if cfg.space == "latent":
        from diffusers import AutoencoderKL

        AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                      block_out_channels=(128, 256, 512, 512), layers_per_block=2).save_pretrained(folder / "vae")
        cfg = dataclasses.replace(cfg, vae=str(folder / "vae"))
        facts["latent"] = latents.Autoencoder(cfg.vae, "cpu").facts
    return runs.Run(cfg, model.eval().requires_grad_(False).to(device), facts, folder, 0, "random")


def bench_sample(run: runs.Run, settings: dict, rounds: int, batches=(1, 64)) -> dict:
    """Seconds for an image, by batch: without decoding, with it, and of a preview."""
    runs.full_float32()
    run.ready()
    schedule, _, draw = sample.method(run.cfg)
    result = {"weights": run.weights, **settings}
    guidance = {key: settings[key] for key in ("cfg_scale", "interval", "precision")}
    solver = {key: value for key, value in settings.items() if key not in guidance}
    for batch in batches:
        labels = runs.choose_labels("balanced", batch, run.classes)
        y = None if labels is None else torch.as_tensor(labels, device=run.device)
        model, drawn = sample.Guided(run.model, **guidance), []

        def image(batch=batch, y=y, model=model, drawn=drawn):
            model.calls.clear()
            n = data.ImageRandom(0, range(batch), run.device)
            drawn[:] = [draw(model, n, y, schedule, run.shape, jumps=model.jumps(y), **solver)]

        works = {"image": image, "decoding": lambda drawn=drawn: run.decode(drawn[0])}
        if run.cfg.method == "lapflow" and run.cfg.num_scales > 1:
            works["preview"] = lambda batch=batch, labels=labels: causal.preview(run, range(batch), labels, **settings)
        taken = in_turn(works, rounds, run.device)
        result[f"batch {batch}"] = {
            "seconds_per_image": taken["image"] / batch, "nfe": sum(model.calls.values()),
            "seconds_with_decoding": (taken["image"] + taken["decoding"]) / batch,
            "preview_speed_up": taken["image"] / taken["preview"] if "preview" in taken else None}
    return {**result, "memory_gb": runs.peak_memory(run.device)}


# ---------------------------------------------------------------------------------------------------------------------
# compare

WIDTH, DEPTH, HEADS, CLASSES = 384, 6, 6, 1000
SCALES = {32: 2, 64: 3, 128: 3}                             # K by side of the latents


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
    """LapFlowDiT of rectified-flow-pytorch, from its own file: its package wants more than this file does. None when it
    is not there; raises UserError when it cannot be loaded."""
    found = importlib.util.find_spec("rectified_flow_pytorch")
    if found is None:
        print("rectified-flow-pytorch is not installed: compared with diffusers alone")
        return None
    spec = importlib.util.spec_from_file_location("lap_flow", Path(found.origin).parent / "lap_flow.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, OSError) as problem:
        raise UserError(f"rectified-flow-pytorch cannot be loaded ({problem}): pip install --no-deps "
                        "rectified-flow-pytorch einops einx, or uninstall it") from None
    return module.LapFlowDiT(side, 2, WIDTH, DEPTH, HEADS, 4 * WIDTH, channels=4, dim_head=WIDTH // HEADS,
                             num_scales=num_scales, accept_cond=True, cond_as_labels=True, num_classes=CLASSES)


def bench_compare(side: int, rounds: int, device: torch.device, precision: str) -> dict:
    """Ratios of medians, at one size of the latents; every model on random weights."""
    num_scales = SCALES.get(side, 3)
    ours = MoTDiT((WIDTH, DEPTH, HEADS, 2), 4, side, num_scales, CLASSES)
    with torch.device("meta"):
        whole = MoTDiT((WIDTH, DEPTH, HEADS, 2), 4, side, 1, CLASSES)
    batch = max(1, (65536 if device.type == "cuda" else 2048) // whole.num_tokens[0])
    bands, t, y = random_inputs(ours, batch, device)
    models = {"ours": ours, "diffusers DiT": diffusers_dit(side)}
    if (other := other_lapflow(side, num_scales)) is not None:
        models["rectified-flow-pytorch"] = other
    packages = ["diffusers"] + ["rectified-flow-pytorch"] * (other is not None)
    result = {"side": side, "num_scales": num_scales, "batch": batch, "precision": precision,
              "packages": {name: importlib.metadata.version(name) for name in packages},
              "limit": ours.mean_flops() / whole.mean_flops(),
              "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}}
    for model in models.values():
        model.to(device)
        for parameter in model.parameters():                # the untrained models return zeros
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
    for what, backward in (("forward and backward", True), ("forward", False)):
        works = {}
        for name, model in models.items():
            stages = passes(model, bands, t, y, precision, backward)
            works.update({f"{name}, {stage}": work for stage, work in stages.items()
                          if name != "diffusers DiT" or stage == f"stage {num_scales - 1}"})
        taken = in_turn(works, rounds, device)
        means = {name: statistics.mean(value for key, value in taken.items() if key.startswith(name + ","))
                 for name in models}
        result[what] = {"seconds": taken, "over": {name: means["ours"] / means[name]
                                                   for name in models if name != "ours"}}
    return result


def show_compare(result: dict) -> None:
    for what in ("forward and backward", "forward"):
        for name, ratio in result[what]["over"].items():
            limit = f" (FLOPs: {result['limit']:.3f})" if name == "diffusers DiT" else ""
            print(f"{result['side']:4d} latents, K = {result['num_scales']}  {what:20s} ours / {name:24s} {ratio:.3f}"
                  f"{limit}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# fid


def bench_fid(count: int = 50_000, dim: int = 2048, batch: int = 250) -> dict:
    """Seconds and peak memory of what fid.py does with the features of `count` images."""
    generator, made, began = np.random.default_rng(0), [], time.perf_counter()
    for scale in (1.0, 1.1):
        added_up = features.Statistics({}, count)
        for _ in range(count // batch):
            drawing = time.perf_counter()
            drawn = scale * generator.standard_normal((batch, dim), np.float32)
            began += time.perf_counter() - drawing          # making them up does not count
            added_up.add(drawn)
        made.append((added_up.mean, added_up.cov))
    added = time.perf_counter()
    distance = fid.frechet_distance(*made[0], *made[1])
    return {"images": count, "features": dim, "seconds_statistics_of_one": (added - began) / 2,
            "seconds_distance": time.perf_counter() - added, "frechet": distance,
            "memory_gb": runs.peak_memory(torch.device("cpu"))}


# ---------------------------------------------------------------------------------------------------------------------


def measure_training(arguments: dict, device: str | None, rounds: int, record: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given = {"steps": 200, "log_every": 10, "save_every": 10**9, "keep": 1, "sample_every": 0, "logger": ""}
        cfg = config.resolve({**given, **arguments, "out": str(Path(folder) / "run")})
        ranks = Ranks.start(device)
        try:
            result = bench_train(cfg, ranks, Path(folder), rounds)
        finally:
            ranks.stop()
        if ranks.first:
            show("train", result, record, cfg, ranks.device)


def measure_sampling(arguments: dict, name: str | None, device: str | None, rounds: int, record: str | None) -> None:
    where = best_device(device)
    with tempfile.TemporaryDirectory() as folder:
        if name:
            run = runs.load_run(name, device=device)
            cfg, settings = run.cfg, runs.solver_settings(run.cfg)
        else:
            cfg = config.resolve(arguments)
            if cfg.dataset not in plan.KNOWN:
                raise UserError("give bench.py sample a --preset of the paper, or the directory of a trained run")
            run = random_run(cfg, Path(folder), where)
            row = config.find_row(cfg)
            nfe = config.PRESETS[row].paper.get("nfe", 80) if row else 80
            settings = {**runs.solver_settings(dataclasses.replace(cfg, solver="euler", solver_steps=nfe)),
                        "precision": cfg.precision}         # of training: sample.py takes float32 unless told otherwise
        if run.cfg.compile and where.type == "cuda":
            runs.compile_blocks(run.model)
        result = {"row": config.find_row(cfg), **bench_sample(run, settings, rounds)}
        show("sample", result, record, cfg, where)


def main(arguments: dict) -> None:
    record, device, what, rounds, sides, name = (
        arguments.pop(key) for key in ("record", "device", "what", "rounds", "sides", "run"))
    if rounds < 1 or not all(side.isdecimal() and int(side) % 8 == 0 and int(side) for side in sides.split(",")):
        raise UserError("--rounds must be at least 1, and --sides numbers divisible by 8, like 32,64")
    if what != "train" and "RANK" in os.environ:
        raise UserError(f"bench.py {what} is made by one process: start it with python")
    read = {"train": arguments, "sample": {} if name else arguments, "compare": {"precision"}}.get(what, {})
    ignored = [f"--{key.replace('_', '-')}" for key in arguments if key not in read] + [name] * (what != "sample")
    if any(ignored):
        raise UserError(f"bench.py {what} does not read {', '.join(filter(None, ignored))}: leave it out")
    Config(precision=arguments.get("precision", Config.precision))              # raises UserError for an unknown one
    fid.check_record(record)
    if what == "count":
        rows = bench_count()
        show_count(rows)
        if record:
            fid.record(Path(record), None, torch.device("cpu"), {"what": what, "rows": rows})
    elif what == "train":
        measure_training(arguments, device, rounds, record)
    elif what == "sample":
        measure_sampling(arguments, name, device, rounds, record)
    elif what == "compare":
        where = best_device(device)
        for side in map(int, sides.split(",")):
            result = bench_compare(side, rounds, where, arguments.get("precision") or "float32")
            show_compare(result)
            if record:
                fid.record(Path(record), None, where, {"what": what, **result})
    else:
        show(what, bench_fid(), record, None, torch.device("cpu"))


def show(what: str, result: dict, record: str | None, cfg: Config | None, device) -> None:
    for name, value in result.items():
        print(f"{name:26s} {'unknown' if value is None else value}")
    if record:
        fid.record(Path(record), cfg, device, {"what": what, **result})


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except UserError as problem:
        sys.exit(f"error: {problem}")
