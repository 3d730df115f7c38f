"""Training. `python train.py` takes scikit-learn's digits from nothing to trained, sampled and scored in two minutes.

    python train.py                                          8 x 8 digits, 10 classes, on a laptop's CPU
    python train.py --dataset fashion                        Fashion-MNIST at 32 x 32, half an hour on one core
    python train.py --dataset folder --data DIR --res 64     your own images; subfolders become classes
    torchrun --nproc_per_node=8 train.py --dataset celebahq --res 1024     a row of the paper; data.latents goes before

The same command continues a run that was stopped, on any number of GPUs; --fresh starts it over. The run directory gets
config.json, starts.jsonl, checkpoints, metrics.jsonl, samples.png, trajectory.png, loss.png and scores.json.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import baselines
import config
import fid
import sample
from config import Config, UserError
from data import batches, conditions
from run import checkpoint, gallery, load, log, memory, paper, pictures
from run.ranks import Ranks, StopSignals, has_bfloat16, within_memory

FUSED = ("cpu", "cuda")                                     # devices with a fused AdamW


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, then a cosine from lr to lr_end."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / (cfg.steps - cfg.warmup)
    return cfg.lr_end + (cfg.lr - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema <- decay ema + (1 - decay) model, in float32. The decay rises with the step, so short runs average too."""
    decay = min(decay, (1 + step) / (10 + step))            # not in paper
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Objective(nn.Module):
    """The training loss as a module, so that DistributedDataParallel can wrap it: (x1, y, rng) -> loss, errors."""

    def __init__(self, model: nn.Module, loss: Callable, schedule: object, precision: str):
        super().__init__()
        self.model, self.loss, self.schedule, self.bfloat16 = model, loss, schedule, precision == "bfloat16"

    def forward(self, x1: Tensor, y: Tensor | None, rng: batches.BatchRandom) -> tuple[Tensor, list]:
        with torch.autocast(x1.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.loss(self.model, x1, y, self.schedule, rng)


@dataclass
class Job:
    """A run in training: what a step needs, and what a checkpoint holds."""

    cfg: Config
    ranks: Ranks
    dataset: batches.Dataset
    facts: dict                                             # of the data, see data.batches.facts
    model: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    parts: memory.Parts                                     # this process's rows of each batch, in micro-batches
    writer: checkpoint.Writer
    step: int = 0
    resumed_at: int = 0
    began: float = 0.0                                      # time.perf_counter() of this process's start


def setup(cfg: Config, ranks: Ranks) -> Job:
    """Data, model, optimizer, and this process's rows of every batch."""
    if cfg.precision == "bfloat16" and not has_bfloat16(ranks.device):
        raise UserError(f"{ranks.device} is too old to compute in bfloat16: add --precision float32")
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")              # TF32 where a GPU computes in float32
    dataset = batches.load(cfg)
    dataset.to(ranks.device)
    facts = batches.facts(dataset)
    model = load.build_model(cfg, facts, dataset.examples(), ranks.device).to(ranks.device)
    conditions.check_guidance(model.condition, cfg.label_drop, cfg.cfg_scale)
    parts = memory.split_batch(model, cfg, ranks)
    ema = copy.deepcopy(model).requires_grad_(False) if cfg.ema else None
    optimizer = ranks.optimizer(list(model.parameters()), cfg.shard, lr=cfg.lr, betas=(0.9, cfg.beta2),
                                weight_decay=cfg.weight_decay, fused=ranks.device.type in FUSED)
    return Job(cfg, ranks, dataset, facts, model, ema, optimizer, parts, checkpoint.Writer(cfg, ranks))


def resume(job: Job, fresh: bool) -> None:
    """Starts from the newest checkpoint, else from --init, else from new weights; the same in all processes."""
    cfg, ranks, out = job.cfg, job.ranks, Path(job.cfg.out)
    count = cfg.keep + 1 + (cfg.steps // cfg.keep_every if cfg.keep_every else 0)
    room = count * memory.parameters(job.model) * (16 if cfg.ema else 12)       # bytes: weights, two moments, EMA
    state = ranks.first_does(lambda: None if fresh else checkpoint.load_newest(out))
    job.step = job.resumed_at = ranks.share(state["step"] if state else 0)      # only the first process has read it
    if job.step:
        state = state or checkpoint.read(checkpoint.path(out, job.step), checked=True)
        checkpoint.check_same_run(state, cfg, job.facts)
        job.model.load_state_dict(state["model"])
        if job.ema is not None:
            job.ema.load_state_dict(state["ema"])
        ranks.restore(job.optimizer, state["optimizer"])
        ranks.say(f"continuing {out} at step {job.step} of {cfg.steps} (--fresh starts over)")
        if cfg.steps != state["config"]["steps"]:
            ranks.say(f"planned for {state['config']['steps']} steps before: the learning rate follows the new length")
    elif cfg.init:
        ranks.say(load.fine_tune(job.model, cfg.init, job.facts))
        if job.ema is not None:
            job.ema.load_state_dict(job.model.state_dict())
    # from here on an old run is gone
    ranks.first_does(lambda: checkpoint.prepare(cfg, fresh, room, finished=job.step >= cfg.steps))


def save(job: Job) -> None:
    """Called in all processes; a thread of the first one writes the file while they go on."""
    state = {"step": job.step, "config": job.cfg.to_dict(), "data": job.facts, "model": job.model.state_dict(),
             "ema": job.ema.state_dict() if job.ema is not None else None,
             "optimizer": job.ranks.optimizer_state(job.optimizer)}
    job.writer.save(state)


def loop(job: Job, stop: StopSignals, deadline: float) -> None:
    """Trains to cfg.steps, or until a signal or the deadline asks it to save and return."""
    cfg, ranks, model, optimizer = job.cfg, job.ranks, job.model, job.optimizer
    system, several = baselines.SYSTEMS[cfg.method], ranks.world > 1
    if cfg.compile:
        load.compile_blocks(model)
    objective = Objective(model, system.loss, system.schedule(cfg), cfg.precision)
    # one stage for a whole batch leaves the finer bands without gradients; so may a rare stage
    unused = cfg.stages == "batch" or len(set(objective.schedule.shares)) > 1
    objective = ranks.parallel(objective, unused, objective.bfloat16)
    metrics = log.Log(cfg, ranks, job.step, job.facts, job.writer)
    stream = batches.micro_batches(job.dataset, cfg, job.step, job.parts.of_step, ranks.device, model.condition)
    ending = job.step >= cfg.steps
    if ending:                                              # nothing left to train: keeps new settings for sample.py
        save(job)
    while not ending:
        lr = optimizer.param_groups[0]["lr"] = learning_rate(cfg, job.step)
        optimizer.zero_grad(set_to_none=True)
        parts = job.parts.of_step(job.step)
        for part, (x1, y, rng) in zip(parts, metrics.wait_for(stream), strict=True):
            with objective.no_sync() if several and part is not parts[-1] else nullcontext():
                loss, errors = objective(x1, y, rng)
                (loss / len(parts)).backward()
            metrics.add(loss, errors, len(x1))
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        ranks.step(optimizer, grad_norm)                    # left out when the norm is not finite
        if job.ema is not None:
            update_ema(job.ema, model, cfg.ema, job.step)
        job.step += 1
        metrics.end_step(job.step, grad_norm, lr)
        ending = ranks.any(stop.asked or job.writer.failed or time.perf_counter() > deadline) or job.step == cfg.steps
        saving = job.step % cfg.save_every == 0 or ending
        if job.step % cfg.log_every == 0 or saving:
            metrics.write()
        with metrics.paused():
            if saving:
                save(job)
            if ranks.first and not ending:
                glance(job)
    metrics.bar.close()
    stream.close()


# ---------------------------------------------------------------------------------------------------------------------
# samples and scores


def trained(job: Job) -> load.Run:
    """What is sampled: the averaged weights where there are some."""
    model, name = (job.model, "raw") if job.ema is None else (job.ema, "ema")
    return load.Run(job.cfg, model, job.facts, Path(job.cfg.out), job.step, name)


def draw(run: load.Run, num: int, progress: bool = True) -> tuple:
    """Images, their conditions, and the report of what they cost."""
    y = None if run.condition is None else run.condition.draw(num).cpu()
    with run.eager():
        images, report = sample.generate(run, num, y, progress=progress, **load.solver_settings(run.cfg))
    return images, y, report


def glance(job: Job) -> None:
    """During training: draws a grid and scores samples, each at its interval. Errors are only reported."""
    cfg, run, precision = job.cfg, trained(job), torch.get_float32_matmul_precision()
    try:
        if cfg.sample_every and job.step % cfg.sample_every == 0:
            images, y, _ = draw(run, 16, progress=False)
            pictures.draw_grid(run.folder / f"samples-{job.step:08d}.png", images, y, run.condition)
        if cfg.eval_every and job.step % cfg.eval_every == 0:
            images, y, report = draw(run, cfg.num_samples, progress=False)
            checkpoint.append_line(run.folder / "scores.jsonl",
                                   {**report, **fid.evaluate(job.dataset, images, y, run.decode)})
    except (UserError, OSError, torch.OutOfMemoryError) as problem:
        print(f"no samples at step {job.step}: {problem}; training goes on", file=sys.stderr)
    torch.set_float32_matmul_precision(precision)           # sampling sets it to full


def finish(job: Job, record: str | None = None) -> dict:
    """Samples, pictures and scores of a trained run; the scores are also appended to the file `record`."""
    run, cfg = trained(job), job.cfg
    run.model.eval().requires_grad_(False)
    images, y, scores = draw(run, cfg.num_samples)
    pictures.draw_loss(run.folder)
    pictures.draw_grid(run.folder / "samples.png", images, y, run.condition)
    states = pictures.watch(run, sample.Guided(run.model, cfg.cfg_scale), sample.solve, y)
    pictures.draw_trajectory(run.folder / "trajectory.png", run, states)
    print(gallery.describe(scores))
    try:
        scores |= fid.evaluate(job.dataset, images, y, run.decode)
        print(fid.table(scores))
    except UserError as problem:                            # a handful of images trains, but cannot be scored
        print(f"no scores  {problem}")
    (run.folder / "scores.json").write_text(json.dumps(scores, indent=2))
    seconds = time.perf_counter() - job.began
    if record:
        log.record(record, cfg, run.device, scores if job.resumed_at else {**scores, "seconds_total": seconds})
    print(f"time       {seconds:.0f} s{' since it was continued' if job.resumed_at else ''}\n"
          f"next       ls {cfg.out}    python sample.py {cfg.out}    python fid.py {cfg.out}")
    return scores


def train(cfg: Config, fresh: bool = False, device: str | None = None, stop_after: float = math.inf) -> Job | None:
    """Trains a run to cfg.steps, from its newest checkpoint if there is one; for at most `stop_after` seconds, then it
    saves. Called in each process that torchrun starts. The first returns the finished run, None when it was stopped."""
    began = time.perf_counter()
    with (StopSignals("stopped before the first step; the same command starts again") as stop,
          Ranks.start(device) as ranks):
        with within_memory(ranks.device):
            job = setup(cfg, ranks)
            job.began = began
            # what samples need, such as the autoencoder, or the log: if it is missing, say so now
            ranks.first_does(lambda: log.summary_writer(cfg))
            ranks.first_does(load.Run(cfg, job.model, job.facts, Path(cfg.out), 0, "raw").ready)
            resume(job, fresh and not ranks.restarted)
        ranks.say(memory.summary(job.model, cfg, job.facts, job.parts, ranks))
        stop.immediate = False                              # from here on a signal lets the step end: save, and return
        with memory.explained(job.model, cfg, job.parts, ranks), job.writer:
            loop(job, stop, began + stop_after)
        stopped = ranks.any(stop.asked)                     # perhaps in the last step
        if job.step < cfg.steps or stopped:
            again = "the same command without --fresh" if fresh else "the same command"
            ranks.say(f"stopped at step {job.step}, saved; {again} continues")
        return job if ranks.first and job.step >= cfg.steps and not stopped else None


def main() -> None:
    parser = config.parser(__doc__, "python train.py [--preset NAME | --dataset NAME] [--setting VALUE ...] [--fresh]")
    config.add_config_flags(parser)
    parser.add_argument("--fresh", action="store_true", help="delete the run's checkpoints and start over")
    parser.add_argument("--dry-run", action="store_true", help="print what the run is and what it costs, and leave")
    parser.add_argument("--stop-after", metavar="TIME", default="", help="save and leave after 90s, 50m, 23.5h")
    parser.add_argument("--record", metavar="FILE", help="append the scores and how they were made to a .jsonl file")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    given = vars(parser.parse_args())
    fresh, dry_run, stop_after, record, device = (
        given.pop(name) for name in ("fresh", "dry_run", "stop_after", "record", "device"))
    cfg, stop_after = paper.resolve(given), config.seconds(stop_after)
    if dry_run:
        return print(memory.describe(cfg))
    log.check_record(record)
    StopSignals.ignore()
    if job := train(cfg, fresh, device, stop_after):
        with StopSignals("stopped: the training is saved, the same command draws its samples", immediate=True):
            finish(job, record)


if __name__ == "__main__":
    config.run(main)
