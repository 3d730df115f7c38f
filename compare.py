"""The systems side by side, and the ablations of the paper: the same trunk, data, training FLOPs, tolerance and scores.

    python compare.py --dataset digits --seeds 3         all systems: a table, a grid of samples, FD against FLOPs
    python compare.py --ablation mask --steps 500        one table of the paper, its FID beside our distance
    python compare.py --jobs 2                           two runs at a time, with half of the cores each

Every run is `python train.py` with a few flags, in out/compare; it gets as many steps as have the training FLOPs of
LapFlow's --steps (closed form, backward counted as two forwards; the last batch rounds). What was finished is not run
again: the same command continues after a stop. Each finished run is one line of --record, and tables are made from it.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import config

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python compare.py [--dataset NAME] [--ablation NAME] [--seeds N] [options]")
    PARSER.add_argument("--dataset", choices=("digits", "photos"), default="digits", help="[digits]")
    PARSER.add_argument("--ablation", choices=config.ABLATIONS, help="a table of the paper [the systems]")
    PARSER.add_argument("--seeds", type=int, default=3, help="training seeds 0, 1, ... [3]")
    PARSER.add_argument("--steps", type=int, help="steps of LapFlow, whose FLOPs all get [those of the preset]")
    PARSER.add_argument("--size", help="size of all models [that of the preset]")
    PARSER.add_argument("--jobs", type=int, default=1, help="runs at a time; on a GPU leave it at 1 [1]")
    PARSER.add_argument("--out", default="out/compare", help="directory of the runs [out/compare]")
    PARSER.add_argument("--record", help="the lines of finished runs, read and appended to [OUT/results.jsonl]")
    PARSER.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    ARGUMENTS = PARSER.parse_args()

from tqdm import tqdm

import checkpoint
import data
import fid
import pictures
import plan
import runs
import sample
from config import Config, UserError
from model import MoTDiT

ROOT = Path(__file__).resolve().parent

# What is compared: name -> settings. Then the tables of the paper: name -> (settings, the paper's FID, CelebA-HQ 256).
SYSTEMS = {"LapFlow": {}, "LFM": {"method": "lfm"}, "Pyramidal Flow": {"method": "pyramidal"},
           "Pyramidal Flow, zero overlap": {"method": "pyramidal-zero-overlap"}, "PixelFlow": {"method": "pixelflow"},
           "EdifyImage": {"method": "edify"}, "EdifyImage, plain weights": {"method": "edify-plain"},
           "DFM": {"method": "dfm"}}
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
    "space": {"latents": ({"space": "latent"}, 3.53), "pixels": ({}, 8.63),
              "latents, LFM": ({"space": "latent", "method": "lfm"}, 7.77), "pixels, LFM": ({"method": "lfm"}, 11.58)},
    "stages": {"stratified": ({}, None), "one for each batch": ({"stages": "batch"}, None)},
    "times": {"[T_s, 1]": ({}, 3.53), "[T_s, T_(s+1)]": ({"full_range": False}, None)},
    "sharing": {"experts full": ({}, None), "experts none": ({"experts": "none"}, None),
                "experts none, times of the segment": ({"experts": "none", "full_range": False}, None),
                "experts qkv, times of the segment": ({"experts": "qkv", "full_range": False}, None),
                "no mask, times of the segment": ({"mask": "none", "full_range": False}, None),
                "experts none, no mask, times of the segment": (
                    {"experts": "none", "mask": "none", "full_range": False}, None)},
    "condition-tokens": {"on": ({}, None), "off": ({"condition_tokens": False}, None)},
}
SHOWN = {"frechet_pixel": ("FD", 3), "precision": ("precision", 3), "recall": ("recall", 3),
         "class_variance": ("class variance", 3),
         "label_agreement": ("agreement", 3), "nfe": ("NFE", 0)}


def variants(args: argparse.Namespace) -> dict:
    """name -> (settings, the paper's FID or None)."""
    if args.ablation:
        return ABLATIONS[args.ablation]
    return {name: (settings, None) for name, settings in SYSTEMS.items()}


def plan_runs(args: argparse.Namespace, out: Path) -> list[tuple[str, Config]]:
    """The runs of a comparison: (name, configuration), seed by seed. LapFlow, the first variant, sets the FLOPs."""
    given = {"dataset": args.dataset}
    if args.ablation == "space":                            # digits as RGB files, which an autoencoder can encode
        given.update(dataset="folder", res=8, data=str(out / "digits-rgb"), flip=False)
        given.update({k: v for k, v in Config().to_dict().items() if k in (
            "lr", "lr_end", "ema", "batch", "steps", "num_samples", "save_every", "num_scales", "size")})
    given.update({k: getattr(args, k) for k in ("steps", "size") if getattr(args, k)})
    facts, result, budget = data_facts(args.dataset), [], None
    for name, (settings, _) in variants(args).items():
        more = dict(settings)
        if more.get("space") == "latent":                   # half the side: patches of half the size, as many tokens
            numbers = given["size"].split(",")
            more.update(vae=str(out / "digits-vae"), latents=str(out / "digits-latents"),
                        size=",".join([*numbers[:3], str(int(numbers[3]) // 2)]))
        if more.get("method") == "lfm":
            more["num_scales"] = 1
        cfg = config.resolve({**given, **more, "out": "-"})
        flops = step_flops(cfg, facts)
        if budget is None:
            budget, budget_steps = cfg.steps * flops, cfg.steps
        steps = max(1, round(budget / flops))
        print(f"{name:30s} {steps:6d} steps x {flops:.3e} = {steps * flops:.3e} training FLOPs")
        for seed in range(args.seeds):
            folder = "-".join([cfg.dataset, str(budget_steps), *map(str, sum(sorted(settings.items()), ())), str(seed)])
            folder = "".join(c if c.isalnum() or c in "-._" else "_" for c in folder)
            result.append((name, dataclasses.replace(
                cfg, steps=steps, seed=seed, out=str(out / folder), save_every=max(1, steps // 4),
                eval_every=0 if seed or args.ablation else max(1, steps // 5))))
    return sorted(result, key=lambda run: run[1].seed)


def data_facts(dataset: str) -> tuple[int, int, int]:
    """channels, classes and side of what the networks see. Of all three spaces of the digits the FLOPs are close."""
    loaded = data.load(config.resolve({"dataset": dataset}))
    return loaded.channels, len(loaded.classes), loaded.side


def network(cfg: Config, facts: tuple) -> MoTDiT:
    channels, classes, side = facts
    if cfg.space == "latent":                               # of docs/tiny_vae.py
        channels, side = 4, side // 2
    elif cfg.dataset == "folder":
        channels = 3
    return plan.meta_model(cfg, channels, classes, side)


def step_flops(cfg: Config, facts: tuple) -> float:
    return 3 * network(cfg, facts).mean_flops() * cfg.batch


def command_of(cfg: Config, device: str | None) -> list[str]:
    """The train.py of a configuration: the flags in which it differs from the defaults of its data."""
    standard = config.resolve({"dataset": cfg.dataset})
    words = ["--dataset", cfg.dataset]
    for name, value in cfg.to_dict().items():
        if value == standard.to_dict()[name] or name == "dataset":
            continue
        flag = "--" + name.replace("_", "-")
        if name == "space":
            words.append("--" + value)
        elif isinstance(value, bool):
            words.append(flag if value else "--no-" + name.replace("_", "-"))
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words + (["--device", device] if device else [])


def finished(lines: list[dict], cfg: Config, what: str) -> dict | None:
    """The line of a run that is done, whichever comparison asked for it; what: "run", or "time" for its timing."""
    def trained(settings):
        return {key: value for key, value in settings.items() if key not in ("out", "eval_every", "save_every")}

    return next((line for line in lines if line["what"] == what and trained(line["config"]) == trained(cfg.to_dict())),
                None)


def train_one(name: str, settings: dict, cfg: Config, commit: str, children: list, args: argparse.Namespace,
              record: Path, facts: tuple, threads: int) -> None:
    """One run, in a process of its own, and its line."""
    flags = command_of(cfg, args.device)
    log = Path(cfg.out + ".log")
    with open(log, "w") as file:
        child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], stdout=file, stderr=file,
                                 env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    children.append(child)
    if child.wait() or not (Path(cfg.out) / "scores.json").exists():        # a run that is asked to stop leaves with 0
        raise UserError(f"the run {cfg.out} did not end, see {log}: {(log.read_text().splitlines() or [''])[-1]}")
    folder, model = Path(cfg.out), network(cfg, facts)
    scores = json.loads((folder / "scores.json").read_text())
    if cfg.space == "latent":                               # against the real images, not against decoded ones
        scores = {**scores, **score_in_pixels(cfg)}
    flops = sum(calls * model.flops(j) for j, calls in enumerate(scores["nfe_segments"]))
    curve = checkpoint.read_lines([folder / "scores.jsonl"]) if (folder / "scores.jsonl").exists() else []
    for key in ("run", "seconds_per_image", "seconds_total"):           # times are measured later, one run at a time
        scores.pop(key, None)
    fid.record(record, cfg, runs.best_device(args.device), {
        "commit": commit, "what": "run", "settings": settings, "parameters": model.count_parameters(),
        "training_flops": cfg.steps * step_flops(cfg, facts), "sampling_flops": flops, "jobs": args.jobs,
        "curve": [[line["step"], line["frechet_pixel"]] for line in curve], **scores})
    print(f"{name:30s} seed {cfg.seed}: FD {scores['frechet_pixel']:.4f}", flush=True)


def measure_times(planned: list[tuple[str, Config]], args: argparse.Namespace, record: Path, rounds: int = 3,
                  count: int = 250) -> None:
    """Seconds per image of each variant's first seed: in turn, alone on the machine, medians over the rounds."""
    lines, ready = checkpoint.read_lines([record]), []
    for name, cfg in planned:
        if cfg.seed == 0 and finished(lines, cfg, "time") is None and any(Path(cfg.out).glob("step-*.pt")):
            ready.append((name, cfg, runs.load_run(cfg.out, device=args.device), []))
    for _ in range(rounds if ready else 0):
        for _, _, run, seconds in tqdm(ready, desc="timing", leave=False):
            labels = runs.choose_labels("balanced", count, run.classes)
            _, report = sample.generate(run, count, labels, progress=False, **runs.solver_settings(run.cfg))
            seconds.append(report["seconds_per_image"])
    for name, cfg, run, seconds in ready:
        fid.record(record, cfg, run.device, {
            "what": "time", "settings": variants(args)[name][0], "batch": count, "rounds": seconds,
            "seconds_per_image": statistics.median(seconds)})


def score_in_pixels(cfg: Config) -> dict:
    run = runs.load_run(cfg.out)
    labels = runs.choose_labels("balanced", cfg.num_samples, run.classes)
    images, _ = sample.generate(run, cfg.num_samples, labels, progress=False, **runs.solver_settings(run.cfg))
    pixels = data.load(dataclasses.replace(cfg, space="pixel", vae="", latents=""))
    return fid.evaluate(pixels, images, labels, data.to_images)


def prepare_space(out: Path) -> None:
    """The files of --ablation space: digits as RGB images, a small autoencoder trained on them, and their latents."""
    for script, *words in (("docs/tiny_vae.py", "--out", str(out)),
                           ("latents.py", "--res", "8", "--data", str(out / "digits-rgb"), "--vae",
                            str(out / "digits-vae"), "--out", str(out / "digits-latents"))):
        if subprocess.run([sys.executable, str(ROOT / script), *words]).returncode:
            raise UserError(f"{script} failed: the latents of the digits could not be made")


# ---------------------------------------------------------------------------------------------------------------------
# tables and pictures, from the lines


def spread(values: list[float], places: int) -> str:
    """Mean and, over several seeds, the standard deviation."""
    text = f"{statistics.mean(values):.{places}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{places}f}"


def table(runs_of: dict, paper: dict, times: dict) -> str:
    """Markdown, a row for each name; by name: the lines of its runs, the paper's FID or None, and seconds per image."""
    lines = sum(runs_of.values(), [])
    levels = sorted((key for key in lines[0] if key.startswith("swd_")), key=lambda key: int(key[4:]))
    shown = {key: value for key, value in SHOWN.items() if key in lines[0]}
    shown.update({key: (f"SWD {key[4:]}", 1) for key in levels})
    head = ["", *(title for title, _ in shown.values()), "s / image", "GFLOPs / image", "parameters, M",
            "steps"]
    paper = paper if any(paper.values()) else None
    out = ["| " + " | ".join(head + (["paper: FID"] if paper else [])) + " |", "|---" * (len(head) + bool(paper)) + "|"]
    for name, mine in runs_of.items():
        if not mine:
            continue
        cells = [name, *(spread([line[key] for line in mine], places) for key, (_, places) in shown.items()),
                 f"{times[name]:.4f}" if name in times else "not measured",
                 f"{statistics.mean([line['sampling_flops'] for line in mine]) / 1e9:.2f}",
                 f"{mine[0]['parameters'] / 1e6:.2f}", str(mine[0]["config"]["steps"])]
        out.append("| " + " | ".join(cells + ([f"{paper.get(name) or ''}"] if paper else [])) + " |")
    real = lines[0].get("real", {})
    if real:
        cells = ["*real images*"]
        cells += [f"{real[key]:.{places}f}" if key in real else "" for key, (_, places) in shown.items()]
        out.append("| " + " | ".join(cells + [""] * (len(head) + bool(paper) - len(cells))) + " |")
    seeds = len({line["config"]["seed"] for line in lines})
    flops = [line["training_flops"] for line in lines]
    step = max(line["training_flops"] / line["config"]["steps"] for line in lines)
    if max(flops) - min(flops) > max(step, 0.01 * max(flops)) or len({line["config"]["dataset"] for line in lines}) > 1:
        raise UserError("these runs cannot share a table: their data or training FLOPs differ")
    return "\n".join([*out, "", f"{flops[0]:.2e} training FLOPs each; {seeds} seeds, mean ± standard "
                      f"deviation; {lines[0]['n']} images, {lines[0]['solver']} {lines[0].get('rtol', '')}; "
                      + "; ".join(", ".join(sorted({line[key] for line in lines})) for key in (
                          "hardware", "versions")) + f"; commit {', '.join(sorted({r['commit'] for r in lines}))}."])


def verdict(runs_of: dict, paper: dict) -> str:
    """Does the paper's ranking hold? Pairs of variants in the order of its FID, against ours; within noise: our means
    differ by less than two standard errors."""
    ours = {name: [line["frechet_pixel"] for line in runs_of[name]] for name in paper if paper[name]}
    names = sorted((name for name, values in ours.items() if len(values) > 1), key=paper.get)
    counts = {"hold": 0, "within noise": 0, "reversed": 0}
    for i, better in enumerate(names):
        for worse in names[i + 1 :]:
            gap = statistics.mean(ours[worse]) - statistics.mean(ours[better])
            noise = sum(statistics.variance(ours[name]) / len(ours[name]) for name in (better, worse)) ** 0.5
            counts["within noise" if abs(gap) < 2 * noise else "hold" if gap > 0 else "reversed"] += 1
    total = sum(counts.values())
    return f"of {total} pairs " + ", ".join(f"{n} {what}" for what, n in counts.items()) if total else ""


def draw_curves(path: Path, runs_of: dict) -> None:
    """Distance against training FLOPs, of the first seed; the last point of each is the finished run."""
    plt = pictures.pyplot()
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, lines in runs_of.items():
        for line in lines[:1]:
            points = [*line["curve"], [line["config"]["steps"], line["frechet_pixel"]]]
            each = line["training_flops"] / line["config"]["steps"]
            axis.plot([step * each for step, _ in points], [distance for _, distance in points], marker="o",
                      label=name)
    axis.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="Frechet distance, pixels in [0, 1]")
    axis.grid(which="both", alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_samples(path: Path, planned: list[tuple[str, Config]], device: str | None) -> None:
    """One row for each system, seed 0: the same labels, one column each."""
    rows, names, titles = [], [], []
    for name, cfg in planned:
        if cfg.seed == 0 and any(Path(cfg.out).glob("step-*.pt")):
            run = runs.load_run(cfg.out, device=device)
            labels = runs.choose_labels("balanced", 10, run.classes)
            images, _ = sample.generate(run, 10, labels, progress=False, **runs.solver_settings(run.cfg))
            rows.append(list(images))
            names.append(name.replace(", ", ",\n"))
            titles = [run.classes[y] for y in labels] if labels is not None else []
    if rows:
        pictures.draw_images(path, rows, [], titles, names)


def gathered(lines: list[dict], wanted: dict) -> tuple[dict, dict]:
    """Runs and times by name, for the tables of README.md; wanted: name -> settings."""
    def of(settings, what):
        settings = json.loads(json.dumps(settings))
        found = {line["config"]["seed"]: line for line in lines
                 if line["settings"] == settings and line["what"] == what}          # of each seed the last
        return [found[seed] for seed in sorted(found)]

    times = {name: of(settings, "time") for name, settings in wanted.items()}
    return ({name: of(settings, "run") for name, settings in wanted.items()},
            {name: found[0]["seconds_per_image"] for name, found in times.items() if found})


def main(args: argparse.Namespace) -> None:
    if args.seeds < 1 or args.jobs < 1 or (args.steps is not None and args.steps < 1):
        raise UserError("--seeds, --steps and --jobs must be at least 1")
    if args.dataset == "photos" and args.ablation in ("space", "scales", "starts"):
        raise UserError(f"--ablation {args.ablation} is written for the two scales of the digits: leave out --dataset")
    out = Path(args.out)
    record = Path(args.record or out / "results.jsonl")
    fid.check_record(str(record))
    out.mkdir(parents=True, exist_ok=True)
    if args.ablation == "space":
        prepare_space(out)
    planned, facts = plan_runs(args, out), data_facts(args.dataset)
    lines = checkpoint.read_lines([record])
    todo = [(name, cfg) for name, cfg in planned if finished(lines, cfg, "run") is None]
    print(f"{len(planned)} runs, {len(planned) - len(todo)} of them done")
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    commit, children, pool = fid.commit(), [], ThreadPoolExecutor(args.jobs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    try:
        for job in as_completed([pool.submit(train_one, name, variants(args)[name][0], cfg, commit, children, args,
                                             record, facts, threads) for name, cfg in todo]):
            job.result()
    except BaseException as problem:                        # the first that fails, Ctrl-C or SIGTERM ends all
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.terminate()                               # it saves, and goes on with the same command
        if isinstance(problem, KeyboardInterrupt):
            sys.exit("stopped; the same command goes on")
        raise
    if not args.ablation:
        measure_times(planned, args, record)
    lines = checkpoint.read_lines([record])
    done = {name: [line for line in (finished(lines, cfg, "run") for other, cfg in planned if other == name) if line]
            for name in variants(args)}
    times = {name: line["seconds_per_image"] for name, cfg in planned if (line := finished(lines, cfg, "time"))}
    name = args.ablation or args.dataset
    paper = {name: fid for name, (_, fid) in variants(args).items()}
    text = table(done, paper, times)
    if said := verdict(done, paper):
        text += f"\n\nThe paper's ranking: {said}."
    (out / f"{name}.md").write_text(text + "\n")
    print(text)
    draw_samples(out / f"{name}.png", planned, args.device)
    wrote = f"{out}/{name}.md, {name}.png"
    if not args.ablation:
        draw_curves(out / f"{name}-flops.png", done)
        wrote += f", {name}-flops.png"
    print(f"wrote      {wrote}; lines in {record}")


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except UserError as problem:
        sys.exit(f"error: {problem}")
