"""metrics.jsonl, written while a run trains, and results lines with all that is needed to repeat a measurement.

One line of metrics.jsonl for every --log-every steps:

    step, images, epoch             where the run is
    loss                            mean over the images, of the squared errors of the bands that each one trains
    loss_bands                      mean squared error of each band over the images that train it, null without any
    grad_norm, lr, skipped          norm before clipping; rate of the last step; steps that were not finite
    images_per_second               over all processes, also ..._per_gpu; seconds_left at this speed
    data_wait                       share of the time spent waiting for data
    mfu, memory_gb                  share of the GPUs' peak FLOP/s and peak memory of the first, null when unknown

starts.jsonl has a line for each start of the run: step, date, commit, hardware, command, versions.
"""

import functools
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import baselines
from config import Config, UserError, explain
from run import checkpoint
from run.memory import forward_flops, meta_model, peak_flops
from run.ranks import Ranks

PATIENCE = 10                                               # steps in a row that are not finite: then training stops


class Log:
    """Adds up on the device; waits for it, and for the other processes, only when a line is written.

    On a terminal a bar shows the progress; elsewhere each line of metrics prints one line. facts: of the data."""

    def __init__(self, cfg: Config, ranks: Ranks, step: int, facts: dict, writer: checkpoint.Writer | None = None):
        self.cfg, self.ranks, self.count = cfg, ranks, facts["count"]
        self.out, self.logger, self.in_a_row, self.writer = Path(cfg.out), None, 0, writer
        self.file, self.peak = self.out / "metrics.jsonl", peak_flops(ranks.device)
        self.flops = forward_flops(meta_model(cfg, facts)) if self.peak else None   # of an image, by stage
        self.shares, self.terminal = baselines.SYSTEMS[cfg.method].schedule(cfg).shares, sys.stderr.isatty()
        self.bar = tqdm(total=cfg.steps, initial=step, desc="training", unit="step", mininterval=0.5,
                        disable=not (ranks.first and self.terminal))
        if ranks.first:
            starts = self.out / "starts.jsonl"
            for file in [self.file, *self.out.glob("scores.jsonl")]:            # not after the last checkpoint
                keep_lines(file, lambda line: line["step"] <= step)
            keep_lines(starts, lambda line: line["step"] < step)                # not of a start that saved nothing
            checkpoint.append_line(starts, {"step": step, **provenance(ranks.device)})
            self.logger = (kind := summary_writer(cfg)) and open_logger(kind, self.out, step)
        self.clear()

    def clear(self) -> None:
        self.rows, self.steps, self.waited, self.began = [], [], 0.0, time.perf_counter()
        self.images_by_stage = [0.0] * self.cfg.num_scales

    def wait_for(self, batches: Iterator) -> Iterable:
        """The next batch; the time until it is there counts as waiting for data."""
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of a checkpoint or of samples."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def add(self, loss: torch.Tensor, errors: list, images: int) -> None:
        """One micro-batch: its loss, and for each active band (t, squared error), one number per example."""
        bands = self.cfg.num_scales
        row = torch.zeros(2 * bands + 1, device=self.ranks.device)              # sum and count by band, loss
        for i, (_, error) in enumerate(errors):
            row[2 * i], row[2 * i + 1] = error.sum(), float(len(error))
        row[2 * bands] = loss.detach() * (images / self.cfg.batch)              # sums to the mean over the batch
        shares = self.shares if self.cfg.stages == "stratified" else [float(s == len(errors) - 1) for s in range(bands)]
        self.images_by_stage = [n + share * images for n, share in zip(self.images_by_stage, shares, strict=True)]
        self.rows.append(row)

    def end_step(self, step: int, grad_norm: torch.Tensor, lr: float) -> None:
        """A step whose gradient is not finite was not applied."""
        self.steps.append((step, len(self.rows), grad_norm.detach()))
        self.lr = lr
        self.bar.update()

    def write(self) -> dict:
        """One line for the steps since the last. Steps that were not applied are named and left out; PATIENCE of them
        in a row raise UserError."""
        rows = self.ranks.sum(torch.stack(self.rows)).cpu().double()                # waits for device and processes
        first, applied, norms = 0, [], torch.stack([norm for _, _, norm in self.steps]).tolist()
        for (step, end, _), norm in zip(self.steps, norms, strict=True):
            row, first = rows[first:end].sum(dim=0).tolist(), end
            self.in_a_row = 0 if math.isfinite(norm) else self.in_a_row + 1
            if math.isfinite(norm):
                applied.append((row, norm))
            else:
                self.complain(step, row, norm)
        line = self.line(applied, time.perf_counter() - self.began)
        if self.ranks.first:
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")
            if self.logger:
                self.logger(line)
            loss, rate = f"{line['loss'] or math.nan:.4f}", f"{line['images_per_second']:.0f}"
            self.bar.set_postfix(loss=loss, images_per_s=rate)
            if not self.terminal:
                print(f"step {line['step']} of {self.cfg.steps}  loss {loss}  {rate} images/s  "
                      f"{tqdm.format_interval(line['seconds_left'])} left", file=sys.stderr, flush=True)
        self.clear()
        return line

    def line(self, applied: list, seconds: float) -> dict:
        """The fields above. applied: (sums, gradient norm) of each step that was finite."""
        cfg, bands, peak, device = self.cfg, self.cfg.num_scales, self.peak, self.ranks.device
        step, images = self.steps[-1][0], len(self.steps) * cfg.batch
        sums = [sum(column) for column in zip(*(row for row, _ in applied), strict=True)] or [0.0] * (2 * bands + 1)
        flops = 3 * sum(n * count for n, count in zip(self.images_by_stage, self.flops or [], strict=False))
        return {
            "step": step, "images": step * cfg.batch, "epoch": step * cfg.batch / self.count,
            "loss": ratio(sums[2 * bands], len(applied)), "skipped": len(self.steps) - len(applied),
            "loss_bands": [ratio(sums[2 * i], sums[2 * i + 1]) for i in range(bands)],
            "grad_norm": ratio(sum(norm for _, norm in applied), len(applied)), "lr": self.lr,
            "images_per_second": images / seconds, "images_per_second_per_gpu": images / seconds / self.ranks.world,
            "data_wait": self.waited / seconds, "mfu": flops / seconds / peak if flops and peak else None,
            "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
            "seconds_left": (cfg.steps - step) * seconds / len(self.steps)}

    def complain(self, step: int, row: list, norm: float) -> None:
        """Names a step that was not applied, or raises UserError when it was one too many."""
        bands = [f"the loss of band {i} is {row[2 * i]}" for i in range(self.cfg.num_scales)
                 if not math.isfinite(row[2 * i])]
        text = f"{', '.join(bands) or f'the norm of the gradient is {norm}'} at step {step}"
        if self.in_a_row < PATIENCE:
            if self.ranks.first:
                print(f"warning: {text}: the step was not applied", file=sys.stderr)
            return
        if self.writer:
            self.writer.wait()
        last = next(iter(checkpoint.steps(self.out)), None)
        good = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
        raise UserError(f"{text}: {PATIENCE} steps in a row were not finite and not applied; training stopped, {good}; "
                        "a lower --lr or a --clip may help")


def keep_lines(file: Path, keep: Callable) -> None:
    """Rewrites a file of JSON lines, or makes an empty one, with the lines for which keep(line) is true."""
    lines, temporary = checkpoint.read_lines([file]), file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines if keep(line)))
    os.replace(temporary, file)


def ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def summary_writer(cfg: Config) -> type | None:
    """What writes for --logger, None without. Raises UserError when its package is missing."""
    if not cfg.logger:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--logger tensorboard needs its package: pip install tensorboard; metrics.jsonl is written "
                        "without it") from None
    return SummaryWriter


def open_logger(kind: type, out: Path, step: int) -> Callable:
    """A function that takes a line of metrics. Lines after `step`, of an earlier start, are hidden."""
    writer = kind(out / "tensorboard", purge_step=step + 1)

    def write(line):
        bands = {f"loss_bands/{i}": loss for i, loss in enumerate(line["loss_bands"])}
        for name, value in {**line, **bands}.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write


# ---------------------------------------------------------------------------------------------------------------------
# results lines


def check_record(file: str | Path | None) -> None:
    """Raises UserError, before the work, when a result could not be appended to the file."""
    if file:
        with explain(f"results cannot be appended to {file}", kinds=OSError):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            open(file, "a").close()


@functools.cache
def commit() -> str:
    """Of this code as it was asked first; "-dirty" with changes, "" without git."""
    if not shutil.which("git"):
        return ""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
                         cwd=Path(__file__).parent)
    return git.stdout.strip()


def provenance(device: torch.device) -> dict:
    """Day, code, machine, command and versions of this process."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {os.cpu_count()} cores"
    program = sys.modules["__main__"].__spec__              # of python -m studies.bench, None of python train.py
    script = ["-m", program.name] if program else [Path(sys.argv[0]).name]
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "hardware": name,
            "command": shlex.join(["python", *script, *sys.argv[1:]]),
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}"}


def record(file: str | Path, cfg: Config | None, device: torch.device, scores: dict) -> None:
    """Appends one line with all that is needed to repeat a measurement; the tables of the README are made from such."""
    line = {**provenance(device), "config": cfg.to_dict() if cfg else None, **scores}
    with explain(f"the result cannot be appended to {file}", f": {json.dumps(scores)}", OSError):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as stream:
            stream.write(json.dumps(line) + "\n")


def cpu_name() -> str:
    """The processor's own name where the system tells it (Linux), its architecture elsewhere."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
