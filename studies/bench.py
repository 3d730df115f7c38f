"""Speed, measured on this machine.

    python -m studies.bench compare                                against diffusers' DiT
    python -m studies.bench gpu --budget 560 --out DIR             all that a GPU does with the models of the paper
    python -m studies.bench gpu-quality --budget 480 --out DIR     the systems on Fashion-MNIST at patch 2
    python -m studies.bench gpu-colour --budget 300 --out DIR      LapFlow on 64 x 64 photographs: pictures, previews

compare: forward and backward (then forward alone, as in sampling; no optimizer) of a MoT-DiT of width 384 and depth 6,
mean over its stages, against one pass of diffusers' DiTTransformer2DModel of the same width over the whole latent.
In turn, in float32; ratios of medians. `limit` is the ratio of our FLOPs to those of our own single scale.

gpu: see studies/gpu.py. Each figure is a line of DIR/gpu.jsonl, written at once; the budget is in seconds. With
--dry-run everything runs on the CPU with toy sizes.
"""

import importlib.metadata
import statistics
from functools import partial
from pathlib import Path

import torch

import config
from config import UserError
from model import MoTDiT
from run import log, memory
from run.ranks import best_device
from studies import gpu
from studies.timing import in_turn

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


def one_pass(model: torch.nn.Module, bands: list, t: torch.Tensor, y: torch.Tensor | None, backward: bool) -> None:
    """Forward alone, or with backward."""
    with torch.set_grad_enabled(backward):
        out = model(list(bands), t, y)
    if backward:
        sum(v.square().mean() for v in out).backward()
        model.zero_grad(set_to_none=True)


def bench_compare(side: int, rounds: int, device: torch.device) -> dict:
    """Ratios of medians, at one size of the latents; both models on random weights."""
    num_scales = SCALES.get(side, 3)
    models = {"ours": ours(side, num_scales), "diffusers DiT": diffusers_dit(side)}
    flops, (flops_whole,) = (memory.forward_flops(ours(side, scales).to("meta")) for scales in (num_scales, 1))
    batch = max(1, (65536 if device.type == "cuda" else 2048) // models["ours"].num_tokens[-1])
    inputs = [models["ours"].stage_inputs(stage, batch, device) for stage in range(num_scales)]
    y = torch.randint(CLASSES, (batch,), device=device)
    result = {"side": side, "num_scales": num_scales, "batch": batch, "precision": "float32",
              "packages": {"diffusers": importlib.metadata.version("diffusers")},
              "limit": statistics.mean(flops) / flops_whole,
              "parameters": {name: memory.parameters(model) for name, model in models.items()}}
    for model in models.values():
        model.to(device)
        for parameter in model.parameters():                # the untrained models return zeros
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
    for what, backward in (("forward and backward", True), ("forward", False)):
        works = {f"ours, stage {stage}": partial(one_pass, models["ours"], *given, y, backward)
                 for stage, given in enumerate(inputs)}
        whole = f"diffusers DiT, stage {num_scales - 1}"    # the finest bands have the whole size
        taken = in_turn({**works, whole: partial(one_pass, models["diffusers DiT"], *inputs[-1], y, backward)}, rounds,
                        device)
        ratio = statistics.mean(taken[name] for name in works) / taken[whole]
        result[what] = {"seconds": taken, "over": {"diffusers DiT": ratio}}
        print(f"{side:4d} latents, K = {num_scales}  {what:20s} ours / diffusers DiT {ratio:.3f} "
              f"(FLOPs: {result['limit']:.3f})", flush=True)
    return result


def main() -> None:
    parser = config.parser(__doc__, "python -m studies.bench WHAT [options]")
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    flags = {what: commands.add_parser(what, usage=f"python -m studies.bench {what} [options]", allow_abbrev=False)
             for what in ("compare", *gpu.COMMANDS)}
    compare = flags["compare"]
    compare.add_argument("--record", metavar="FILE", help="append the result and how it was made to a .jsonl")
    compare.add_argument("--sides", default="32,64,128", help="sizes of the latents [32,64,128]")
    compare.add_argument("--rounds", type=int, default=7, help="repetitions that the medians are taken of [7]")
    compare.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    for what, budget in zip(gpu.COMMANDS, (560, 480, 300), strict=True):
        flags[what].add_argument("--budget", type=float, default=budget, metavar="SECONDS", help=f"[{budget}]")
        flags[what].add_argument("--out", type=Path, default=Path("out") / what, help=f"directory [out/{what}]")
        flags[what].add_argument("--dry-run", action="store_true", help="toy sizes, on the CPU")
    flags["gpu-quality"].add_argument("--data", default="", help="Fashion-MNIST: folder or hf:OWNER/NAME [of Debian]")
    args = parser.parse_args()
    if args.what in gpu.COMMANDS:
        return gpu.measure(args.what, args.out, args.budget, args.dry_run, getattr(args, "data", ""))
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    if not all(side.isdecimal() and int(side) % 8 == 0 and int(side) for side in args.sides.split(",")):
        raise UserError(f"--sides must be numbers divisible by 8, like 32,64; not {args.sides}")
    log.check_record(args.record)
    device = best_device(args.device)
    for side in map(int, args.sides.split(",")):
        result = bench_compare(side, args.rounds, device)
        if args.record:
            log.record(args.record, None, device, {"what": "compare", **result})


if __name__ == "__main__":
    config.run(main)
