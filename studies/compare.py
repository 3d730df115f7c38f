"""The systems side by side, and the ablations of the paper: the same trunk, data, training FLOPs, tolerance and scores.

    python -m studies.compare --dataset digits --seeds 3         all systems: a table, samples, distance against FLOPs
    python -m studies.compare --dataset fashion                  the same on Fashion-MNIST, judged by its classifier
    python -m studies.compare --dataset folder --data DIR --res 32          on your own images
    python -m studies.compare --ablation mask --steps 500        one table of the paper, its FID beside our distance
    python -m studies.compare --jobs 2                           two runs at a time, with half of the cores each

Every run is `python train.py` with a few flags, in out/compare; it gets as many steps as have the training FLOPs of
LapFlow's --steps (counted by torch, backward as two forwards; the last batch rounds). A finished run is not repeated:
the same command continues after a stop. Each finished run is one line of --record, and tables are made from the lines.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
import fid
import train
from config import Config, UserError
from data import batches
from run import checkpoint, load, log, memory, paper, pictures
from run.ranks import best_device
from scores.classifier import load_classifier
from scores.features import load_extractor
from studies.output import markdown, origin, seeds, spread

ROOT = Path(__file__).resolve().parent.parent
SAMPLING = ("noise_scale", "solver", "solver_steps", "cfg_scale")   # rows that differ in these alone share a training

# What is compared: name -> settings. Then the tables of the paper: name -> (settings, the paper's FID, CelebA-HQ 256).
SYSTEMS = {"LapFlow": {}, "LFM": {"method": "lfm"}, "Pyramidal Flow": {"method": "pyramidal"},
           "Pyramidal Flow, zero overlap": {"method": "pyramidal-zero-overlap"}, "PixelFlow": {"method": "pixelflow"},
           "EdifyImage": {"method": "edify"}, "EdifyImage, plain weights": {"method": "edify-plain"},
           "DFM": {"method": "dfm"}}
IMAGES = {                                                  # rate and options: chosen on Fashion-MNIST, LOG.md
    **SYSTEMS, "LapFlow, shared weights": {"experts": "none"},                  # as many parameters as LFM
    "LapFlow, two scales": {"num_scales": 2},
    "Pyramidal Flow, stages 2:2:1": {"method": "pyramidal", "stage_weights": (2.0, 2.0, 1.0)},
    "LapFlow, finer noise x 0.85": {"noise_scale": (1.0, 0.85, 0.85)},          # each at its best scale
    "LFM, noise x 0.95": {"method": "lfm", "noise_scale": (0.95,)},
    "Pyramidal Flow, finer noise x 0.9": {"method": "pyramidal", "noise_scale": (1.0, 0.9, 0.9)},
    "LapFlow, as in the paper": dict(num_scales=2, block="dit", times="uniform", full_range=True, concat_coarse=False)}
FOLDER_32 = {**IMAGES, "LapFlow, 4 coarse tokens": {"patches": ()},             # in place of the 16 of its preset
             "Pyramidal Flow, 16 coarse tokens": {"method": "pyramidal", "patches": (2.0, 4.0, 4.0)}}
FOLDER_64 = {**IMAGES, **{f"LapFlow, stages {w:g}:{w:g}:1": {"stage_weights": (w, w, 1.0)} for w in (1.0, 4.0)},
             "LapFlow, 64 coarse tokens": {"patches": (2.0, 4.0, 4.0)},
             "LapFlow, both": {"patches": (2.0, 4.0, 4.0), "stage_weights": (4.0, 4.0, 1.0)}}
ABLATIONS = {
    "mask": {"causal": ({}, 3.53), "none": ({"mask": "none"}, 3.91), "self": ({"mask": "self"}, 5.19)},
    "starts": {"T = 0.5": ({}, 3.53), "T = 0.1": ({"starts": (0.0, 0.1)}, 5.12),
               "T = 0.2": ({"starts": (0.0, 0.2)}, 4.37), "T = 0.9": ({"starts": (0.0, 0.9)}, 4.92)},
    "path": {"linear": ({}, 3.53), "quadratic": ({"path": "quadratic"}, 3.78), "cubic": ({"path": "cubic"}, 4.25),
             "GVP": ({"path": "gvp"}, 4.10)},
    "scales": {"2": ({}, 3.53), "1 (LFM)": ({"method": "lfm"}, 5.26), "3": ({"num_scales": 3}, 3.59)},
    "noise": {"pyramid": ({}, None), "independent": ({"noise": "independent"}, None)},
    "experts": {"full": ({}, None), "qkv": ({"experts": "qkv"}, None), "none": ({"experts": "none"}, None)},
    "separate": {"one MoT": ({}, 3.53), "a network for each segment": ({"method": "separate"}, 3.60)},
    "stages": {"stratified": ({}, None), "one for each batch": ({"stages": "batch"}, None)},
    "times": {"[T_s, 1]": ({}, 3.53), "[T_s, T_(s+1)]": ({"full_range": False}, None)},
    "condition-tokens": {"on": ({}, None), "off": ({"condition_tokens": False}, None)},
}
IMAGE_ABLATIONS = {                                         # on larger images, of presets with three scales
    **{name: ABLATIONS[name] for name in ("mask", "experts", "path")},
    "scales": {"3": ({}, 3.59), "1 (LFM)": ({"method": "lfm"}, 5.26), "2": ({"num_scales": 2}, 3.53),
               "4": ({"num_scales": 4}, 5.12)},
    "starts": {"0.5, 0.8": ({}, None), "0.33, 0.67": ({"starts": (0.0, 1 / 3, 2 / 3)}, None),
               "0.2, 0.4": ({"starts": (0.0, 0.2, 0.4)}, None), "0.7, 0.9": ({"starts": (0.0, 0.7, 0.9)}, None)},
}
BEST = ("LapFlow, finer noise x 0.85", "LFM, noise x 0.95", "Pyramidal Flow, finer noise x 0.9")
STEPS = {f"{name.split(',')[0]}, {steps} steps": ({**IMAGES[name], "solver": "heun", "solver_steps": steps}, None)
         for name in BEST for steps in (6, 12, 24)}         # what sampling costs
GUIDANCE = {f"{name.split(',')[0]}, guidance {w:g}": (IMAGES[name] | ({"cfg_scale": w} if w != 1 else {}), None)
            for name in BEST[::2] for w in (0.85, 1.0, 1.25)}                       # precision against recall
COLUMNS = {"frechet_pixel": ("FD, pixels", 3), "frechet": ("FD, classifier", 2),
           "kid": ("KID, classifier", 4), "frechet_efficientnet": ("FD, EfficientNet", 1),
           "kid_efficientnet": ("KID, EfficientNet", 1), "precision": ("precision", 3), "recall": ("recall", 3),
           "class_variance": ("class variance", 3), "label_agreement": ("agreement", 3), "novelty": ("novelty", 2),
           "nfe": ("NFE", 0)}


def systems(args: argparse.Namespace) -> dict[str, dict]:
    """name -> settings of what is compared."""
    of_folder = {(32, None): FOLDER_32, (64, "96,4,3,4"): FOLDER_64}.get((args.res, args.size), IMAGES)
    return {"digits": SYSTEMS, "folder": of_folder}.get(args.dataset, IMAGES)


def set_name(args: argparse.Namespace) -> str:
    return Path(args.data).name if args.dataset == "folder" else args.dataset


def variants(args: argparse.Namespace) -> dict:
    """name -> (settings, the paper's FID or None)."""
    if args.ablation:
        tables = ABLATIONS if args.dataset == "digits" else {**IMAGE_ABLATIONS, "steps": STEPS, "guidance": GUIDANCE}
        if args.ablation not in tables:
            raise UserError(f"--ablation of {args.dataset} is one of {', '.join(tables)}, not {args.ablation}")
        return tables[args.ablation]
    chosen = {name: (given, None) for name, given in systems(args).items()}
    return {name: chosen[name] for name in args.only} if args.only else chosen


# ---------------------------------------------------------------------------------------------------------------------
# which runs, at equal FLOPs


def plan_runs(args: argparse.Namespace) -> list[tuple[str, Config]]:
    """The runs of a comparison: (name, configuration), seed by seed. LapFlow, the first variant, sets the FLOPs."""
    out, given = Path(args.out), {"dataset": args.dataset, "noise_scale": ()}       # a row says its own scale
    given |= {name: getattr(args, name) for name in ("data", "res", "steps", "size") if getattr(args, name)}
    runs, budget, facts = [], None, memory.quick_facts(paper.resolve(given))
    for name, (settings, _) in variants(args).items():
        cfg = paper.resolve({**given, **settings, "out": "-"})
        flops = memory.step_flops(cfg, facts)
        if budget is None:
            budget, budget_steps = cfg.steps * flops, cfg.steps
        steps = max(1, round(budget / flops))
        print(f"{name:30s} {steps:6d} steps x {flops:.3e} = {steps * flops:.3e} training FLOPs")
        for seed in range(args.seeds):
            trained = [pair for pair in sorted(settings.items()) if pair[0] not in SAMPLING]
            folder = "-".join(map(str, [set_name(args), budget_steps, *sum(trained, ()), seed]))
            folder = "".join(c if c.isalnum() or c in "-._" else "_" for c in folder)
            runs.append((name, dataclasses.replace(
                cfg, steps=steps, seed=seed, out=str(out / folder), save_every=max(1, steps // 4),
                eval_every=0 if seed or args.ablation or args.dataset != "digits" else max(1, steps // 5))))
    return sorted(runs, key=lambda run: run[1].seed)


def command_of(cfg: Config, device: str | None) -> list[str]:
    """The train.py of a configuration: what chooses its preset, and the flags in which it differs from that."""
    given = {name: getattr(cfg, name) for name in ("dataset", "method", "res", "size")}
    standard = paper.resolve(given).to_dict()
    changed = {name: value for name, value in cfg.to_dict().items() if value != standard[name]}
    return [*config.flags(given), *config.flags(changed), *(["--device", device] if device else [])]


def finished(lines: list[dict], cfg: Config, what: str) -> dict | None:
    """The line of a run that is done, whichever comparison asked for it; what: "run", or "time" for its timing."""
    def trained(settings):                                  # a line older than a setting has its default
        return {**Config().to_dict(), **settings, "out": "", "eval_every": 0, "save_every": 1}

    return next((line for line in lines
                 if line.get("what") == what and trained(line["config"]) == trained(cfg.to_dict())), None)


# ---------------------------------------------------------------------------------------------------------------------
# the runs


def train_rows(rows: list[tuple[str, Config]], args: argparse.Namespace, commit: str, children: list) -> None:
    """One training, in a process of its own, and a line for each row that samples it."""
    cfg = rows[0][1]
    folder, report = Path(cfg.out), Path(cfg.out + ".log")
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with open(report, "w") as file:
        few = cfg if cfg.dataset == "digits" else dataclasses.replace(cfg, num_samples=64)      # see judged
        child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command_of(few, args.device)], stdout=file,
                                 stderr=file, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        children.append(child)
        child.wait()
    if child.returncode or not (folder / "scores.json").exists():           # a run that is asked to stop leaves with 0
        last = (report.read_text().splitlines() or [""])[-1]
        raise UserError(f"the run {cfg.out} did not finish, see {report}: {last}")
    facts, curve = memory.quick_facts(cfg), checkpoint.read_lines([folder / "scores.jsonl"])
    model = memory.meta_model(cfg, facts)
    flops = memory.forward_flops(model)
    for name, cfg in rows:
        scores = json.loads((folder / "scores.json").read_text())
        if cfg.dataset != "digits":
            scores = judged(cfg, args.device)
        sampling = sum(calls * count for calls, count in zip(scores["nfe_segments"], flops, strict=True))
        for key in ("run", "seconds_per_image", "seconds_total"):       # times are measured later, one run at a time
            scores.pop(key, None)
        log.record(args.record, cfg, best_device(args.device), {
            "commit": commit, "what": "run", "settings": variants(args)[name][0],
            "parameters": memory.parameters(model), "training_flops": cfg.steps * memory.step_flops(cfg, facts),
            "sampling_flops": sampling, "jobs": args.jobs,
            "curve": [[line["step"], line["frechet_pixel"]] for line in curve], **scores})
        print(f"{name:30s} seed {cfg.seed}: FD {scores['frechet_pixel']:.4f}", flush=True)


def loaded(cfg: Config, device: str | None) -> load.Run:
    """The trained run of a row, with the row's own settings of sampling."""
    run = load.load_run(cfg.out, device=device, noise_scale=cfg.noise_scale)
    run.cfg = dataclasses.replace(run.cfg, **{name: getattr(cfg, name) for name in SAMPLING})
    return run


def judged(cfg: Config, device: str | None) -> dict:
    """The scores of a run on larger images: in pixels, in the features of a classifier where they have classes, and of
    EfficientNet where it is installed."""
    run = loaded(cfg, device)
    images, y, report = train.draw(run, cfg.num_samples, progress=False)
    dataset = batches.load(cfg)
    scores = {**report, **fid.evaluate(dataset, images, y, run.decode)}
    if importlib.util.find_spec("efficientnet_lite_pytorch"):
        judged = fid.evaluate(dataset, images, y, run.decode, remembering("efficientnet"))
        for side, values in ((scores, judged), (scores["real"], judged["real"])):
            side |= {f"{name}_efficientnet": values[name] for name in ("frechet", "kid", "precision", "recall")}
    if dataset.classes:
        judged = fid.evaluate(dataset, images, y, run.decode, load_classifier(dataset, run.decode, run.device))
        scores |= judged | {"real": scores["real"] | judged["real"]}
    return scores


@cache
def remembering(name: str) -> Callable:
    """An extractor that computes the features of the same images once: the real ones are those of every run."""
    extractor, seen = load_extractor(name), {}

    def features(images):
        key = hash(images.tobytes())
        if key not in seen:
            seen[key] = extractor(images)
        return seen[key]

    features.name, features.identity = extractor.name, extractor.identity
    return features


def measure_times(planned: list[tuple[str, Config]], args: argparse.Namespace, rounds: int = 3,
                  count: int = 250) -> None:
    """Seconds per image of each variant's first seed: in turn, alone on the machine, medians over the rounds."""
    lines = checkpoint.read_lines([args.record])
    ready = [(name, cfg, loaded(cfg, args.device), []) for name, cfg in planned
             if cfg.seed == 0 and finished(lines, cfg, "time") is None and checkpoint.steps(Path(cfg.out))]
    for _ in range(rounds if ready else 0):
        for _, _, run, seconds in tqdm(ready, desc="timing", leave=False):
            seconds.append(train.draw(run, count, progress=False)[2]["seconds_per_image"])
    for name, cfg, run, seconds in ready:                   # of the planned settings, so that it is found again
        log.record(args.record, cfg, run.device, {
            "what": "time", "settings": variants(args)[name][0], "batch": count, "rounds": seconds,
            "seconds_per_image": statistics.median(seconds)})


def run_all(planned: list[tuple[str, Config]], args: argparse.Namespace) -> None:
    """Trains the runs that have no line yet. The first that fails, Ctrl-C or SIGTERM ends all."""
    lines, commit, children = checkpoint.read_lines([args.record]), log.commit(), []
    todo = [(name, cfg) for name, cfg in planned if finished(lines, cfg, "run") is None]
    print(f"{len(planned)} runs, {len(planned) - len(todo)} of them done")
    pool = ThreadPoolExecutor(args.jobs)
    by_folder = {cfg.out: [row for row in todo if row[1].out == cfg.out] for _, cfg in todo}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    try:
        for job in as_completed([pool.submit(train_rows, rows, args, commit, children) for rows in by_folder.values()]):
            job.result()
    except BaseException:
        for rows in by_folder.values():
            rows.clear()                                    # nothing more begins
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.terminate()                               # it saves, and goes on with the same command
        raise


# ---------------------------------------------------------------------------------------------------------------------
# tables and pictures, from the lines


def table(runs_of: dict, paper_fid: dict, times: dict) -> str:
    """Markdown, a row for each name; by name: the lines of its runs, the paper's FID or None, and seconds per image."""
    lines = sum(runs_of.values(), [])
    columns = {key: value for key, value in COLUMNS.items() if all(key in line for line in lines)}
    if "frechet" in columns:
        del columns["frechet_pixel"]                        # it judges digits alone
    with_paper = any(paper_fid.values())
    head = ["", *(title for title, _ in columns.values()), "s / image", "GFLOPs / image", "parameters, M", "steps",
            *["paper: FID"] * with_paper]
    rows = []
    for name, runs in runs_of.items():
        if runs:
            rows.append([name, *(spread([line[key] for line in runs], places) for key, (_, places) in columns.items()),
                         f"{times[name]:.4f}" if name in times else "not measured",
                         f"{statistics.mean([line['sampling_flops'] for line in runs]) / 1e9:.2f}",
                         f"{runs[0]['parameters'] / 1e6:.2f}", runs[0]["config"]["steps"],
                         *[paper_fid.get(name) or ""] * with_paper])
    if real := lines[0].get("real"):
        cells = [f"{real[key]:.{places}f}" if key in real else "" for key, (_, places) in columns.items()]
        rows.append(["*real images*", *cells, *[""] * (4 + with_paper)])
    flops, first = [line["training_flops"] for line in lines], lines[0]
    step = max(line["training_flops"] / line["config"]["steps"] for line in lines)
    if max(flops) - min(flops) > max(step, 0.01 * max(flops)) or len({line["config"]["dataset"] for line in lines}) > 1:
        raise UserError("these runs cannot share a table: their data or training FLOPs differ")
    return (f"{markdown(head, rows)}\n\n{flops[0]:.2e} training FLOPs each; {seeds(runs_of.values())}; "
            f"{first['n']} images, {first['solver']}{' ' * ('rtol' in first)}{first.get('rtol', '')}; "
            f"{origin(lines, 'hardware', 'versions')}.")


def draw_curves(path: Path, runs_of: dict, lines: list[dict]) -> None:
    """Distance against training FLOPs: along the run of the first seed; where a classifier judges, over all lines of
    a system, runs of several lengths, the mean of their seeds."""
    judged, curves = any("frechet" in line for line in lines if line.get("what") == "run"), []
    for name, runs in runs_of.items():
        points = []
        if judged and runs:
            by_length = {}
            for line in lines:
                if line.get("what") == "run" and line["settings"] == runs[0]["settings"]:
                    by_length.setdefault(line["training_flops"], []).append(line["frechet"])
            points = sorted((flops, statistics.mean(values)) for flops, values in by_length.items())
        elif runs:
            line, each = runs[0], runs[0]["training_flops"] / runs[0]["config"]["steps"]
            points = [(step * each, distance) for step, distance in line["curve"]]
            points.append((line["training_flops"], line["frechet_pixel"]))
        if points:
            curves.append((*zip(*points, strict=True), dict(marker="o", label=name)))
    pictures.plot(path, curves, xscale="log", yscale="log", xlabel="training FLOPs",
                  ylabel="Frechet distance, classifier" if judged else "Frechet distance, pixels in [0, 1]")


def draw_samples(path: Path, planned: list[tuple[str, Config]], device: str | None) -> None:
    """A row for each system, seed 0, of ten classes spread over all; then a row of real images of these classes."""
    rows, names, labels, titles = [], [], None, []
    for name, cfg in planned:
        if cfg.seed == 0 and checkpoint.steps(Path(cfg.out)):
            run = loaded(cfg, device)
            if run.classes:
                labels = np.linspace(0, len(run.classes) - 1, 10).round().astype(int).tolist()
                titles = [run.classes[label] for label in labels]
            rows.append(list(run.sample(10, labels=labels)))
            names.append(name.replace(", ", ",\n"))
    if labels:
        real = batches.load(run.cfg).real()
        rows.append([run.decode(real.plain(np.flatnonzero(real.labels == label)[:1]))[0] for label in labels])
        names.append("real")
    if rows:
        pictures.draw_images(path, rows, [], titles, names)


def gathered(lines: list[dict], wanted: dict) -> tuple[dict, dict]:
    """Runs and times by name, for the tables of studies.tables; wanted: name -> settings."""
    def select(settings, what):
        settings = json.loads(json.dumps(settings))
        by_seed = {line["config"]["seed"]: line for line in lines
                   if line.get("settings") == settings and line.get("what") == what}        # of each seed the last
        return [by_seed[seed] for seed in sorted(by_seed)]

    times = {name: select(settings, "time") for name, settings in wanted.items()}
    return ({name: select(settings, "run") for name, settings in wanted.items()},
            {name: rows[0]["seconds_per_image"] for name, rows in times.items() if rows})


def report(planned: list[tuple[str, Config]], args: argparse.Namespace) -> None:
    """Writes and prints the table of the finished runs, and the pictures."""
    out, lines, name = Path(args.out), checkpoint.read_lines([args.record]), args.ablation or set_name(args)
    done = {variant: [line for of, cfg in planned if of == variant and (line := finished(lines, cfg, "run"))]
            for variant in variants(args)}
    times = {variant: line["seconds_per_image"] for variant, cfg in planned if (line := finished(lines, cfg, "time"))}
    paper_fid = {variant: value for variant, (_, value) in variants(args).items()}
    text = table(done, paper_fid, times)
    (out / f"{name}.md").write_text(text + "\n")
    draw_samples(out / f"{name}.png", planned, args.device)
    if not args.ablation:
        draw_curves(out / f"{name}-flops.png", done, lines)
    print(f"{text}\nwrote      {out}/{name}.md, {name}.png{'' if args.ablation else f', {name}-flops.png'}; "
          f"lines in {args.record}")


def main() -> None:
    parser = config.parser(__doc__, "python -m studies.compare [--dataset NAME] [--ablation NAME] [--seeds N]")
    parser.add_argument("--dataset", choices=("digits", "fashion", "folder"), default="digits", help="[digits]")
    parser.add_argument("--data", help="the images; of Fashion-MNIST [the folder of Debian]")
    parser.add_argument("--res", type=int, help="height and width of the images of a folder [that of the preset]")
    parser.add_argument("--ablation", choices=(*ABLATIONS, "steps", "guidance"),
                        help="a table of the paper, or of sampling [the systems]")
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help="some of the systems, LapFlow first [all]")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds 0, 1, ... [3]")
    parser.add_argument("--steps", type=int, help="steps of LapFlow, whose FLOPs all get [those of the preset]")
    parser.add_argument("--size", help="size of all models [that of the preset]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; on a GPU leave it at 1 [1]")
    parser.add_argument("--out", default="out/compare", help="directory of the runs [out/compare]")
    parser.add_argument("--record", help="the lines of finished runs, read and appended to [OUT/results.jsonl]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1 or (args.steps is not None and args.steps < 1):
        raise UserError("--seeds, --steps and --jobs must be at least 1")
    if args.dataset == "folder" and not args.data:
        raise UserError("--dataset folder needs --data DIR")
    if args.only and args.ablation:
        raise UserError("--only chooses among the systems: leave it out with --ablation")
    if args.only and (args.only[0] != "LapFlow" or not set(args.only) <= set(systems(args))):
        raise UserError(f"--only takes LapFlow, whose FLOPs all get, then some of {list(systems(args))[1:]}")
    args.record = Path(args.record or Path(args.out) / "results.jsonl")
    log.check_record(args.record)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    planned = plan_runs(args)
    run_all(planned, args)
    if args.ablation in (None, "steps"):
        measure_times(planned, args)
    report(planned, args)


if __name__ == "__main__":
    config.run(main)
