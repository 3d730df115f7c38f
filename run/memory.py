"""What a run costs, before it starts: parameters, FLOPs, days, memory, and the largest micro-batch that fits.

FLOPs are counted by torch's own counter on the meta device, which computes shapes and no numbers: matrix products, two
FLOPs for each multiply-add. Memory is an estimate: weights, gradients and optimizer exactly, activations from a count
of what autograd keeps. Days assume a share of the GPU's peak.
"""

import math
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import baselines
from config import Config
from data import batches, latents, sources
from run.load import build_model
from run.paper import CELEBAHQ, IMAGENET, find_row
from run.ranks import Ranks, within_memory

VAE_PARAMETERS = 83_653_863                                 # the autoencoder of Stable Diffusion; EQ-VAE is the same
KNOWN = {"celebahq": (CELEBAHQ, 0), "imagenet": (IMAGENET, 1000), "fashion": (60_000, 10)}      # images, classes

# Dense bfloat16 peak, FLOP/s, by a part of the device's name; the first that fits counts.
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
        "4090": 165e12, "3090": 71e12}
ASSUMED_MFU = 0.4


def peak_flops(device: torch.device) -> float | None:
    """Peak of a GPU in FLOP/s, None when it is unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return next((peak for part, peak in PEAK.items() if part in name), None)


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def meta_model(cfg: Config, facts: dict) -> torch.nn.Module:
    """The network of a configuration without its numbers; facts: of the data, see data.batches."""
    return build_model(cfg, facts, device="meta").to("meta")


def forward_flops(model: torch.nn.Module) -> list[int]:
    """FLOPs of one forward pass of one image, for each stage. model: on the meta device."""
    counts = []
    for stage in range(model.num_scales):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*model.stage_inputs(stage, 1, "meta"))
        counts.append(counter.get_total_flops())
    return counts


def mean_of_stages(cfg: Config, values: list[int]) -> float:
    """The mean over the stages of training, each as often as it trains."""
    shares = baselines.SYSTEMS[cfg.method].schedule(cfg).shares
    return sum(share * value for share, value in zip(shares, values, strict=True))


def step_flops(cfg: Config, facts: dict) -> float:
    """Of one training step: backward is two forwards."""
    return 3 * cfg.batch * mean_of_stages(cfg, forward_flops(meta_model(cfg, facts)))


# ---------------------------------------------------------------------------------------------------------------------
# memory


def activation_bytes(model: torch.nn.Module, stage: int, precision: str, compiled: bool = False) -> int:
    """What autograd keeps for one image of a stage; a test compares it with what it does keep.

    For each token and block: two float32 LayerNorms, in and out, and 19 D numbers in the compute precision: their
    modulated results, Q, K, V (K and V twice: the bands' are joined), the attention and its projection, and the
    feed-forward network's 4 D before and after the activation and its output. Compiled, the norms are computed again
    from one float32 number for each of D. The modern block keeps 28 D bytes more (23 D in bfloat16; compiled 8 and
    5 D): queries and keys before and after their norm and rotation, and a gated middle."""
    d, count = model.hidden_size, model.tokens(stage) + model.num_cond
    block = 4 * (1 if compiled else 4) * d + 19 * d * (2 if precision == "bfloat16" else 4)
    block += model.blocks[0].modern * d * ((5, 8) if compiled else (23, 28))[precision == "float32"]
    return count * (4 * d * model.depth + block) if model.recompute else count * block * model.depth


def memory_bytes(model: torch.nn.Module, cfg: Config, micro_batch: int, world: int = 1, stage: int = -1) -> int:
    """Peak on one GPU: weights, gradients, Adam's two moments, EMA, and activations: of a batch that trains `stage`, or
    of one with a share of each stage."""
    state = 4 * parameters(model) * (2 + 2 / (world if cfg.shard else 1) + (cfg.ema > 0)
                                     + 0.5 * (cfg.precision == "bfloat16"))
    per_image = [activation_bytes(model, stage, cfg.precision, cfg.compile) for stage in range(model.num_scales)]
    return int(state + micro_batch * (per_image[stage] if cfg.stages == "batch" else mean_of_stages(cfg, per_image)))


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:                                     # Windows
        return math.nan
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1e9 if sys.platform == "darwin" else 1e6)                        # bytes there, kilobytes on Linux


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU; elsewhere nothing is known, and nothing is held back."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def fit_micro_batch(model: torch.nn.Module, cfg: Config, share: int, free: float, world: int = 1, least: int = 1,
                    stage: int = -1) -> int:
    """The largest divisor of a process's share of the batch whose images fit into `free` bytes; `least` at least."""
    divisors = [size for size in range(share, least - 1, -1) if share % size == 0] or [share]
    return next((n for n in divisors if memory_bytes(model, cfg, n, world, stage) < 0.9 * free), divisors[-1])


@dataclass
class Parts:
    """This process's rows of a batch, cut into micro-batches: for each stage that a whole batch may train, where coarse
    stages have fewer and larger ones. Stratified stages have images of all of them in each part."""

    cfg: Config
    by_stage: list[list[slice]]

    @property
    def sizes(self) -> list[int]:
        """Images at a time, by stage."""
        return [rows[0].stop - rows[0].start for rows in self.by_stage]

    def of_step(self, step: int) -> list[slice]:
        shares = baselines.SYSTEMS[self.cfg.method].schedule(self.cfg).shares
        return self.by_stage[batches.BatchRandom(self.cfg.seed, step, self.cfg.batch).choice(shares)]


def split_batch(model: torch.nn.Module, cfg: Config, ranks: Ranks) -> Parts:
    """Parts of --micro-batch images, or of as many as fit the memory."""
    free, there = ranks.least(free_memory(ranks.device)), 4 * parameters(model)    # the weights are there already
    least, share = cfg.num_scales if cfg.stages == "stratified" else 1, cfg.batch // ranks.world
    sizes = [cfg.micro_batch or fit_micro_batch(model, cfg, share, free + there, ranks.world, least, stage)
             for stage in range(cfg.num_scales)]
    return Parts(cfg, [ranks.rows(cfg.batch, size, least) for size in sizes])


def explained(model: torch.nn.Module, cfg: Config, parts: Parts, ranks: Ranks) -> AbstractContextManager:
    """Turns an out-of-memory error inside the block into a UserError that says what may fit."""
    def failure():
        size = parts.sizes[-1]                              # the finest stage has the most tokens
        need, used = memory_bytes(model, cfg, size, ranks.world) / 1e9, peak_memory(ranks.device)
        smaller = max((n for n in range(1, size) if size % n == 0), default=0)
        advice = f"try --micro-batch {smaller} (the same batch, in more parts) or --recompute"
        if smaller < (cfg.num_scales if cfg.stages == "stratified" else 1):
            advice = "no smaller micro-batch is possible: add --recompute, a smaller --size, or take a larger device"
        return (f"out of memory on {ranks.device} with {size} images at a time ({used:.1f} GB were in use, the "
                f"estimate was {need:.1f} GB): {advice}")

    return within_memory(ranks.device, failure)


def tokens_by_stage(model: torch.nn.Module) -> str:
    return ", ".join(str(model.tokens(stage)) for stage in range(model.num_scales))


def summary(model: torch.nn.Module, cfg: Config, facts: dict, parts: Parts, ranks: Ranks) -> str:
    """What a run is: the settings that differ from the defaults, and its size."""
    default = Config()
    changes = [f"{name} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
               for name, value in vars(cfg).items() if name not in ("out", "latents") and value != vars(default)[name]]
    classes = facts["classes"]
    names = ", ".join(classes[:3] + (["..."] if len(classes) > 3 else []))
    condition = f"{len(classes)} classes ({names})" if names else "vectors" if facts["vectors"] else "no classes"
    split = dict.fromkeys(f"{ranks.world} x {len(rows)} x {size}"
                          for rows, size in zip(parts.by_stage, parts.sizes, strict=True))
    return (f"run        {cfg.out}: {', '.join(changes) or 'the defaults'}\n"
            f"data       {facts['count']:,} images, {condition}\n"
            f"model      {parameters(model) / 1e6:.2f} M parameters, {tokens_by_stage(model)} tokens by stage\n"
            f"batch      {cfg.batch} images = {', '.join(split)} (processes, micro-batches, images"
            f"{'; by stage' if len(split) > 1 else ''}), on {ranks.device}")


def paper_facts(cfg: Config) -> dict:
    """What is known of the data of a configuration without opening them."""
    count, classes = KNOWN.get(cfg.dataset, (0, 0))
    channels, side = (4, cfg.res // 8) if cfg.space == "latent" else (1 if cfg.dataset == "fashion" else 3, cfg.res)
    return {"channels": channels, "side": side, "classes": [str(i) for i in range(classes)], "vectors": None,
            "count": count}


def quick_facts(cfg: Config) -> dict:
    """The facts of the data from what can be read quickly: the header of a cache, the names in a folder."""
    if cfg.space == "latent" and (header := latents.read_header(Path(cfg.latents))):
        if cfg.condition == "labels":
            return {**header, "vectors": None}
        vectors = sources.read_vectors(Path(cfg.latents) / "vectors.npy", header["count"])
        return {**header, "vectors": [1, vectors.shape[1]]}
    if cfg.dataset == "digits":
        return batches.facts(batches.load(cfg))
    facts = paper_facts(cfg)
    if cfg.data and cfg.dataset != "fashion":
        source = sources.open_source(cfg.dataset, cfg.data)
        facts |= {"classes": source.classes, "count": len(source)}
        if cfg.condition == "vectors":
            facts |= {"classes": [], "vectors": [min(256, len(source)), source.vectors().shape[1]]}
    return facts


def describe(cfg: Config) -> str:
    """The lines of --dry-run: what a run is and what it costs."""
    facts = quick_facts(cfg)
    model, count, vae = meta_model(cfg, facts), facts["count"], VAE_PARAMETERS if cfg.space == "latent" else 0
    flops, images = forward_flops(model), cfg.batch * cfg.steps
    mean = mean_of_stages(cfg, flops)
    total = 3 * images * mean
    days = [f"{total / (8 * PEAK[name] * ASSUMED_MFU) / 86400:.2g} on 8 {name}" for name in ("H200", "A100", "4090")]
    memory = [f"{memory_bytes(model, cfg, cfg.batch // n, n) / 1e9:.1f} GB on each of {n}" for n in (1, 8)
              if cfg.batch % n == 0]
    condition = f"vectors of {facts['vectors'][1]} numbers" if facts["vectors"] else f"{len(facts['classes'])} classes"
    patches = ", ".join(map(str, dict.fromkeys(model.patches)))
    with_vae = f", {(parameters(model) + vae) / 1e6:.1f} M with the VAE" if vae else ""
    epochs = f" = {images / count:,.1f} epochs of {count:,}" if count else ""
    lines = [
        f"preset     {find_row(cfg) or 'none'}",
        f"input      {facts['channels']} x {facts['side']} x {facts['side']}, {model.num_scales} bands, {condition}",
        f"parameters {parameters(model) / 1e6:.1f} M{with_vae}",
        f"tokens     {tokens_by_stage(model)} by stage, from patches of {patches}",
        f"GFLOPs     {', '.join(f'{n / 1e9:.4g}' for n in flops)} by stage, for one forward pass of one image; "
        f"mean {mean / 1e9:.4g}",
        f"training   {cfg.steps:,} steps of {cfg.batch} images{epochs}; {total:.2e} FLOPs",
        f"memory     {', '.join(memory)} without micro-batches (estimated)"]
    if total > 1e18:                                        # more than an hour of a GPU
        lines.append(f"days       {', '.join(days)} at {ASSUMED_MFU:.0%} of the peak (assumed)")
    return "\n".join(lines)
