"""What every row of the paper costs, before it starts: parameters, tokens, FLOPs, memory, days. Nothing here is timed.

    python -m studies.plan                              all rows, the paper's numbers beside ours
    python train.py --preset celebahq-1024 --dry-run    one of them

Parameters and tokens are those of the network, FLOPs are counted by torch (run/memory.py), memory is an estimate, and
days are computed for a share of the GPU's peak.
"""

import dataclasses
import functools

import config
from config import Config, parse_size
from run import memory
from run.paper import PRESETS
from studies.output import markdown

TRAINING = ("starts", "path", "steps", "lr", "lr_end", "ema", "keep_every", "cfg_scale")        # no FLOPs of a pass


@functools.cache
def flops_by_stage(**settings) -> list[int]:
    """Of a forward pass of one image. All blocks cost the same: torch counts networks of one and of two."""
    cfg = Config(**settings)
    width, depth, heads, patch = parse_size(cfg.size)
    counts = [memory.forward_flops(memory.meta_model(dataclasses.replace(
        cfg, size=f"{width},{blocks},{heads},{patch}"), memory.paper_facts(cfg))) for blocks in (1, 2)]
    return [first + (depth - 1) * (second - first) for first, second in zip(*counts, strict=True)]


def presets() -> str:
    """Every row of the paper: our counts, and the paper's numbers. Memory and days are those of 8 H200."""
    head = ["preset", "parameters, M (paper)", "tokens by stage", "GFLOPs forward, mean", "steps x batch",
            "GB on each of 8, estimated (paper)",
            f"days on 8 H200 at {memory.ASSUMED_MFU:.0%} of the peak, computed (paper)", "paper: FID-50k", "NFE",
            "s / image", "ours"]
    table = []
    for name, settings, paper in ((name, row.settings, row.paper) for name, row in PRESETS.items() if row.paper):
        cfg = Config(**settings)
        model, vae = memory.meta_model(cfg, memory.paper_facts(cfg)), memory.VAE_PARAMETERS * (cfg.space == "latent")
        mean = memory.mean_of_stages(cfg, flops_by_stage(**{
            key: value for key, value in settings.items() if key not in TRAINING}))
        days = 3 * mean * cfg.batch * cfg.steps / (8 * memory.PEAK["H200"] * memory.ASSUMED_MFU) / 86400
        texts = {"parameters": f"{(memory.parameters(model) + vae) / 1e6:.0f}", "days": f"{days:.2g}",
                 "memory": f"{memory.memory_bytes(model, cfg, cfg.batch // 8, world=8) / 1e9:.0f}"}
        texts = {key: f"{text} ({paper[key]})" if key in paper else text for key, text in texts.items()}
        table.append([f"`{name}`", texts["parameters"], memory.tokens_by_stage(model), f"{mean / 1e9:.1f}",
                      f"{cfg.steps:,} x {cfg.batch}", texts["memory"], texts["days"],
                      *(paper.get(key, "") for key in ("fid", "nfe", "seconds")), "not measured"])
    return markdown(head, table)


def main() -> None:
    config.parser(__doc__, "python -m studies.plan").parse_args()
    print(presets())
    print("\nParameters with the 83.7 M of the VAE. GFLOPs, two FLOPs for each multiply-add, of one forward pass\n"
          "of one image. python train.py --preset NAME starts a row; --dry-run prints its cost.")


if __name__ == "__main__":
    config.run(main)
