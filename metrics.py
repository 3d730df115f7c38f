"""What a training run says of itself: metrics.jsonl, the terminal, and TensorBoard or Weights & Biases when asked.

One line of metrics.jsonl for every --log-every steps:

    step, images, epoch             where the run is
    loss, loss_bands                mean squared error of each band, null when no step used it; loss: their sum
    loss_bins                       for each band, by time: ten bins of [0, 1], null where nothing was drawn
    grad_norm, lr                   before clipping; of the last step
    images_per_second               over all processes; images_per_second_per_gpu; data_wait: share of the time spent
                                    waiting for data
    mfu                             share of the GPUs' peak, null when that is unknown
    memory_gb                       peak of the first process's GPU, null on a CPU
    seconds_left                    at this speed
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import checkpoint
import data
import plan
from config import Config, UserError
from model import MoTDiT
from ranks import Ranks

BINS = 10
PATIENCE = 10                                               # steps in a row that are not finite: then training stops


class Metrics:
    """Adds up on the device; waits for it, and for the other processes, only when a line is written."""

    def __init__(self, cfg: Config, out: Path, step: int, ranks: Ranks, model: MoTDiT, epoch: int):
        """Lines of steps after `step`, left by a run that was killed after its last checkpoint, are dropped."""
        self.cfg, self.out, self.ranks, self.model, self.epoch = cfg, out, ranks, model, epoch
        self.file, self.logger = out / "metrics.jsonl", None
        if ranks.first:
            lines = self.file.read_text().splitlines() if self.file.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, self.file)
            self.logger = open_logger(cfg, out)
        self.in_a_row = 0
        self.clear()

    def clear(self) -> None:
        self.rows, self.norms, self.steps = [], [], []
        self.bins = torch.zeros(2, self.cfg.num_scales, BINS, device=self.ranks.device)     # sum of errors, count
        self.flops, self.waited, self.began = 0.0, 0.0, time.perf_counter()

    def add(self, errors: list, total: torch.Tensor, images: int) -> None:
        """One micro-batch; errors: for each active band (t, squared error), one number per example; total: its loss."""
        bands = self.cfg.num_scales                         # sum and count by band, loss, and how many errors are not
        row = torch.zeros(2 * bands + 1 + bands * BINS, device=self.ranks.device)   # finite, by band and time
        for i, (t, error) in enumerate(errors):
            row[2 * i], row[2 * i + 1] = error.sum(), float(len(error))
            place = (t * BINS).long().clamp(max=BINS - 1)
            finite = error.isfinite()
            for plane, values in enumerate((torch.where(finite, error, 0), finite)):
                self.bins[plane, i].index_add_(0, place, values.float())
            row[2 * bands + 1 :].view(bands, BINS)[i].index_add_(0, place, (~finite).float())
        row[2 * bands] = total.detach()
        flops = self.model.flops(len(errors) - 1) if self.cfg.stages == "batch" else self.model.mean_flops()
        self.flops += 3 * images * flops                    # backward is two forwards
        self.rows.append(row)

    def end_step(self, step: int, grad_norm: torch.Tensor, bad: torch.Tensor) -> None:
        """bad: 1 when loss or gradient were not finite, and the step was not applied."""
        self.steps.append((step, len(self.rows)))
        self.norms.append(torch.stack([grad_norm, bad]))

    def waiting_for(self, batches: Iterator[list]) -> list:
        """The next of them; the time until it is there counts as waiting for data."""
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def pause(self, began: float) -> None:
        """Leaves out the time since `began`, of a checkpoint or of samples."""
        self.began += time.perf_counter() - began

    def write(self, lr: float, culprits: Callable = lambda step: []) -> dict:
        """One line for the steps since the last. Steps that were not applied are named, with band and times, and left
        out; after PATIENCE of them in a row: UserError. culprits(step): which images of this process did it."""
        rows = self.ranks.sum(torch.stack(self.rows)).double().cpu()                # waits for device and processes
        bins, norms = self.ranks.sum(self.bins).cpu(), torch.stack(self.norms).tolist()
        seconds, cfg, first, losses, kept = time.perf_counter() - self.began, self.cfg, 0, [], []
        for (step, end), (norm, bad) in zip(self.steps, norms, strict=True):
            row, first = rows[first:end].sum(dim=0).tolist(), end
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if bad:
                self.complain(step, row, norm, culprits)
            else:
                losses.append(row[2 * cfg.num_scales])
                kept.append((row, norm))
        step, images = self.steps[-1][0], len(self.steps) * cfg.batch
        sums = [sum(column) for column in zip(*(row for row, _ in kept), strict=True)] or [0.0] * (2 * cfg.num_scales)
        peak, cuda = plan.peak_flops(self.ranks.device), self.ranks.device.type == "cuda"
        line = {
            "step": step, "images": step * cfg.batch, "epoch": step * cfg.batch / self.epoch,
            "loss": ratio(sum(losses), len(losses)), "skipped": len(self.steps) - len(losses),
            "loss_bands": [ratio(sums[2 * i], sums[2 * i + 1]) for i in range(cfg.num_scales)],
            "loss_bins": [[ratio(s, n) for s, n in zip(*band, strict=True)]
                          for band in bins.transpose(0, 1).tolist()],
            "grad_norm": ratio(sum(norm for _, norm in kept), len(kept)), "lr": lr,
            "images_per_second": images / seconds, "images_per_second_per_gpu": images / seconds / self.ranks.world,
            "data_wait": self.waited / seconds, "mfu": self.flops / seconds / peak if peak else None,
            "memory_gb": torch.cuda.max_memory_allocated(self.ranks.device) / 1e9 if cuda else None,
            "seconds_left": (cfg.steps - step) * seconds / len(self.steps)}
        if self.ranks.first:
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")
            if self.logger:
                self.logger(line)
        self.clear()
        return line

    def complain(self, step: int, row: list, norm: float, culprits: Callable) -> None:
        """Names a step that was not applied, or raises UserError when it was one too many. All processes are here."""
        scales = self.cfg.num_scales
        bins = [row[2 * scales + 1 + i * BINS :][:BINS] for i in range(scales)]
        bands = [f"the loss of band {i} is {row[2 * i]} at t in " + ", ".join(
            f"[{n / BINS:g}, {(n + 1) / BINS:g})" for n in range(BINS) if bins[i][n])
            for i in range(scales) if not math.isfinite(row[2 * i])]
        text = f"{', '.join(bands) or f'the norm of the gradient is {norm}'} at step {step}"
        if self.in_a_row == 1 or self.in_a_row == PATIENCE:                         # the first of them, and the last
            found = sum(self.ranks.gather(culprits(step)), [])
            if found:
                text += f" (image {', '.join(found[:8])}{' and others' if len(found) > 8 else ''} of the data)"
        if self.in_a_row < PATIENCE:
            if self.ranks.first:
                print(f"warning: {text}: the step was not applied", file=sys.stderr)
            return
        last = next(iter(checkpoint.steps(self.out)), None)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
        raise UserError(f"{text}: {PATIENCE} steps in a row were not finite and not applied; training stopped, {kept}; "
                        "a lower --lr or a --clip may help")


def culprits(job, step: int) -> list[str]:
    """Numbers of this process's images that make the loss of a step not finite: each again, alone, with the weights as
    they are now. Empty when none does so by itself. job: the train.Training."""
    index = data.order(len(job.dataset), job.cfg.seed, (step - 1) * job.cfg.batch, job.cfg.batch)
    found = []
    for row in range(job.rows[0].start, job.rows[-1].stop):
        one = slice(row, row + 1)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):             # compiled: for whole batches
            total, _ = job.losses(step - 1, one, *data.read_step(job.dataset, job.cfg, step - 1, [one])[0])
        if not torch.isfinite(total):
            found.append(str(index[row]))
    return found


def ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def open_logger(cfg: Config, out: Path) -> Callable | None:
    """A function that takes a line of metrics, or None. Raises UserError when the package is missing; never asks."""
    if not cfg.logger:
        return None
    try:
        if cfg.logger == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
        else:
            import wandb
    except ImportError:
        raise UserError(f"--logger {cfg.logger} needs its package: pip install {cfg.logger}; metrics.jsonl is written "
                        "without it") from None
    if cfg.logger == "tensorboard":
        writer = SummaryWriter(out / "tensorboard")

        def write(line):
            for name, value in flat(line).items():
                writer.add_scalar(name, value, line["step"])
            writer.flush()
    else:
        netrc = Path.home() / ".netrc"
        key = os.environ.get("WANDB_API_KEY") or (netrc.exists() and "wandb" in netrc.read_text())
        mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")     # without a key it would ask for one
        run = wandb.init(project="lapflow", name=out.name, id=re.sub(r"\W+", "-", out.name), resume="allow", dir=out,
                         config=cfg.to_dict(), mode=mode)

        def write(line):
            run.log(flat(line), step=line["step"])
    return write


def flat(line: dict, above: str = "") -> dict:
    """Numbers only, with the places of lists in their names: loss_bins/1/7."""
    result = {}
    for name, value in line.items():
        if isinstance(value, list):
            result.update(flat(dict(enumerate(value)), f"{above}{name}/"))
        elif value is not None:
            result[f"{above}{name}"] = value
    return result
