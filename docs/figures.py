"""Every picture of README.md and docs/, from the project's own code: drawn again by one command, on a CPU.

    python docs/figures.py                          all of them (make figures)
    python docs/figures.py --only hero step3-mask   some of them
    python docs/figures.py --run DIR --out DIR      of another run of the digits; into another directory

The digits come from one trained run: --run, else out/digits, else `python train.py`, two minutes on two free cores.
What took hours is drawn from its recorded numbers, results/*.jsonl.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402

NAMES = ("hero", "generation", "step1-pyramid", "step2-schedule", "step3-mask", "step4-training", "step5-sampling",
         "trajectory", "samples", "loss", "previews", "refined", "variations", "upsampled", "mask_cost", "study",
         "systems", "systems-flops")

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python docs/figures.py [--only NAME ...] [--run DIR] [--out DIR]")
    PARSER.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"some of {', '.join(NAMES)} [all]")
    PARSER.add_argument("--run", help="a run of the digits with two bands [out/digits, trained when it is missing]")
    PARSER.add_argument("--compare", default=str(ROOT / "out/compare"), help="the runs of compare.py [out/compare]")
    PARSER.add_argument("--out", default=str(ROOT / "docs"), help="where the pictures go [docs]")
    ARGUMENTS = PARSER.parse_args()

import contextlib  # noqa: E402
import io  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from argparse import Namespace  # noqa: E402
from functools import cache  # noqa: E402

from PIL import Image  # noqa: E402

import checkpoint  # noqa: E402
import compare  # noqa: E402
import data  # noqa: E402
import hero  # noqa: E402
import mask_cost  # noqa: E402
import pictures  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402
import sample  # noqa: E402
import steps  # noqa: E402
import study  # noqa: E402
from config import UserError  # noqa: E402
from pyramid import down  # noqa: E402


def command(*words) -> None:
    """Runs a script of the project. Raises UserError with what it said last when it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                          stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, words))} failed: {(done.stderr.splitlines() or [''])[-1]}")


def digits_run(name: str | None) -> runs.Run:
    """The trained run whose digits are shown. Raises UserError when it is not one of the digits with two bands."""
    folder = Path(name) if name else ROOT / "out" / "digits"
    if not name and not any(folder.glob("step-*.pt")):
        print(f"there is no run in {folder} yet: python train.py, two minutes on two free cores", flush=True)
        command("train.py")
    run = runs.load_run(str(folder.resolve()), device="cpu")
    cfg = run.cfg
    if (cfg.dataset, cfg.method, cfg.num_scales, cfg.mask) != ("digits", "lapflow", 2, "causal"):
        raise UserError(f"these pictures show the digits in two bands under the causal mask: {folder} is a run of "
                        f"{cfg.dataset}, method {cfg.method}, {cfg.num_scales} bands, mask {cfg.mask}")
    return run


def lines(name: str) -> list[dict]:
    return checkpoint.read_lines([ROOT / "results" / f"{name}.jsonl"])


# ---------------------------------------------------------------------------------------------------------------------
# what train.py and sample.py draw


def draw_trajectory(path: Path, run: runs.Run) -> None:
    report.draw_trajectory(path, run, runs.choose_labels("balanced", len(run.classes), run.classes)[-3:])


def draw_samples(path: Path, run: runs.Run) -> None:
    """The first hundred of a batch as large as train.py draws: dopri5 chooses its steps for a whole batch."""
    labels = runs.choose_labels("balanced", 250, run.classes)
    images, _ = sample.generate(run, 250, labels, progress=False, **runs.solver_settings(run.cfg))
    pictures.draw_grid(path, images, labels, run.classes)


def draw_loss(path: Path, run: runs.Run) -> None:
    if not (run.folder / "metrics.jsonl").exists():
        raise UserError(f"{run.folder} holds no metrics.jsonl: an export remembers no losses")
    pictures.draw_loss(run.folder, path)


def sampled(path: Path, run: runs.Run, *words) -> None:
    """What sample.py draws with these words, heun with 40 steps as in README.md."""
    with tempfile.TemporaryDirectory() as folder:
        command("sample.py", run.folder, *words, "--solver", "heun", "--steps", 40, "--out", folder)
        shutil.copyfile(Path(folder) / path.name, path)


def draw_upsampled(path: Path, run: runs.Run, number: int = 13) -> None:
    """Digits that contain a real three, averaged down to 4 x 4 pixels."""
    loaded = data.load(run.cfg)
    x1 = loaded.x1(loaded.read([number], None)[0])                              # (1, 1, 8, 8)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.png"
        Image.fromarray(data.to_images(down(x1))[0, :, :, 0]).save(small)
        sampled(path, run, "--upsample", small, "--labels", loaded.labels[number], "--num", 6)


# ---------------------------------------------------------------------------------------------------------------------
# what took hours


def draw_systems(path: Path, folder: Path) -> None:
    """A row of samples for each system of compare.py. Raises UserError when its runs are not there."""
    asked = Namespace(dataset="digits", ablation=None, seeds=1, steps=None, size=None)
    with contextlib.redirect_stdout(io.StringIO()):
        planned = compare.plan_runs(asked, folder)
    missing = [name for name, cfg in planned if not any(Path(cfg.out).glob("step-*.pt"))]
    if missing:
        raise UserError(f"{path.name} stays as it is: {folder} lacks {len(missing)} of the {len(planned)} runs, an "
                        "hour of python compare.py")
    compare.draw_samples(path, planned, "cpu")


def draw_flops(path: Path) -> None:
    compare.draw_curves(path, compare.gathered(lines("compare"), compare.SYSTEMS)[0])


# ---------------------------------------------------------------------------------------------------------------------

PLAIN = {"step1-pyramid": steps.step1, "step2-schedule": steps.step2, "step3-mask": steps.step3,
         "mask_cost": lambda path: mask_cost.draw(path, lines("mask_cost")),
         "study": lambda path: study.draw(path, lines("study")), "systems-flops": draw_flops}
OF_A_RUN = {"hero": hero.hero, "generation": hero.generation, "step4-training": steps.step4,
            "step5-sampling": steps.step5, "trajectory": draw_trajectory, "samples": draw_samples, "loss": draw_loss,
            "previews": lambda path, run: sampled(path, run, "--preview", "--num", 30),
            "refined": lambda path, run: sampled(path, run, "--refine", "3,17,22"),
            "variations": lambda path, run: sampled(path, run, "--vary", 17, "--num", 8), "upsampled": draw_upsampled}


def main(args) -> None:
    runs.full_float32()
    out, run = Path(args.out), cache(lambda: digits_run(args.run))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"the directory {out} cannot be written: {problem}; choose another with --out") from None
    for name in args.only or NAMES:
        path, began = out / f"{name}.{'gif' if name == 'generation' else 'png'}", time.perf_counter()
        try:
            if name == "systems":
                draw_systems(path, Path(args.compare))
            else:
                PLAIN[name](path) if name in PLAIN else OF_A_RUN[name](path, run())
        except UserError as problem:
            if name != "systems" or args.only:
                raise
            print(problem)                                  # all the others can be drawn without an hour of training
            continue
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB, {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except UserError as problem:
        sys.exit(f"error: {problem}")
