"""Writes the tables between the markers <!-- NAME --> and <!-- /NAME --> of README.md and docs/*.md, from
results/*.jsonl and, for the presets, from run/paper.py. A table stands on exactly one of these pages.

    python -m studies.tables            writes them
    python -m studies.tables --check    fails when a page does not show what the results say
"""

import json
import re
import statistics
from collections import Counter
from functools import partial
from pathlib import Path

import config
from config import UserError
from run import checkpoint
from run.paper import PRESETS
from studies import compare, plan, variety
from studies.output import markdown, origin, seeds, spread

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/results.md", "docs/paper.md", "docs/scores.md")


def lines(name: str) -> list[dict]:
    return checkpoint.read_lines([ROOT / "results" / f"{name}.jsonl"])


def of_one_length(name: str, wanted: dict, dataset: str = "") -> tuple[dict, dict]:
    """Runs and times by name, as compare.gathered; of the training FLOPs that most runs have, the most among equals."""
    known = json.loads(json.dumps(list(wanted.values())))
    rows = [row for row in lines(name) if row["settings"] in known and dataset in ("", row["config"]["dataset"])]
    lengths = Counter(f"{row['training_flops']:.1e}" for row in rows if row["what"] == "run")
    most = max(lengths, key=lambda flops: (lengths[flops], float(flops)), default="")
    return compare.gathered([row for row in rows if f"{row.get('training_flops', 0):.1e}" == most
                             or row["what"] == "time"], wanted)


def garments() -> str:
    """Fashion-MNIST: LapFlow, the systems of the paper nearest to it, and real images, one row for each score."""
    names = ("LapFlow", "LFM", "Pyramidal Flow")
    runs, _ = of_one_length("fashion", {name: compare.IMAGES[name] for name in names})
    if not all(runs.values()):
        return "not measured yet"
    first, every = runs["LapFlow"][0], sum(runs.values(), [])
    texts = {"label_agreement": ("a classifier agrees with the label asked for", 3),
             "frechet": ("Frechet distance, features of that classifier", 2),
             "frechet_efficientnet": ("Frechet distance, features of EfficientNet (ImageNet)", 0),
             "class_variance": ("variance inside a class, over the real one", 3),
             "precision": ("precision (k = 3)", 3), "recall": ("recall (k = 3)", 3)}
    table = [[text, *(spread([row[key] for row in runs[name]], places) for name in names),
              f"{first['real'][key]:.{places}f}"] for key, (text, places) in texts.items()]
    head = [f"{first['n']:,} images of 32 x 32", *names, "real images"]
    return (f"{markdown(head, table)}\n\n{first['training_flops']:.1e} training FLOPs each; {seeds(runs.values())}; "
            f"{origin(every, 'hardware', 'versions')}.")


def systems(name: str, wanted: dict = compare.SYSTEMS) -> str:
    """The systems side by side on one data set; wanted: its rows, name -> settings."""
    runs, times = of_one_length(name, wanted)
    return compare.table(runs, {}, times) if any(runs.values()) else "not measured yet"


def ablations(name: str, dataset: str) -> str:
    """The ablations on one data set, the paper's FID beside our scores."""
    given, columns = compare.IMAGE_ABLATIONS, ("frechet", "frechet_efficientnet", "precision", "recall",
                                               "class_variance", "label_agreement", "nfe")
    if dataset == "digits":
        given, columns = compare.ABLATIONS, ("frechet_pixel", "class_variance", "nfe")
    groups, table = [], []
    for ablation, variants in given.items():
        settings = {variant: changes for variant, (changes, _) in variants.items()}
        runs, _ = of_one_length(name, settings, dataset)
        for variant, group in runs.items():
            if group and sum(map(bool, runs.values())) > 1:
                scores = [spread([row[key] for row in group], compare.COLUMNS[key][1]) for key in columns]
                parameters, paper_fid = f"{group[0]['parameters'] / 1e6:.2f}", variants[variant][1]
                table.append([ablation, variant, *scores, parameters, paper_fid or ""])
                groups.append(group)
    if not table:
        return "not measured yet"
    head = ["ablation", "", *(compare.COLUMNS[key][0] for key in columns), "parameters, M", "paper: FID"]
    first, every = groups[0][0], sum(groups, [])
    return (f"{markdown(head, table)}\n\n{first['training_flops']:.2e} training FLOPs each; {seeds(groups)}; "
            f"{first['n']} images, {first['solver']} {first['rtol']}; "
            f"{origin(every, 'hardware', 'versions')}.")


def speed() -> str:
    """Our passes against those of a single-scale DiT and of the other LapFlow: medians of the last eight runs."""
    rows, table = [row for row in lines("bench") if row.get("what") == "compare"], []
    rivals = {"diffusers DiT": "diffusers' DiT", "rectified-flow-pytorch": "rectified-flow-pytorch"}
    for row in {row["side"]: row for row in rows}.values():
        for what in ("forward and backward", "forward"):
            over = {name: [line[what]["over"][name] for line in rows
                           if line["side"] == row["side"] and name in line[what]["over"]] for name in rivals}
            ratios = [f"{statistics.median(runs[-8:]):.3f}" if runs else "not measured" for runs in over.values()]
            table.append([f"{row['side']} x {row['side']}", row["num_scales"], row["batch"], what,
                          f"{row['limit']:.3f}", *ratios])
    head = ["latents", "K", "batch", "", "FLOPs, ours / our one scale", *(f"time, ours / {n}" for n in rivals.values())]
    packages = sorted({f"{name} {version}" for row in rows for name, version in row["packages"].items()})
    commands = "; ".join(dict.fromkeys(row["command"] for row in rows))
    return (f"{markdown(head, table)}\n\n{origin(rows, 'hardware', 'precision', 'versions')}; {', '.join(packages)}; "
            f"`{commands}`.")


# What a GPU should reach: images/s of training, seconds of an image at batch 1. Estimated for an H200, before any run.
TARGETS = {"celebahq-256": (1000, 0.3), "celebahq-512": (300, 0.6), "celebahq-1024": (55, 1.2),
           "imagenet-256-B": (3300, ""), "imagenet-256-XL": (680, "")}
MODES = ("float32", "bfloat16", "bfloat16 weights, graphs", "bfloat16 weights, compiled, graphs")


def gpu() -> str:
    """Training and sampling on the GPU that was measured last, in whole steps and at batch 1, without decoding."""
    rows = [row for row in lines("gpu") if row["what"] == "gpu" and not row["dry_run"]]
    rows = [row for row in rows if row["hardware"] == rows[-1]["hardware"]]

    def cell(key, places, **wanted):
        values = [row[key] for row in rows if wanted.items() <= row.items() and row[key] is not None]
        return f"{values[-1]:.{places}f}" if values else "not measured"

    table = []
    for name, (images, seconds) in TARGETS.items():
        eager, compiled = ({"figure": "training", "preset": name, "mode": mode} for mode in ("eager", "compiled"))
        table.append([f"`{name}`", cell("images_per_second", 0, **eager), cell("images_per_second", 0, **compiled),
                      images, cell("mfu", 2, **compiled), cell("memory_gb", 0, **compiled),
                      *(cell("seconds_per_image", 2, figure="sampling", preset=name, batch=1, mode=mode)
                        for mode in MODES), seconds, PRESETS[name].paper["seconds"]])
    head = ["preset", "training, images/s", "compiled", "target", "MFU, compiled", "GB", *(
        f"s / image, {mode}" for mode in MODES), "target", "paper, decoded"]
    commands = "; ".join(dict.fromkeys(row["command"] for row in rows))
    return markdown(head, table) + (f"\n\n{origin(rows, 'hardware', 'versions')}; `{commands}`." if rows else "")


TABLES = {"garments": garments, "presets": plan.presets, "speed": speed, "gpu": gpu,
          "systems": partial(systems, "compare"), "ablations": partial(ablations, "ablations", "digits"),
          "fashion": partial(systems, "fashion", compare.IMAGES), "crops": partial(systems, "crops", compare.FOLDER_32),
          "fashion_ablations": partial(ablations, "fashion", "fashion"),
          "crops64": partial(systems, "crops64", compare.FOLDER_64),
          "fashion_steps": partial(systems, "fashion", {name: given for name, (given, _) in compare.STEPS.items()}),
          "fashion_guidance": partial(systems, "fashion", {name: row[0] for name, row in compare.GUIDANCE.items()}),
          "quality": partial(systems, "quality", compare.IMAGES), "variety": lambda: variety.table(lines("variety"))}


def render(pages: dict[str, str]) -> dict[str, str]:
    """The pages, name -> text, with their tables. Raises UserError for a table that is not on exactly one of them."""
    pages = dict(pages)
    for name, make in TABLES.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        places = [page for page, text in pages.items() for _ in marked.findall(text)]
        if len(places) != 1:
            raise UserError(f"the markers <!-- {name} --> and <!-- /{name} --> must stand once on one of "
                            f"{', '.join(pages)}; they stand on {', '.join(places) or 'none'}")
        table = make()
        pages[places[0]] = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", pages[places[0]])
    return pages


def main() -> None:
    parser = config.parser(__doc__, "python -m studies.tables [--check]")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is out of date")
    args = parser.parse_args()
    pages = {name: (ROOT / name).read_text() for name in PAGES if (ROOT / name).exists()}
    for name, text in render(pages).items():
        if text != pages[name] and args.check:
            raise UserError(f"{name} is out of date: run python -m studies.tables")
        (ROOT / name).write_text(text)


if __name__ == "__main__":
    config.run(main)
