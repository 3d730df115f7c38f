"""Which solver? One trained run through many: NFE, seconds per image and distance to the data, as a table and a plot.

    python study.py                                      the newest run, 500 images with each solver; RUN/study.png
    python study.py DIR -n 2000 --ref faces.npz --record results/study.jsonl

Every solver draws the images of the same seeds. The distance is that of pixels to the training data, or with --ref the
Frechet distance of its features. A solver that is in RUN/study.jsonl already is not run again.
"""

import argparse
import sys
from pathlib import Path

import config

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python study.py [RUN] [-n N] [--ref FILE]")
    PARSER.add_argument("run", nargs="?", help="run directory, export, or OWNER/NAME on the hub [the newest in out/]")
    PARSER.add_argument("-n", "--num", type=int, default=500, help="images for each solver [500]")
    PARSER.add_argument("--batch", type=int, default=250, help="images at a time [250]")
    PARSER.add_argument("--ref", metavar="FILE", help="reference of fid.py ref [pixels of the training data]")
    PARSER.add_argument("--extractor-file", default="", help="TorchScript file of the reference's extractor")
    PARSER.add_argument("--trust", action="store_true", help="accept an --extractor-file with another hash")
    PARSER.add_argument("--record", metavar="FILE", help="append the results and how they were made to a .jsonl file")
    PARSER.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    ARGUMENTS = PARSER.parse_args()

import numpy as np

import checkpoint
import data
import features
import fid
import pictures
import runs
import sample
from config import UserError

SOLVERS = [dict(solver="dopri5", rtol=10.0**-n, atol=10.0**-n, norm="batch") for n in (1, 2, 3, 4, 5)]
SOLVERS += [dict(solver=name, steps=steps, norm="batch") for name, most in (
    ("euler", 80), ("midpoint", 40), ("heun", 40), ("rk4", 20)) for steps in (most // 8, most // 4, most // 2, most)]
SETTINGS = [{**solver, "precision": precision} for precision in ("float32", "bfloat16") for solver in SOLVERS]


def name_of(row: dict) -> str:
    size = f"{row['rtol']:g}" if row["solver"] == "dopri5" else f"{row['steps']} steps"
    return f"{row['solver']} {size}, {row['precision']}"


def table(rows: list[dict]) -> str:
    """Markdown, best distance first."""
    lines = [f"| solver | NFE | s per image | {rows[0]['distance_name']} |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["distance"]):
        lines.append(f"| {name_of(row)} | {row['nfe']:.0f} | {row['seconds_per_image']:.4f} | {row['distance']:.4f} |")
    return "\n".join(lines)


def draw(path: Path, rows: list[dict]) -> None:
    """Distance against seconds, one line for each kind of solver and precision."""
    plt = pictures.pyplot()
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    kinds = list(dict.fromkeys((row["solver"], row["precision"]) for row in rows))
    for kind in kinds:
        mine = [row for row in rows if (row["solver"], row["precision"]) == kind]   # from coarse to fine
        axis.plot([r["seconds_per_image"] for r in mine], [r["distance"] for r in mine], label=", ".join(kind),
                  marker="o", linestyle="-" if kind[1] == "float32" else ":",
                  color=f"C{config.SOLVERS.index(kind[0])}")
    axis.set(xscale="log", yscale="log", xlabel="seconds per image", ylabel=rows[0]["distance_name"])
    axis.grid(which="both", alpha=0.3)
    pictures.plain_ticks(axis)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    if args.num < 5 or args.batch < 1:
        raise UserError("--num must be at least 5 and --batch at least 1")
    fid.check_record(args.record)
    run = runs.load_run(args.run, device=args.device)
    labels = runs.choose_labels("balanced", args.num, run.classes)
    if args.ref:
        reference = features.load_reference(args.ref)
        named = reference.how.get("extractor", "inception").split(" ")[0]
        extractor = features.load_extractor(named, args.extractor_file, run.device, args.trust)
        how = {"extractor": extractor.identity, "codec": "none", "res": run.cfg.res}
        features.check_comparable(reference, how, args.ref)
        mean, cov, name = reference.mean, reference.cov, f"Frechet distance, {named}, n = {args.num}"
    else:
        extractor, real = features.Pixels(), data.load(run.cfg).reference(max(2 * args.num, 2000))[0]
        real = np.concatenate([run.decode(part) for part in real.split(256)])
        (mean, cov), name = fid.statistics(features.pixel_features(real)), f"Frechet distance, pixels, n = {args.num}"
    fid.check_enough(args.num, len(mean), force=False)
    same = {"fingerprint": run.fingerprint, "num": args.num, "batch": args.batch, "device": str(run.device),
            "distance_name": name, "ref": args.ref, "cfg_scale": run.cfg.cfg_scale}
    file = run.folder / "study.jsonl"
    rows = checkpoint.read_lines([file] if file.exists() else [])
    rows = [row for row in rows if all(row.get(key) == value for key, value in same.items())]
    done = {name_of(row) for row in rows}
    few = min(8, args.num)                                  # the first call is slower than all others
    sample.generate(run, few, None if labels is None else labels[:few], progress=False, **SETTINGS[0])
    for number, settings in enumerate(SETTINGS):
        if name_of(settings) in done:
            continue
        print(f"{number + 1}/{len(SETTINGS)} {name_of(settings)}", file=sys.stderr)
        try:
            images, report = sample.generate(run, args.num, labels, batch=args.batch, cfg_scale=run.cfg.cfg_scale,
                                             **settings)
        except UserError as problem:
            print(f"left out: {problem}", file=sys.stderr)
            continue
        drawn = features.Statistics({})
        for first in range(0, len(images), args.batch):
            drawn.add(*extractor(images[first : first + args.batch]))
        distance = fid.frechet_distance(drawn.mean, drawn.cov, mean, cov)
        rows.append({**report, **same, "distance": distance})
        checkpoint.append_line(file, rows[-1])
        if args.record:
            fid.record(Path(args.record), run.cfg, run.device, rows[-1])
    draw(run.folder / "study.png", rows)
    print(table(rows))
    print(f"wrote      {run.folder}/study.png, study.jsonl")


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except UserError as problem:
        sys.exit(f"error: {problem}")
