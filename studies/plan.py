"""What every row of the paper costs, before it starts: parameters, tokens, FLOPs, memory, days. Nothing here is timed.

    python -m studies.plan                              all rows, the paper's numbers beside ours
    python train.py --preset celebahq-1024 --dry-run    one of them

Parameters and tokens are those of the network, FLOPs are counted by torch (run/memory.py), memory is an estimate, and
days are computed for a share of the GPU's peak.
"""

import dataclasses
from functools import cache

import torch

import config
from config import Config, parse_size
from run import memory
from run.paper import PRESETS
from studies.output import markdown

NETWORK = ("dataset", "res", "space", "method", "size", "num_scales", "experts", "mask", "condition_tokens",
           "block", "concat_coarse", "recompute")                  # the settings that decide the network


def flops_by_stage(cfg: Config, facts: dict) -> list[int]:
    """Of a forward pass of one image. All blocks cost the same: torch counts networks of one and of two."""
    width, depth, heads, patch = parse_size(cfg.size)
    counts = [memory.forward_flops(memory.meta_model(dataclasses.replace(
        cfg, size=f"{width},{blocks},{heads},{patch}"), facts)) for blocks in (1, 2)]
    return [first + (depth - 1) * (second - first) for first, second in zip(*counts, strict=True)]


@cache
def counted(cfg: Config) -> tuple[torch.nn.Module, list[int]]:
    facts = memory.paper_facts(cfg)
    return memory.meta_model(cfg, facts), flops_by_stage(cfg, facts)


def key(cfg: Config) -> Config:
    """One configuration for all that have the same network: it is counted once."""
    return Config(**{name: getattr(cfg, name) for name in NETWORK}, vae=cfg.vae and "any")


@dataclasses.dataclass
class Cost:
    """Of a configuration of the paper. FLOPs are those of one forward pass of one image; flops_mean is over the stages,
    as often as they are trained; memory is in bytes on each of 8 GPUs, days are those of 8 H200."""

    parameters: int
    tokens: list[int]                                       # by stage
    flops: list[int]                                        # by stage
    flops_mean: float
    memory: int
    days: float


def cost(cfg: Config) -> Cost:
    model, flops = counted(key(cfg))
    flops_mean = memory.mean_of_stages(cfg, flops)
    seconds = 3 * flops_mean * cfg.batch * cfg.steps / (8 * memory.PEAK["H200"] * memory.ASSUMED_MFU)
    return Cost(memory.parameters(model), [model.tokens(stage) for stage in range(cfg.num_scales)], flops, flops_mean,
                memory.memory_bytes(model, cfg, cfg.batch // 8, world=8), seconds / 86400)


def millions(cfg: Config) -> float:
    """Parameters, with those of the autoencoder where there is one, as the paper counts them."""
    return (cost(cfg).parameters + (memory.VAE_PARAMETERS if cfg.space == "latent" else 0)) / 1e6


def rows() -> dict[str, Config]:
    """The presets that are rows of the paper."""
    return {name: Config(**preset.settings) for name, preset in PRESETS.items() if preset.paper}


def presets() -> str:
    """Every row of the paper: our counts, and the paper's numbers."""
    head = ["preset", "parameters, M (paper)", "tokens by stage", "GFLOPs forward, mean", "steps x batch",
            "GB on each of 8, estimated (paper)",
            f"days on 8 H200 at {memory.ASSUMED_MFU:.0%} of the peak, computed (paper)", "paper: FID-50k", "NFE",
            "s / image", "ours"]
    table = []
    for name, cfg in rows().items():
        ours, paper = cost(cfg), PRESETS[name].paper
        texts = {"parameters": f"{millions(cfg):.0f}", "memory": f"{ours.memory / 1e9:.0f}", "days": f"{ours.days:.2g}"}
        texts = {key: f"{text} ({paper[key]})" if key in paper else text for key, text in texts.items()}
        table.append([f"`{name}`", texts["parameters"], ", ".join(map(str, ours.tokens)),
                      f"{ours.flops_mean / 1e9:.1f}", f"{cfg.steps:,} x {cfg.batch}", texts["memory"], texts["days"],
                      *(paper.get(key, "") for key in ("fid", "nfe", "seconds")), "not measured"])
    return markdown(head, table)


def parameters() -> str:
    """By what is per band in a block: with QKV alone the counts are the paper's."""
    experts, table = ("full", "qkv", "none"), []
    for name, cfg in rows().items():
        if cfg.method == "lapflow" and "parameters" in PRESETS[name].paper:
            counts = [f"{millions(dataclasses.replace(cfg, experts=which)):.1f}" for which in experts]
            table.append([f"`{name}`", *counts, PRESETS[name].paper["parameters"]])
    return markdown(["parameters, M", *(f"experts {which}" for which in experts), "paper"], table)


def main() -> None:
    config.parser(__doc__, "python -m studies.plan").parse_args()
    print("\n\n".join((presets(), parameters())))
    print("\nParameters of the first two tables with the 83.7 M of the VAE. GFLOPs, two FLOPs for each multiply-add, "
          "of one forward pass\nof one image. python train.py --preset NAME starts a row; --dry-run prints its cost.")


if __name__ == "__main__":
    config.run(main)
