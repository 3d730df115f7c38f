"""What a run will cost, before it starts: parameters, tokens, FLOPs, memory and days.

    python plan.py                                      every preset, with the paper's numbers beside ours
    python train.py --dataset celebahq --res 1024 --dry-run

Parameters, tokens and FLOPs are exact (closed form, compared with the real model in the tests). Memory is an estimate:
weights, gradients and optimizer exactly, activations from a count of what autograd keeps in eager mode. Days assume a
stated share of the GPU's peak; nothing here was timed on a GPU.
"""

import dataclasses
import math
from pathlib import Path

import torch

import data
import sources
from config import CELEBAHQ, IMAGENET, PRESETS, Config, UserError, find_row, show
from model import MoTDiT
from runs import build_model, peak_memory

VAE_PARAMETERS = 83_653_863                                 # the autoencoder of Stable Diffusion; EQ-VAE is the same
LATENT = {"channels": 4, "factor": 8}                       # of both
KNOWN = {"celebahq": (CELEBAHQ, 0), "imagenet": (IMAGENET, 1000)}                   # images, classes

# Dense bfloat16 peak, FLOP/s, by a part of the device's name; the first that fits counts.
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
        "4090": 165e12, "3090": 71e12}
ASSUMED_MFU = 0.4


def peak_flops(device: torch.device) -> float | None:
    """Peak of a GPU in FLOP/s, None when it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if part in name), None)


def activation_bytes(model, stage: int, precision: str) -> int:
    """What autograd keeps for one image of a stage, in eager mode; a test compares it with what it does keep.

    For each token and block: two float32 LayerNorms, in and out, and 19 D numbers in the compute precision: their
    modulated results, Q, K, V (K and V twice: the bands' are joined), the attention and its projection, and the
    feed-forward network's 4 D before and after the activation and its output.
    """
    d, tokens = model.hidden_size, model.tokens(stage) + model.num_cond
    block = 4 * 4 * d + 19 * d * (2 if precision == "bfloat16" else 4)
    if model.recompute:
        return tokens * (4 * d * model.depth + block)
    return tokens * block * model.depth


def memory_bytes(model, cfg: Config, micro_batch: int, world: int = 1) -> int:
    """Peak on one GPU: weights, gradients (twice while they are summed), Adam's two moments, EMA, and activations."""
    state = 4 * model.count_parameters() * (4 + (cfg.ema > 0) + (world > 1) + 0.5 * (cfg.precision == "bfloat16"))
    per_image = [activation_bytes(model, stage, cfg.precision) for stage in range(model.num_scales)]
    return int(state + micro_batch * (max(per_image) if cfg.stages == "batch" else sum(per_image) / len(per_image)))


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU; elsewhere nothing is known, and nothing is held back."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def fit_micro_batch(model, cfg: Config, share: int, free: int, world: int = 1) -> int:
    """The most images of a process's share that fit into `free` bytes, in equal parts; 1 at least."""
    for parts in range(1, share + 1):
        micro = -(-share // parts)
        if memory_bytes(model, cfg, micro, world) < 0.9 * free:
            return micro
    return 1


def too_large(model, cfg: Config, micro_batch: int, ranks) -> UserError:
    """What to say when a micro-batch did not fit into the memory."""
    need, used = memory_bytes(model, cfg, micro_batch, ranks.world) / 1e9, peak_memory(ranks.device)
    least = cfg.num_scales if cfg.stages == "stratified" else 1
    if micro_batch // 2 < least:
        way = "fewer cannot be: take --recompute, a smaller --size, or a device with more memory"
    else:
        way = f"go on with --micro-batch {micro_batch // 2}: the same batch, in more parts; or with --recompute"
    return UserError(f"out of memory on {ranks.device} with {micro_batch} images at a time ({used:.1f} GB were in use, "
                     f"the estimate was {need:.1f} GB): {way}")


def meta_model(cfg: Config, channels: int, num_classes: int, side: int) -> MoTDiT:
    with torch.device("meta"):
        return build_model(cfg, channels, num_classes, side)


def shapes(cfg: Config) -> tuple[int, int, int, int]:
    """channels, classes, side and number of images of a configuration of the paper, whose data are not at hand."""
    count, classes = KNOWN.get(cfg.dataset, (0, 0))
    latent = cfg.space == "latent"
    return (LATENT["channels"] if latent else 3, classes, cfg.res // LATENT["factor"] if latent else cfg.res, count)


def describe(cfg: Config, facts: dict | None = None, world: int = 1) -> str:
    """The lines of --dry-run. facts: those of the data when they are at hand (data.facts)."""
    channels, classes, side, count = shapes(cfg)
    if facts:
        channels, classes, side, count = facts["channels"], len(facts["classes"]), facts["side"], facts["count"]
    model = meta_model(cfg, channels, classes, side)
    other = {"full": "qkv"}.get(cfg.experts, "full")
    row = find_row(cfg)
    paper = PRESETS[row].paper if row else {}
    vae = VAE_PARAMETERS if cfg.space == "latent" else 0
    millions, of_other = model.count_parameters() / 1e6, ""
    if cfg.method == "lapflow":
        counted = meta_model(dataclasses.replace(cfg, experts=other), channels, classes, side).count_parameters() + vae
        of_other = f"; {counted / 1e6:.1f} M with --experts {other}"
    tokens = [model.tokens(s) for s in range(model.num_scales)]
    gflops = [model.flops(s) / 1e9 for s in range(model.num_scales)]
    images = cfg.batch * cfg.steps
    total = 3 * model.mean_flops() * images                 # backward is two forwards
    processes = sorted({world, 8}) if cfg.batch % 8 == 0 else [world]
    memory = [f"{memory_bytes(model, cfg, -(-cfg.batch // n), n) / 1e9:.1f} GB on each of {n}" for n in processes]
    days = [f"{total / (8 * PEAK[name] * ASSUMED_MFU) / 86400:.2g} on 8 {name}" for name in ("H200", "A100", "4090")]

    def reported(key: str, text: str) -> str:
        return f"; the paper: {text.format(paper[key])}" if key in paper else ""

    lines = [
        f"row        {row or 'none of the paper'}" + (f"; the paper reports {said(paper)}" if paper else ""),
        f"input      {channels} x {side} x {side}, {model.num_scales} bands, {classes} classes",
        f"parameters {millions:.1f} M" + (f", {millions + vae / 1e6:.1f} M with the VAE" if vae else "")
        + of_other
        + reported("parameters", "{} M with the VAE"),
        f"tokens     {', '.join(map(str, tokens))} by stage, from patches of {model.patch_size}",
        f"GFLOPs     {', '.join(f'{g:.4g}' for g in gflops)} by stage, for one forward pass of one image; "
        f"mean {model.mean_flops() / 1e9:.4g}",
        f"training   {cfg.steps:,} steps of {cfg.batch} images"
        + (f" = {images / count:,.1f} epochs of {count:,}" if count else "") + f"; {total:.2e} FLOPs",
        f"memory     {', '.join(memory)} without micro-batches (estimated)" + reported("memory", "{} GB on 8")]
    if total > 1e18:                                        # what a GPU needs more than an hour for
        lines.append(f"days       {', '.join(days)} at {ASSUMED_MFU:.0%} of the peak (assumed)"
                     + reported("days", "{} on 8 H200"))
    return "\n".join(lines)


def dry_run(cfg: Config) -> str:
    """What a run is and costs, from what can be known quickly: of a folder the names, of a cache the header."""
    facts, header = None, data.read_header(Path(cfg.latents)) if cfg.space == "latent" else None
    if header:
        facts = header
    elif cfg.dataset in ("digits", "photos"):
        facts = data.facts(data.load(cfg))
    elif cfg.data:
        source, (channels, _, side, _) = sources.open_source(cfg.dataset, cfg.data), shapes(cfg)
        facts = {"channels": channels, "side": side, "classes": source.classes, "count": len(source)}
    return f"{show(cfg)}\n{describe(cfg, facts)}"


def said(paper: dict) -> str:
    """The paper's numbers in words."""
    names = {"fid": "FID-50k {}", "recall": "recall {}", "nfe": "{} NFE", "seconds": "{} s per image"}
    return ", ".join(text.format(paper[name]) for name, text in names.items() if name in paper)


def table() -> str:
    """Every preset of the paper as a Markdown table: our closed forms and the paper's numbers."""
    head = ["preset", "parameters, M (paper)", "tokens by stage", "GFLOPs forward, mean", "steps x batch",
            "GB on each of 8, estimated (paper)", f"days on 8 H200 at {ASSUMED_MFU:.0%} of the peak, computed (paper)",
            "paper: FID-50k", "NFE", "s / image", "ours"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, preset in PRESETS.items():
        if not preset.paper:
            continue
        cfg = Config(**preset.settings)
        model, paper = meta_model(cfg, *shapes(cfg)[:3]), preset.paper
        vae = VAE_PARAMETERS if cfg.space == "latent" else 0
        tokens = ", ".join(str(model.tokens(s)) for s in range(model.num_scales))
        memory = memory_bytes(model, cfg, cfg.batch // 8, world=8) / 1e9
        days = 3 * model.mean_flops() * cfg.batch * cfg.steps / (8 * PEAK["H200"] * ASSUMED_MFU) / 86400
        ours = [f"{(model.count_parameters() + vae) / 1e6:.0f}", f"{memory:.0f}", f"{days:.2g}"]
        beside = [f"{text} ({paper[key]})" if key in paper else text
                  for text, key in zip(ours, ("parameters", "memory", "days"), strict=True)]
        cells = [f"`{name}`", beside[0], tokens, f"{model.mean_flops() / 1e9:.1f}", f"{cfg.steps:,} x {cfg.batch}",
                 *beside[1:], *(str(paper.get(key, "")) for key in ("fid", "nfe", "seconds")), "not measured"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    print(table())
    print("\nParameters with the 83.7 M of the VAE; GFLOPs (two FLOPs per multiply-add) of one forward pass, "
          "mean over the stages.\nstart one with: python train.py --preset NAME   (--dry-run: its cost)")


if __name__ == "__main__":
    main()
