"""Which solver? One trained run through many: NFE, seconds per image and distance to the data, as a table and a plot.

    python -m studies.solvers [RUN] -n 2000 --record results/study.jsonl

Every solver draws the images of the same seeds. The distance is the Frechet distance of pixels to the training data
(python fid.py --ref scores one solver in other features). A solver that is in RUN/solvers.jsonl is not run again.
"""

import sys
from pathlib import Path

import numpy as np

import config
import fid
import sample
from config import UserError
from data import batches
from data.conditions import choose
from run import checkpoint, load, log
from scores.features import pixel_features
from scores.reference import check_enough
from studies.output import markdown, plot

SOLVERS = [dict(solver="dopri5", rtol=10.0**-n, atol=10.0**-n, norm="batch") for n in (1, 2, 3, 4, 5)]
SOLVERS += [dict(solver=name, steps=steps, norm="batch") for name, most in (
    ("euler", 80), ("midpoint", 40), ("heun", 40), ("rk4", 20)) for steps in (most // 8, most // 4, most // 2, most)]
SETTINGS = [{**solver, "precision": precision} for precision in ("float32", "bfloat16") for solver in SOLVERS]


def name_of(row: dict) -> str:
    size = f"{row['rtol']:g}" if row["solver"] == "dopri5" else f"{row['steps']} steps"
    return f"{row['solver']} {size}, {row['precision']}"


def table(rows: list[dict], title: str) -> str:
    """Markdown; title: of the distance."""
    return markdown(["solver", "NFE", "s per image", title], [
        [name_of(row), f"{row['nfe']:.0f}", f"{row['seconds_per_image']:.4f}", f"{row['distance']:.4f}"]
        for row in rows])


def draw(path: Path, rows: list[dict]) -> None:
    """Distance against seconds, one line for each kind of solver and precision."""
    curves, names = [], list(dict.fromkeys(row["solver"] for row in rows))
    for solver, precision in dict.fromkeys((row["solver"], row["precision"]) for row in rows):
        line = [row for row in rows if (row["solver"], row["precision"]) == (solver, precision)]
        style = dict(label=f"{solver}, {precision}", marker="o", color=f"C{names.index(solver)}",
                     linestyle="-" if precision == "float32" else ":")
        curves.append(([row["seconds_per_image"] for row in line], [row["distance"] for row in line], style))
    plot(path, curves, xscale="log", yscale="log", xlabel="seconds per image", ylabel=rows[0]["distance_name"])


def real_statistics(run: load.Run, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the pixels of the training data, as the run decodes them."""
    x1 = batches.load(run.cfg).reference(max(2 * count, 2000))[0]
    return fid.statistics(pixel_features(np.concatenate([run.decode(part) for part in x1.split(256)])))


def main() -> None:
    parser = config.parser(__doc__, "python -m studies.solvers [RUN] [-n N]")
    parser.add_argument("run", nargs="?", help="run directory, export, or OWNER/NAME on the hub [the newest in out/]")
    parser.add_argument("-n", "--num", type=int, default=500, help="images for each solver [500]")
    parser.add_argument("--batch", type=int, default=250, help="images at a time [250]")
    parser.add_argument("--record", metavar="FILE", help="append the results and how they were made to a .jsonl file")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    args = parser.parse_args()
    if args.num < 5 or args.batch < 1:
        raise UserError("--num must be at least 5 and --batch at least 1")
    log.check_record(args.record)
    run = load.load_run(args.run, device=args.device)
    y, real = choose(run.condition, args.num), real_statistics(run, args.num)
    check_enough(args.num, len(real[0]))
    same = {"fingerprint": run.fingerprint, "num": args.num, "batch": args.batch, "device": str(run.device),
            "cfg_scale": run.cfg.cfg_scale, "distance_name": f"Frechet distance, pixels, n = {args.num}"}
    file = run.folder / "solvers.jsonl"
    rows = [row for row in checkpoint.read_lines([file] if file.exists() else [])
            if all(row.get(key) == value for key, value in same.items())]
    done, few = {name_of(row) for row in rows}, min(8, args.num)
    sample.generate(run, few, None if y is None else y[:few], progress=False, **SETTINGS[0])    # the first call is slow
    for number, settings in enumerate(SETTINGS):
        if name_of(settings) in done:
            continue
        print(f"{number + 1}/{len(SETTINGS)} {name_of(settings)}", file=sys.stderr)
        try:
            images, report = sample.generate(run, args.num, y, 0, args.batch, cfg_scale=run.cfg.cfg_scale, **settings)
        except UserError as problem:
            print(f"left out: {problem}", file=sys.stderr)
            continue
        distance = fid.frechet_distance(*fid.statistics(pixel_features(images)), *real)
        rows.append({**report, **same, "distance": distance})
        checkpoint.append_line(file, rows[-1])
        if args.record:
            log.record(args.record, run.cfg, run.device, rows[-1])
    draw(run.folder / "solvers.png", rows)
    print(table(sorted(rows, key=lambda row: row["distance"]), same["distance_name"]))
    print(f"wrote      {run.folder}/solvers.png, solvers.jsonl")


if __name__ == "__main__":
    config.run(main)
