"""Training. `python train.py` takes scikit-learn's digits from nothing to trained, sampled and scored in two minutes.

    python train.py                                          8 x 8 digits, 10 classes, on a laptop's CPU
    python train.py --dataset photos --res 64                crops of two photographs
    python train.py --dataset folder --data DIR --res 64     your own images; subfolders become classes
    torchrun --nproc_per_node=8 train.py --dataset celebahq --res 1024     a row of the paper; latents.py goes before

The same command continues a run that was stopped, on any number of GPUs; --fresh starts it over. The run directory gets
config.json, checkpoints, metrics.jsonl, samples.png, trajectory.png, loss.png and scores.json.
"""

import copy
import math
import os
import sys
import time
from pathlib import Path

import config
import stop

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python train.py [--preset NAME | --dataset NAME] [--setting VALUE ...] [--fresh]")
    config.add_config_flags(PARSER)
    PARSER.add_argument("--fresh", action="store_true", help="delete the run's checkpoints and start over")
    PARSER.add_argument("--dry-run", action="store_true", help="print what the run is and what it costs, and leave")
    PARSER.add_argument("--stop-after", metavar="TIME", default="", help="save and leave after 90s, 50m, 23.5h")
    PARSER.add_argument("--record", metavar="FILE", help="append the scores and how they were made to a .jsonl file")
    PARSER.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    ARGUMENTS = vars(PARSER.parse_args())
    stop.install()

import torch
from tqdm import tqdm

import checkpoint
import data
import fid
import pictures
import plan
import report
import runs
import sample
from config import Config, UserError
from metrics import Metrics, culprits
from ranks import GradientSync, Ranks

FUSED = ("cpu", "cuda")                                     # devices with a fused AdamW


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, then a cosine from lr to lr_end."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr_end + (cfg.lr - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def update_ema(ema: torch.nn.Module, model: torch.nn.Module, decay: float, step: int) -> None:
    """ema <- decay ema + (1 - decay) model, in float32. The decay rises with the step, so short runs average too."""
    decay = min(decay, (1 + step) / (10 + step))            # not in paper
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Training:
    """A run in training: what a step needs, and what a checkpoint holds."""

    def __init__(self, cfg: Config, ranks: Ranks, dataset: data.Dataset):
        """Model, optimizer, and this process's rows of every batch. Raises UserError for what does not go together."""
        self.cfg, self.ranks, self.dataset, self.device = cfg, ranks, dataset, ranks.device
        self.out, self.facts, self.step = Path(cfg.out), data.facts(dataset), 0
        self.schedule, self.loss, _ = sample.method(cfg)
        dataset.to(self.device)
        share, free = max(1, cfg.batch // ranks.world), ranks.least(plan.free_memory(self.device))
        model = runs.build_model(cfg, dataset.channels, len(dataset.classes), dataset.side).to(self.device)
        micro_batch = cfg.micro_batch or plan.fit_micro_batch(model, cfg, share, free, ranks.world)
        self.rows = ranks.rows(cfg.batch, micro_batch)
        self.most = max(rows.stop - rows.start for rows in self.rows)           # images at a time
        if cfg.stages == "stratified" and self.rows[0].stop - self.rows[0].start < cfg.num_scales:
            raise UserError(f"stratified stages need {cfg.num_scales} images at a time in every process, not "
                            f"{self.rows[0].stop - self.rows[0].start}: fewer processes, a larger --micro-batch, or "
                            "--stages batch")
        self.model, self.ema = model, copy.deepcopy(model).requires_grad_(False) if cfg.ema else None
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2),
                                           weight_decay=cfg.weight_decay, fused=self.device.type in FUSED)

    def begin(self, fresh: bool) -> runs.Run:
        """From the newest checkpoint, --init, or nothing; the same in all processes. Returns what will be sampled."""
        cfg, ranks = self.cfg, self.ranks
        kept = cfg.keep + 1 + (cfg.steps // cfg.keep_every if cfg.keep_every else 0)
        room = kept * self.model.count_parameters() * (16 if cfg.ema else 12)
        ranks.first_does(lambda: checkpoint.prepare(self.out, fresh, room))
        state = ranks.first_does(lambda: checkpoint.load_newest(self.out))
        self.step = ranks.share(state["step"] if state else 0)                  # only the first process has read it
        self.renew = False                                  # a finished run, now with other settings for its samples
        if self.step:
            self.restore(state or checkpoint.read(checkpoint.path(self.out, self.step), checked=True))
        elif cfg.init:
            for text in runs.fine_tune(self.model, cfg.init, self.facts["classes"], self.facts["latent"]):
                ranks.say(text)
            if self.ema is not None:
                self.ema.load_state_dict(self.model.state_dict())
        self.resumed, self.sync = self.step > 0, GradientSync(self.model, ranks)
        if cfg.compile:
            runs.compile_blocks(self.model)
        if ranks.first:
            (self.out / "config.json").write_text(config.show(cfg) + "\n")
        ranks.say(f"{config.show(cfg)}\n{plan.describe(cfg, self.facts, ranks.world)}\n"
                  f"batch      {cfg.batch} = {ranks.world} processes x {len(self.rows)} micro-batches x at most "
                  f"{self.most} images, on {self.device}")
        weights, name = (self.ema, "ema") if self.ema is not None else (self.model, "raw")
        run = runs.Run(cfg, weights, self.facts, self.out, self.step, name)
        ranks.first_does(run.ready)                         # what samples need: if it is not there, say so now
        if self.step < cfg.steps:
            (self.out / "scores.json").unlink(missing_ok=True)                  # of a shorter run
        return run

    def restore(self, state: dict) -> None:
        """Continues a checkpoint. Raises UserError when it is of another run."""
        cfg, old = self.cfg, Config.from_dict(state["config"])
        changed = [f"{name} was {getattr(old, name)!r} and is now {getattr(cfg, name)!r}"
                   for name in config.differences(old, cfg)]
        if changed:
            raise UserError(f"the run in {self.out} was made with other settings: {'; '.join(changed)}. "
                            "Choose another directory with --out, or start over with --fresh")
        if any(self.facts[name] != state["data"].get(name, self.facts[name]) for name in self.facts):
            raise UserError(f"the run in {self.out} was trained on other images or classes than there are now: "
                            "choose another directory with --out, or start over with --fresh")
        self.model.load_state_dict(state["model"])
        for group in state["optimizer"]["param_groups"]:    # of the device it was saved on
            group["fused"] = self.optimizer.defaults["fused"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.ranks.say(f"continuing {self.out} at step {self.step} of {cfg.steps} (--fresh starts over)")
        if cfg.steps != old.steps:
            self.ranks.say(f"the run was planned for {old.steps} steps: the learning rate now follows the new length")
        self.renew = self.step >= cfg.steps and state["config"] != cfg.to_dict()

    def save(self) -> None:
        state = {"step": self.step, "config": self.cfg.to_dict(), "data": self.facts, "model": self.model.state_dict(),
                 "ema": self.ema.state_dict() if self.ema is not None else None,
                 "optimizer": self.optimizer.state_dict()}
        self.ranks.first_does(lambda: checkpoint.save(self.out, state, self.cfg.keep, self.cfg.keep_every))

    def losses(self, step: int, part: slice, raw: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, list]:
        """Algorithm 1 for some rows of a step's batch; every random number comes from (seed, step)."""
        rng = data.BatchRandom(self.cfg.seed, step, self.cfg.batch, part, self.device)
        x1 = self.dataset.x1(raw.to(self.device, non_blocking=True), rng)       # (B, C, H, W)
        if y is not None:                                   # one draw per example, shared by all bands
            y = y.to(self.device, non_blocking=True)
            y = torch.where(rng.rand() < self.cfg.label_drop, self.model.num_classes, y)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.precision == "bfloat16"):
            return self.loss(self.model, x1, y, self.schedule, rng)

    def update(self, micro_batches: list, metrics: Metrics) -> None:
        """One step: the gradient of the whole batch, AdamW, the average. Waits for no device where AdamW is fused."""
        self.optimizer.zero_grad(set_to_none=True)
        step_loss = 0.0
        for part, (raw, y) in zip(self.rows, micro_batches, strict=True):
            total, errors = self.losses(self.step, part, raw, y)
            self.sync.expect(len(errors), last=part is self.rows[-1])
            total.backward()
            step_loss = step_loss + total.detach()
            metrics.add(errors, total, part.stop - part.start)
        self.sync.finish()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.cfg, self.step)
        # what is not finite is not applied; the fused optimizer sees to it, without waiting for the device
        bad = self.ranks.sum((~(grad_norm + step_loss).isfinite()).float()).clamp(max=1)
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = bad
        if self.optimizer.defaults["fused"] or not bad:
            self.optimizer.step()
        if self.ema is not None:
            update_ema(self.ema, self.model, self.cfg.ema, self.step)
        self.step += 1
        metrics.end_step(self.step, grad_norm, bad)


def main(cfg: Config, fresh: bool = False, device: str | None = None, record: str | None = None,
         stop_after: float = math.inf) -> None:
    """Trains a run to cfg.steps, from its newest checkpoint if there is one, then samples and scores it.

    stop_after: seconds after which it saves and leaves. In each process that torchrun starts, or in a single one.
    """
    began, handlers, ranks = time.perf_counter(), stop.install(), Ranks.start(device)
    try:
        stop.wait(ranks.world > 1)                          # a signal now ends one process; several leave together
        run, dataset, resumed = train(cfg, fresh, ranks, record, began + stop_after)
    finally:
        ranks.stop()
        stop.restore(handlers)
    if not ranks.first or run is None:
        return
    pictures.draw_loss(run.folder)
    with torch.compiler.set_stance("force_eager"):          # compiled graphs are for training's shapes
        scores = report.finish(run, dataset)
    if not resumed:
        scores["seconds_total"] = time.perf_counter() - began
    if record:
        fid.record(Path(record), cfg, run.device, scores)
    print(f"time       {time.perf_counter() - began:.0f} s in all" + (", since it was continued" if resumed else ""))
    files = sorted(path.name for path in run.folder.iterdir() if path.is_file())
    print(f"wrote      {', '.join(files)} in {run.folder}")
    print(f"next       python sample.py {run.folder}    python fid.py {run.folder}")


def train(cfg: Config, fresh: bool, ranks: Ranks, record: str | None, deadline: float,
          dataset: data.Dataset | None = None) -> tuple[runs.Run | None, data.Dataset, bool]:
    """The loop. Returns the trained run (None when it was asked to stop), its data, and whether it was continued."""
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")              # TF32 where a GPU computes in float32
    sample.check_solver(cfg.solver, cfg.solver_steps, "--solver-steps")
    fid.check_record(record)
    if cfg.space == "pixel":                                # what does not fit is said before a folder is read
        plan.meta_model(cfg, 1, 0, cfg.res)
    dataset = dataset or data.load(cfg)
    runs.check_guidance(cfg, cfg.cfg_scale, dataset.classes)
    job = Training(cfg, ranks, dataset)
    run = job.begin(fresh)
    stop.wait(True)                                         # from here on it lets the step end: save, and leave
    metrics, ending = Metrics(cfg, job.out, job.step, ranks, job.model, len(dataset)), False
    batches = data.read_ahead(dataset, cfg, job.step, job.rows, pin=job.device.type == "cuda")
    bar = tqdm(total=cfg.steps, initial=job.step, desc="training", unit="step", mininterval=0.5,
               disable=not ranks.first)
    try:
        while job.step < cfg.steps and not ending:
            job.update(metrics.waiting_for(batches), metrics)
            bar.update()
            ending = ranks.any(stop.asked or time.perf_counter() > deadline) or job.step == cfg.steps
            saving = job.step % cfg.save_every == 0 or ending
            if job.step % cfg.log_every == 0 or saving:
                line = metrics.write(job.optimizer.param_groups[0]["lr"], lambda at: culprits(job, at))
                bar.set_postfix(loss=f"{line['loss'] or math.nan:.4f}", images_per_s=f"{line['images_per_second']:.0f}")
            run.step, pause = job.step, time.perf_counter()
            if saving:
                job.save()
            if ranks.first and not ending:
                report.glance(run, dataset)
            metrics.pause(pause)
    except RuntimeError as problem:
        if isinstance(problem, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(problem):
            raise plan.too_large(job.model, cfg, job.most, ranks) from None
        raise
    finally:
        bar.close()
        batches.close()
    if job.step < cfg.steps:
        ranks.say(f"stopped at step {job.step}, saved; the same command continues")
        return None, dataset, job.resumed
    if job.renew:                                           # sample.py reads the settings there
        job.save()
    late = "stopped: the training is saved, the same command draws its samples"
    if ranks.any(stop.asked):                               # in the last step
        ranks.say(late)
        return None, dataset, job.resumed
    stop.wait(False, late)                                  # nothing is left to save: a signal ends it at once
    run.model.eval().requires_grad_(False)
    return run, dataset, job.resumed


if __name__ == "__main__":
    try:
        extra = {name: ARGUMENTS.pop(name) for name in ("fresh", "device", "record", "stop_after", "dry_run")}
        extra["stop_after"] = config.seconds(extra["stop_after"])
        if extra.pop("dry_run"):
            print(plan.dry_run(config.resolve(ARGUMENTS)))
        else:
            main(config.resolve(ARGUMENTS), **extra)
    except UserError as problem:
        sys.exit(f"error{' in process ' + os.environ['RANK'] if 'RANK' in os.environ else ''}: {problem}")
