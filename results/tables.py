"""Rewrites the tables of README.md between the markers <!-- NAME --> and <!-- /NAME --> from results/NAME.jsonl
(and, for the presets, from config.py).

    python results/tables.py            rewrites README.md
    python results/tables.py --check    fails when README.md does not show what the results say
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import compare  # noqa: E402
import plan  # noqa: E402


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "results" / f"{name}.jsonl").read_text().splitlines()]


def digits() -> str:
    """The default run: one row for each score over the training seeds, with what real images get beside it."""
    rows = lines("digits")
    names = {"label_agreement": "a classifier agrees with the label asked for",
             "frechet_pixel": "Frechet distance, pixels in [0, 1]",
             "class_variance": "variance inside a class, over the real one",
             "novelty": "distance to the nearest training image, over the real one",
             "precision": "precision (k = 3)", "recall": "recall (k = 3)"}
    out = ["| 500 images, classes balanced | LapFlow | real images |", "|---|---|---|"]
    for name, text in names.items():
        out.append(f"| {text} | {compare.spread([r[name] for r in rows], 3)} | {rows[0]['real'][name]:.3f} |")
    out.append(f"| NFE ({rows[0]['solver']}) | {compare.spread([r['nfe'] for r in rows], 0)} | |")
    seconds = compare.spread([r["seconds_total"] for r in rows], 0)
    out.append(f"| `python train.py` from start to end, seconds | {seconds} | |")
    out += ["", f"{len(rows)} training seeds, mean ± standard deviation; {rows[0]['hardware']}; {rows[0]['versions']}; "
                f"commit {rows[0]['commit']}; `{rows[0]['command']}`."]
    return "\n".join(out)


def presets() -> str:
    """The rows of the paper: closed forms of this code and the paper's numbers, no measurement."""
    return plan.table()


def study() -> str:
    """Solvers of the default run: those that no other beats in both time and distance, and all of dopri5."""
    rows = sorted(lines("study"), key=lambda row: row["seconds_per_image"])
    best, out = float("inf"), ["| solver | NFE | s per image | Frechet distance, pixels |", "|---|---|---|---|"]
    for row in rows:
        size = f"{row['rtol']:g}" if row["solver"] == "dopri5" else f"{row['steps']} steps"
        if row["distance"] < best or (row["solver"] == "dopri5" and row["precision"] == "float32"):
            out.append(f"| {row['solver']} {size}, {row['precision']} | {row['nfe']:.0f} | "
                       f"{row['seconds_per_image']:.4f} | {row['distance']:.4f} |")
        best = min(best, row["distance"])
    out += ["", f"Those that no other beats in both, and all of dopri5 in float32; all {len(rows)} are in "
                f"results/study.jsonl; {rows[0]['hardware']}; {rows[0]['versions']}; commit {rows[0]['commit']}; "
                f"`{rows[0]['command']}`."]
    return "\n".join(out)


def causal() -> str:
    """What previews, refinement and upsampling measured on the default run."""
    preview, refine, vary, upsample = ({row["what"]: row for row in lines("causal")}[what] for what in (
        "preview", "refine", "vary", "upsample"))
    rows = {"a preview, against a whole image (thirty at a time)": f"{preview['speed_up']:.1f} times faster",
            "coarse bands of finished images, against their previews":
            f"at most {refine['largest_difference']:.0e} apart",
            "standard deviation between eight variations": f"{vary['std']:.2f}",
            "and between their averages over coarse pixels": f"{vary['std_coarse']:.0e}",
            "an upsampled digit averaged down, against the input (what clipping to 0..255 changes)":
            f"{upsample['rms_of_input']:.1f} of 255 (root mean square); bicubic {upsample['rms_of_input_bicubic']:.1f}"}
    out = ["| on the digits | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join([*out, "", f"heun, {preview['steps']} steps; {preview['hardware']}; {preview['versions']}; commit "
                      f"{preview['commit']}."])


def mask_cost() -> str:
    """Errors of the covariance under the causal mask, in closed form."""
    times = ("0.1", "0.2", "0.5", "0.9")
    out = ["| Gaussian data like | " + " | ".join(f"T = {t}" for t in times) + " | no mask |", "|---|" + "---|" * 5]
    rows = lines("mask_cost")
    for row in rows:
        if row["causal"]:
            free = next(r for r in rows if r["data"] == row["data"] and not r["causal"])
            out.append(f"| {row['data']} | " + " | ".join(f"{100 * row['errors'][t]:.2g}%" for t in times)
                       + f" | {100 * max(free['errors'].values()):.0g}% |")
    return "\n".join(out)


def systems() -> str:
    """The systems side by side on the digits."""
    runs, times = compare.gathered(lines("compare"), compare.SYSTEMS)
    return compare.table(runs, {}, times)


def ablations() -> str:
    """The ablations on the digits, the paper's FID beside our distance, and whether its ranking holds."""
    rows = lines("ablations")
    out = ["| ablation | | FD | class variance | NFE | parameters, M | paper: FID |", "|---" * 7 + "|"]
    for ablation, variants in compare.ABLATIONS.items():
        if ablation == "sharing":                           # at the length of the systems: LOG.md has it
            continue
        mine = [row for row in rows if (row["config"]["dataset"] == "folder") == (ablation == "space")]
        runs, _ = compare.gathered(mine, {name: settings for name, (settings, _) in variants.items()})
        paper = {name: fid for name, (_, fid) in variants.items()}
        for name, of in runs.items():
            if of:
                said = [compare.spread([row[key] for row in of], places) for key, places in (
                    ("frechet_pixel", 3), ("class_variance", 3), ("nfe", 0))]
                out.append(f"| {ablation} | {name} | {' | '.join(said)} | {of[0]['parameters'] / 1e6:.2f} | "
                           f"{paper[name] or ''} |")
        if verdict := compare.verdict(runs, paper):
            out.append(f"| | *the paper's ranking: {verdict}* | | | | | |")
    first, seeds = rows[0], len({row["config"]["seed"] for row in rows})
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return "\n".join([*out, "", f"Digits, {first['training_flops']:.2e} training FLOPs each, {seeds} seeds (one "
                      f"where no spread is shown), mean ± standard deviation; {first['n']} images, {first['solver']} "
                      f"{first['rtol']}; {first['hardware']}; {first['versions']}; commit {commits}. Within noise: the "
                      "means differ by less than two standard errors."])


def speed() -> str:
    """Our passes against those of a single-scale DiT and of the other LapFlow; ratios of medians."""
    rows = [row for row in lines("bench") if row.get("what") == "compare"]
    others = {"diffusers DiT": "diffusers' DiT", "rectified-flow-pytorch": "rectified-flow-pytorch"}
    out = ["| latents | K | batch | | FLOPs, ours / our one scale | " + " | ".join(
        f"time, ours / {name}" for name in others.values()) + " |", "|---" * (5 + len(others)) + "|"]
    for row in rows:
        for what in ("forward and backward", "forward"):
            ratios = [f"{row[what]['over'][name]:.3f}" if name in row[what]["over"] else "not measured"
                      for name in others]
            out.append(f"| {row['side']} x {row['side']} | {row['num_scales']} | {row['batch']} | {what} | "
                       f"{row['limit']:.3f} | {' | '.join(ratios)} |")

    def all_of(key):
        return "; ".join(dict.fromkeys(str(row[key]) for row in rows))

    packages = ", ".join(dict.fromkeys(f"{name} {of}" for row in rows for name, of in row["packages"].items()))
    out += ["", f"{all_of('hardware')}; {all_of('precision')}; {all_of('versions')}, {packages}; commit "
                f"{all_of('commit')}; `{all_of('command')}`."]
    for row in lines("bench"):
        if row.get("what") == "sample":
            one, many = row["batch 1"], row["batch 64"]
            out += ["", f"Sampling `{row['row']}` (`{row['command']}`; {row['hardware']}; commit {row['commit']}): "
                    f"{one['seconds_per_image']:.2f} s for one image, {many['seconds_per_image']:.4f} s each in a "
                    f"batch of 64, NFE {many['nfe']} ({row['solver']}); a preview is {one['preview_speed_up']:.1f} "
                    f"times faster for one image, {many['preview_speed_up']:.1f} in a batch of 64."]
    return "\n".join(out)


TABLES = {"digits": digits, "presets": presets, "speed": speed, "study": study, "causal": causal,
          "mask_cost": mask_cost, "systems": systems, "ablations": ablations}


def render(text: str) -> str:
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(pattern, text, flags=re.S):
            raise SystemExit(f"error: README.md has no markers for the table {name}")
        text = re.sub(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    new = render(readme.read_text())
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == readme.read_text() else "error: README.md is out of date: run python results/tables.py")
    readme.write_text(new)
