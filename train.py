"""Training. `python train.py` takes scikit-learn's digits from nothing to trained, sampled and scored in three minutes.

    python train.py                                          8 x 8 digits, 10 classes, on a laptop's CPU
    python train.py --dataset photos --res 64                crops of two photographs
    python train.py --dataset folder --data DIR --res 64     your own images; subfolders become classes

The same command continues a run that was stopped; --fresh starts it over. The run directory gets config.json,
checkpoints, metrics.jsonl, samples.png, trajectory.png, loss.png and scores.json.
"""

import copy
import json
import math
import signal
import sys
import time
from pathlib import Path

import config

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python train.py [--dataset NAME] [--setting VALUE ...] [--fresh]")
    config.add_config_flags(PARSER)
    PARSER.add_argument("--fresh", action="store_true", help="delete the run's checkpoints and start over")
    PARSER.add_argument("--record", metavar="FILE", help="append the scores and how they were made to a .jsonl file")
    PARSER.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    ARGUMENTS = vars(PARSER.parse_args())

import torch
from tqdm import tqdm

import checkpoint
import data
import fid
import pictures
import sample
from config import Config, UserError
from schedule import Schedule, loss

# Settings that may differ when a run is continued: they do not change what was trained so far.
FREE = {"out", "steps", "solver", "rtol", "atol", "solver_steps", "cfg_scale", "num_samples", "log_every", "save_every"}


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, then a cosine from lr to lr_end."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr_end + (cfg.lr - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def update_ema(ema, model, decay: float, step: int) -> None:
    """ema <- decay ema + (1 - decay) model, in float32. The decay rises with the step, so short runs average too."""
    decay = min(decay, (1 + step) / (10 + step))            # not in paper
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def prepare_folder(cfg: Config, fresh: bool) -> Path:
    """The run directory, writable, emptied of an old run when asked. Raises UserError when it cannot be used."""
    out = Path(cfg.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
        if fresh:
            for old in [*checkpoint.steps(out), out / "metrics.jsonl"]:
                old.unlink(missing_ok=True)
    except OSError as problem:
        raise UserError(f"the run directory {out} cannot be written: {problem}; choose another with --out") from None
    return out


def check_same(cfg: Config, saved: dict, out: Path) -> None:
    """Raises UserError, naming the settings, when the checkpoint belongs to another configuration."""
    now = cfg.to_dict()
    changed = [f"{name} was {saved.get(name)!r} and is now {now[name]!r}"
               for name in now if name not in FREE and saved.get(name) != now[name]]
    if changed:
        raise UserError(f"the run in {out} was made with other settings: {'; '.join(changed)}. "
                        "Choose another directory with --out, or start over with --fresh")


class Metrics:
    """metrics.jsonl, and the guard against losses that are not finite; waits for the device only when it writes."""

    def __init__(self, out: Path, step: int):
        """Lines of steps after `step`, left by a run that was killed after its last checkpoint, are dropped."""
        self.file, self.out, self.pending, self.began = out / "metrics.jsonl", out, [], time.perf_counter()
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self.file.write_text("".join(line + "\n" for line in kept))

    def add(self, step: int, errors: list, total: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """errors: for each active band (t, squared error), one number per example; total: the loss itself."""
        self.pending.append((step, [error.mean() for _, error in errors] + [total.detach(), grad_norm]))

    def write(self, cfg: Config, lr: float) -> dict:
        """One line for the steps since the last. Raises UserError, with step and band, at a loss that is not finite."""
        values = iter(torch.stack([v for _, row in self.pending for v in row]).tolist())    # waits for the device
        rows = [(step, [next(values) for _ in row]) for step, row in self.pending]
        for step, (*bands, total, grad_norm) in rows:
            named = [(f"loss of band {i}", v) for i, v in enumerate(bands)] + [("loss", total), ("gradient", grad_norm)]
            for what, value in named:
                if not math.isfinite(value):
                    last = next(iter(checkpoint.steps(self.out)), None)
                    kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
                    raise UserError(f"the {what} is {value} at step {step}: training stopped, {kept}; "
                                    "a lower --lr or a --clip may help")
        seconds, self.began = time.perf_counter() - self.began, time.perf_counter()
        means = []
        for i in range(cfg.num_scales):                     # a band is absent from steps of a coarser stage
            column = [row[i] for _, row in rows if i < len(row) - 2]
            means.append(sum(column) / len(column) if column else None)
        line = {"step": self.pending[-1][0], "images": self.pending[-1][0] * cfg.batch,
                "loss": sum(row[-2] for _, row in rows) / len(rows), "loss_bands": means,
                "grad_norm": sum(row[-1] for _, row in rows) / len(rows), "lr": lr,
                "images_per_second": len(rows) * cfg.batch / seconds}
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")
        self.pending = []
        return line


def finish(run: sample.Run, dataset) -> dict:
    """Samples, pictures and scores of a trained run."""
    num = run.cfg.num_samples
    labels = sample.choose_labels("balanced", num, run.classes)
    images, report = sample.generate(run, num, labels, **sample.solver_settings(run.cfg))
    pictures.draw_grid(run.folder / "samples.png", images, labels, run.classes)
    shown = sample.choose_labels("balanced", max(3, len(run.classes)), run.classes)
    sample.draw_trajectory(run.folder / "trajectory.png", run, None if shown is None else shown[-3:])
    print(sample.describe(report))
    try:
        scores = {**report, **fid.evaluate(dataset, images, labels)}
        print(fid.table(scores))
    except UserError as problem:                            # a handful of images trains, but cannot be scored
        scores = report
        print(f"no scores  {problem}")
    (run.folder / "scores.json").write_text(json.dumps(scores, indent=2))
    return scores


def main(cfg: Config, fresh: bool = False, device: str | None = None, record: str | None = None) -> None:
    """Trains a run to cfg.steps, from its newest checkpoint if there is one, then samples and scores it."""
    began, device = time.perf_counter(), sample.best_device(device)
    torch.manual_seed(cfg.seed)
    sample.check_solver(cfg.solver, cfg.solver_steps, "--solver-steps")
    schedule = Schedule(cfg.starts, cfg.path)
    fid.check_record(record)
    with torch.device("meta"):
        sample.build_model(cfg, 1, 0)                       # what does not fit is said before a folder is read
    dataset = data.load(cfg)
    sample.check_guidance(cfg, cfg.cfg_scale, dataset.classes)
    model = sample.build_model(cfg, dataset.channels, len(dataset.classes)).to(device)
    ema = copy.deepcopy(model).requires_grad_(False) if cfg.ema else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2),
                                  weight_decay=cfg.weight_decay, fused=device.type in ("cpu", "cuda"))

    # continue where the newest checkpoint ends: the same command again, no flag
    out = prepare_folder(cfg, fresh)
    facts, step, renew = data.facts(dataset), 0, False
    if state := checkpoint.load_newest(out):
        check_same(cfg, state["config"], out)
        if state["data"] != facts:
            raise UserError(f"the run in {out} was trained on other images or classes than there are now: "
                            "choose another directory with --out, or start over with --fresh")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        step, before = state["step"], state["config"]["steps"]
        print(f"continuing {out} at step {step} of {cfg.steps} (--fresh starts over)")
        if cfg.steps != before:
            print(f"the run was planned for {before} steps: the learning rate now follows the new length")
        renew = step >= cfg.steps and state["config"] != cfg.to_dict()
    del state
    (out / "config.json").write_text(config.show(cfg) + "\n")
    print(config.show(cfg))
    print(f"{model.count_parameters():,} parameters, {len(dataset):,} training images, on {device}; "
          f"{model.mean_flops() / 1e6:,.1f} MFLOPs per forward pass of an image (mean over the stages)")

    def save():
        checkpoint.save(out, {"step": step, "config": cfg.to_dict(), "data": facts,
                              "model": model.state_dict(), "ema": ema.state_dict() if ema is not None else None,
                              "optimizer": optimizer.state_dict()})

    stopped, ending = [], False                             # SIGINT and SIGTERM: end this step, save, leave
    handlers = {s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    metrics, resumed = Metrics(out, step), step > 0
    bar = tqdm(total=cfg.steps, initial=step, desc="training", unit="step", mininterval=0.5)
    try:
        while step < cfg.steps and not ending:
            # every random number of this step comes from (seed, step)
            rng = data.BatchRandom(cfg.seed, step, cfg.batch, device=device)
            x1, y = dataset.batch(data.order(len(dataset), cfg.seed, step * cfg.batch, cfg.batch), rng.rand(3))
            x1, y = x1.to(device), None if y is None else y.to(device)
            if y is not None:                               # one draw per example, shared by all bands
                y = torch.where(rng.rand() < cfg.label_drop, model.num_classes, y)

            with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16"):
                total, errors = loss(model, x1, y, schedule, rng, cfg.noise, cfg.stages, cfg.full_range)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
            lr = learning_rate(cfg, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            if ema is not None:
                update_ema(ema, model, cfg.ema, step)

            step += 1
            metrics.add(step, errors, total, grad_norm)
            bar.update()
            ending = step == cfg.steps or bool(stopped)
            if step % cfg.log_every == 0 or step % cfg.save_every == 0 or ending:
                line = metrics.write(cfg, lr)               # raises before a bad state could be saved
                bar.set_postfix(loss=f"{line['loss']:.4f}", images_per_s=f"{line['images_per_second']:.0f}")
            if step % cfg.save_every == 0 or ending:
                save()
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if step < cfg.steps:
        print(f"stopped at step {step}, saved; the same command continues")
        return

    pictures.draw_loss(out)
    weights, name = (ema, "ema") if ema is not None else (model, "raw")
    run = sample.Run(cfg, weights.eval(), dataset.classes, out, step, name)
    if renew:                                               # other sampling settings: sample.py reads them there
        save()
    scores = finish(run, dataset)
    if not resumed:
        scores["seconds_total"] = time.perf_counter() - began
    if record:
        fid.record(Path(record), run, scores)
    print(f"time       {time.perf_counter() - began:.0f} s in all" + (", since it was continued" if resumed else ""))
    print(f"wrote      {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))} in {out}")
    print(f"next       python sample.py --run {out}    python fid.py --run {out}")


if __name__ == "__main__":
    try:
        extra = {name: ARGUMENTS.pop(name) for name in ("fresh", "device", "record")}
        main(config.resolve(ARGUMENTS), **extra)
    except UserError as problem:
        sys.exit(f"error: {problem}")
