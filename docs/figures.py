"""Every picture of README.md and docs/, from the project's own code: drawn again by one command, on a CPU.

    python -m docs.figures                          all of them (make figures)
    python -m docs.figures --only hero step3-mask   some of them
    python -m docs.figures --run DIR --out DIR      of another run; into another directory

Garments come from docs/models/fashion; digits from out/digits, else `python train.py`, two minutes on two free cores.
What took hours is drawn from its recorded numbers, results/*.jsonl.
"""

import contextlib
import io
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import cache
from pathlib import Path

from PIL import Image

import config
import sample
import train
from config import UserError
from data import batches
from data.conditions import choose
from docs import hero, steps
from pyramid import down
from run import checkpoint, load, pictures
from studies import compare
from studies.tables import lines, of_one_length

ROOT = Path(__file__).resolve().parent.parent


def command(*words) -> None:
    """Runs a program of the project. Raises UserError with its last line when it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                          stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, words))} failed: {(done.stderr.splitlines() or [''])[-1]}")


def digits_run(name: str | None) -> load.Run:
    """The trained run whose digits are shown. Raises UserError when it is not one of the digits with two bands."""
    folder = Path(name) if name else ROOT / "out" / "digits"
    if not name and not checkpoint.steps(folder):
        print(f"there is no run in {folder} yet: python train.py, two minutes on two free cores", flush=True)
        command("train.py")
    run = load.load_run(str(folder.resolve()), device="cpu")
    cfg = run.cfg
    if (cfg.dataset, cfg.method, cfg.num_scales, cfg.mask) != ("digits", "lapflow", 2, "causal"):
        raise UserError(f"these pictures show the digits in two bands under the causal mask: {folder} is a run of "
                        f"{cfg.dataset}, method {cfg.method}, {cfg.num_scales} bands, mask {cfg.mask}")
    return run


# ---------------------------------------------------------------------------------------------------------------------
# what train.py and sample.py draw


def draw_trajectory(path: Path, run: load.Run) -> None:
    y = choose(run.condition, len(run.classes))[-3:]
    states = pictures.watch(run, sample.Guided(run.model, run.cfg.cfg_scale), sample.solve, y)
    pictures.draw_trajectory(path, run, states)


def draw_samples(path: Path, run: load.Run) -> None:
    """The first hundred of a batch as large as train.py draws: dopri5 chooses its steps for a whole batch."""
    images, y, _ = train.draw(run, 250, progress=False)
    pictures.draw_grid(path, images, y, run.condition)


def draw_loss(path: Path, run: load.Run) -> None:
    if not (run.folder / "metrics.jsonl").exists():
        raise UserError(f"{run.folder} has no metrics.jsonl: an export has no losses")
    pictures.draw_loss(run.folder, path)


def causal(path: Path, run: load.Run, what: str, *words) -> None:
    """What extras.causal draws with these words, heun with 40 steps as in README.md."""
    with tempfile.TemporaryDirectory() as folder:
        command("-m", "extras.causal", what, run.folder, *words, "--solver", "heun", "--steps", 40, "--out", folder)
        shutil.copyfile(Path(folder) / path.name, path)


def draw_upsampled(path: Path, run: load.Run, number: int = 15) -> None:
    """Images that contain a real one, averaged down to the coarsest band."""
    dataset = batches.load(run.cfg)
    x1 = dataset.x1(dataset.read([number], None)[0])                            # (1, 1, 32, 32)
    for _ in range(run.cfg.num_scales - 1):
        x1 = down(x1)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.png"
        Image.fromarray(batches.to_images(x1)[0, :, :, 0]).save(small)
        causal(path, run, "upsample", "--image", small, "--labels", dataset.labels[number], "--num", 6)


# ---------------------------------------------------------------------------------------------------------------------
# what took hours


SIDE_BY_SIDE = {
    "systems": dict(dataset="fashion", data=None, res=None, steps=2358, only=[
        "LapFlow", "LFM", "Pyramidal Flow", "PixelFlow", "EdifyImage", "DFM", "LapFlow, as in the paper"]),
    "crops": dict(dataset="folder", data="out/crops32", res=32, steps=1687, only=[
        "LapFlow", "LapFlow, 4 coarse tokens", "LFM", "Pyramidal Flow"]),
    "crops64": dict(dataset="folder", data="out/crops64", res=64, size="96,4,3,4", steps=1687, only=[
        "LapFlow", "LFM", "Pyramidal Flow"])}


def draw_systems(path: Path, folder: Path) -> None:
    """A row of samples for each system of studies.compare. Raises UserError when its runs are not there."""
    args = Namespace(**{"size": None, **SIDE_BY_SIDE[path.stem]}, ablation=None, seeds=1, out=folder)
    with contextlib.redirect_stdout(io.StringIO()):
        planned = compare.plan_runs(args)
    missing = [name for name, cfg in planned if not checkpoint.steps(Path(cfg.out))]
    if missing:
        raise UserError(f"{path.name} stays as it is: {folder} lacks {len(missing)} of the {len(planned)} runs, "
                        f"hours of python -m studies.compare --dataset {args.dataset} --steps {args.steps}")
    compare.draw_samples(path, planned, "cpu")


def draw_flops(path: Path) -> None:
    compare.draw_curves(path, compare.gathered(lines("compare"), compare.SYSTEMS)[0], lines("compare"))


def draw_lengths(path: Path) -> None:
    """Of garments: runs of a quarter, a half and the whole of the preset's length."""
    names = ("LapFlow", "LFM", "Pyramidal Flow")
    runs, _ = of_one_length("fashion", {name: compare.IMAGES[name] for name in names})
    compare.draw_curves(path, runs, lines("fashion"))


def draw_mask_cost(path: Path) -> None:
    """The errors of the covariance against the start time of the fine band."""
    rows = lines("mask_cost")
    names = list(dict.fromkeys(row["data"] for row in rows))
    curves = [([float(t) for t in row["errors"]], [100 * error for error in row["errors"].values()],
               dict(label=f"{row['data']}, {'causal mask' if row['causal'] else 'no mask'}", marker=".",
                    color=f"C{names.index(row['data'])}", linestyle="-" if row["causal"] else ":")) for row in rows]
    pictures.plot(path, curves, (7, 4), xlabel="start time T of the fine band", ylabel="error of the covariance, %",
                  ylim=(0, None))


def draw_study(path: Path) -> None:
    """Distance against seconds, one line for each kind of solver and precision; tolerances of dopri5 are points."""
    rows, curves = lines("study"), []
    names = list(dict.fromkeys(row["solver"] for row in rows))
    for solver, precision in dict.fromkeys((row["solver"], row["precision"]) for row in rows):
        line = [row for row in rows if (row["solver"], row["precision"]) == (solver, precision)]
        style = dict(label=f"{solver}, {precision}", color=f"C{names.index(solver)}",
                     marker="o" if precision == "float32" else "x",
                     linestyle="none" if solver == "dopri5" else "-" if precision == "float32" else ":")
        curves.append(([row["seconds_per_image"] for row in line], [row["distance"] for row in line], style))
    pictures.plot(path, curves, xscale="log", yscale="log", xlabel="seconds per image", ylabel=rows[0]["distance_name"])


def draw_costs(path: Path) -> None:
    """Distance against seconds for an image, one line for each system, a point for each number of steps."""
    runs, seconds = of_one_length("fashion", {name: given for name, (given, _) in compare.STEPS.items()})
    curves = []
    for system in dict.fromkeys(name.split(",")[0] for name in runs):
        rows = [name for name in runs if name.split(",")[0] == system]
        distance = [statistics.mean(row["frechet"] for row in runs[name]) for name in rows]
        curves.append(([1000 * seconds[name] for name in rows], distance, dict(label=system, marker="o")))
    pictures.plot(path, curves, (7, 4), xscale="log", yscale="log", xlabel="milliseconds for an image, one thread",
                  ylabel="Frechet distance, classifier")


# ---------------------------------------------------------------------------------------------------------------------

PLAIN = {"step1-pyramid": steps.step1, "step2-schedule": steps.step2, "step3-mask": steps.step3,
         "mask_cost": draw_mask_cost, "study": draw_study, "systems-flops": draw_flops,
         "sampling-cost": draw_costs, "garments-flops": draw_lengths}
OF_DIGITS = {"step4-training": steps.step4, "step5-sampling": steps.step5, "loss": draw_loss}
OF_GARMENTS = {"hero": hero.hero, "generation": hero.generation, "trajectory": draw_trajectory, "samples": draw_samples,
               "previews": lambda path, run: causal(path, run, "preview", "--num", 30),
               "refined": lambda path, run: causal(path, run, "refine", "--numbers", "3,17,22"),
               "variations": lambda path, run: causal(path, run, "vary", "--number", 17, "--num", 8),
               "upsampled": draw_upsampled}
NAMES = (*OF_GARMENTS, *OF_DIGITS, *PLAIN, *SIDE_BY_SIDE)


def main() -> None:
    parser = config.parser(__doc__, "python -m docs.figures [--only NAME ...] [--run DIR] [--out DIR]")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"some of {', '.join(NAMES)} [all]")
    parser.add_argument("--run", help="a run to show [docs/models/fashion; out/digits, trained when it is missing]")
    parser.add_argument("--compare", default=str(ROOT / "out/compare"), help="runs of studies.compare [out/compare]")
    parser.add_argument("--out", default=str(ROOT / "docs"), help="where the pictures go [docs]")
    args = parser.parse_args()
    load.full_float32()
    out, digits = Path(args.out), cache(lambda: digits_run(args.run))
    garments = cache(lambda: load.load_run(args.run or str(ROOT / "docs/models/fashion"), device="cpu"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"the directory {out} cannot be written: {problem}; choose another with --out") from None
    for name in args.only or NAMES:
        path, began = out / f"{name}.{'gif' if name == 'generation' else 'png'}", time.perf_counter()
        try:
            if name in SIDE_BY_SIDE:
                draw_systems(path, Path(args.compare))
            elif name in PLAIN:
                PLAIN[name](path)
            elif name in OF_DIGITS:
                OF_DIGITS[name](path, digits())
            else:
                OF_GARMENTS[name](path, garments())
        except UserError as problem:
            if name not in SIDE_BY_SIDE or args.only:
                raise
            print(problem)                                  # all the others can be drawn without an hour of training
            continue
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB, {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    config.run(main)
