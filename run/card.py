"""The model card of an export, and its way to the hub: `python sample.py RUN --export DIR --push OWNER/NAME`.

The card says how the run was trained, what was measured, and what the licence of its data allows. It says what is not
known. Like config.json, it names no place on the disk of whoever trained.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import config
from config import UserError, explain
from data.conditions import Vectors
from run import checkpoint, load, memory, pictures
from run.load import HUB, PLACES, Run
from run.paper import find_row, nearest_preset, resolve
from run.ranks import Ranks
from scores.table import table

FILES = ("README.md", "config.json", "model.safetensors", "model_index.json", "samples.png")   # all that is uploaded
INDEX = {"_class_name": "LapFlowPipeline", "_diffusers_version": "0.30.0"}      # for extras/pipeline.py
UNKNOWN = "not known"

# The licence of each data set: the hub's name for it, its own name where the hub has none, and a sentence.
LICENCES = {
    "digits": ("cc-by-4.0", "", "scikit-learn's digits are the test set of Optical Recognition of Handwritten Digits "
               "by E. Alpaydin and C. Kaynak ([UCI](https://archive.ics.uci.edu/dataset/80), CC BY 4.0): name them "
               "when you share."),
    "fashion": ("mit", "", "[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (Zalando SE) is MIT."),
    "celebahq": ("other", "celeba-non-commercial-research", "CelebA-HQ is for non-commercial research only, and models "
                 "trained on it may inherit that limit. Its faces are those of real people."),
    "imagenet": ("other", "imagenet-non-commercial-research", "ImageNet is for non-commercial research and education "
                 "only, and models trained on it may inherit that limit. Its authors do not own the images."),
    "folder": ("unknown", "", "**Your own images: say their licence here, and in `license:` above.**"),
}


def share(run: Run, args: argparse.Namespace, ranks: Ranks) -> None:
    """The export of sample.py: weights, configuration and card; uploads them with args.push. Raises UserError."""
    if ranks.world > 1:
        raise UserError("an export is made by one process: start it with python")
    folder = Path(args.export)
    load.export(run, folder)
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    try:
        y = None if run.condition is None else run.condition.draw(40).cpu()
        pictures.draw_grid(folder / "samples.png", run.sample(40, batch=args.batch), y, run.condition)
    except UserError as problem:                            # such as an autoencoder that is elsewhere
        (folder / "samples.png").unlink(missing_ok=True)
        print(f"note: the card has no samples: {problem}", file=sys.stderr)
    text = write(run, args.push or "OWNER/NAME", grid=(folder / "samples.png").exists())
    (folder / "README.md").write_text(text, encoding="utf-8")
    files = [name for name in FILES if (folder / name).exists()]
    print(f"wrote      {folder}/{', '.join(files)}: {run.weights} weights at step {run.step}; "
          f"python sample.py {folder}")
    if args.push:
        push(run, folder, files, args)


# ---------------------------------------------------------------------------------------------------------------------
# the card


def write(run: Run, name: str, grid: bool) -> str:
    """README.md of an export. name: OWNER/NAME on the hub; grid: is there a samples.png beside it?"""
    cfg, (licence, licence_name, data) = run.cfg, licence_of(run)
    named = [f"license_name: {licence_name}"] if licence_name else []
    header = ["---", f"license: {licence}", *named, "library_name: lapflow",
              "pipeline_tag: unconditional-image-generation", "tags:",
              *(f"- {tag}" for tag in ("lapflow", "flow-matching", "laplacian-pyramid", "image-generation")), "---"]
    condition = (f"vectors of {run.facts['vectors'][1]} numbers" if run.facts.get("vectors") else
                 f"{len(run.classes)} classes" if run.classes else "no condition")
    method = ("LapFlow flows the bands of a Laplacian pyramid from noise to data, the coarse ones first ([Zhao, "
              "Molodyk, Xue, Chen, ICLR 2026](https://arxiv.org/abs/2602.19461))." if cfg.method == "lapflow" else
              f"It is not LapFlow itself, but `{cfg.method}`, a system that its code compares with.")
    samples = f"![40 samples, seed 0, solver {cfg.solver}, guidance {cfg.cfg_scale:g}](samples.png)" if grid else ""
    sections = [
        "\n".join(header), f"# LapFlow: {cfg.dataset}, {cfg.res} x {cfg.res}",
        f"Generates images of {cfg.res} x {cfg.res} pixels, {condition}; {memory.parameters(run.model) / 1e6:.2f} M "
        f"parameters. {method} This model comes from a reimplementation, not from the authors.",
        samples, "## Use", use(run, name), "## Training", training(run), "## Scores", scores(run), "## Limits",
        limits(run), "## Licences", f"{data} The code of LapFlow is MIT." + (
            f" The autoencoder {place(cfg.vae, 'that decodes')} has a licence of its own." if cfg.vae else "")]
    return "\n\n".join(section for section in sections if section) + "\n"


def licence_of(run: Run) -> tuple[str, str, str]:
    """The hub's name of the licence of its data, another name where that is "other", and a sentence."""
    licence, name, text = LICENCES.get(run.cfg.dataset, LICENCES["folder"])
    if run.cfg.init:
        licence, name = "unknown", ""
        text += " **The training started from other weights, whose data have a licence of their own: say it here.**"
    elif checkpoint.is_export(run.folder):                  # an export does not name them
        text += " This was made from another export: whether its training started from other weights is not known."
    return licence, name, text


def place(name: str, otherwise: str) -> str:
    """A name on the hub as it is; a folder of this machine is not told."""
    return name if HUB.fullmatch(name) and not Path(name).exists() else otherwise


def use(run: Run, name: str) -> str:
    """The loader: one line in a script, one on the command line."""
    asked = ("vectors=vectors, seed=0)     # vectors: (N, dim)" if isinstance(run.condition, Vectors) else
             f"labels=[{json.dumps(run.classes[-1], ensure_ascii=False)}] * 16, seed=0)" if run.classes else
             "16, seed=0)")
    height, width, channels = run.image_shape
    vae = ', vae="DIR"' if run.cfg.vae and not place(run.cfg.vae, "") else ""
    return ("In a copy of the LapFlow code, after `pip install -e .`:\n\n```python\nfrom run.load import load_run\n\n"
            f'images = load_run("{name}"{vae}).sample({asked}\n```\n\n'
            f"gives uint8 (N, {height}, {width}, {channels}). `python sample.py {name}` writes files, and "
            "`extras/pipeline.py` makes it a pipeline of diffusers. The weights are plain tensors, without code.")


def training(run: Run) -> str:
    cfg, count = run.cfg, run.facts["count"]
    starts = [line for line in checkpoint.read_lines(run.folder.glob("starts.jsonl")) if line["step"] < run.step]
    names = {key: "; ".join(dict.fromkeys(line[key] for line in starts if line[key])) or UNKNOWN
             for key in ("commit", "hardware", "versions")}
    flops = memory.step_flops(cfg, run.facts) * run.step
    epochs = f"{run.step * cfg.batch / count:,.1f} epochs of {count:,} images"
    rows = {"steps": f"{run.step:,} of {cfg.batch} images, {epochs}",
            "weights": {"ema": "moving average", "raw": "as trained, not averaged"}[run.weights],
            "training FLOPs": f"{flops:.2e} (matrix products; backward counted as two forwards)",
            "code": f"commit {names['commit']}", "hardware": names["hardware"], "versions": names["versions"]}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"```bash\n{command(cfg)}\n```\n\n| | |\n|---|---|\n{table}"


def command(cfg: load.Config) -> str:
    """The command line of train.py that gives these settings; folders are called DIR."""
    name, places = find_row(cfg) or nearest_preset(cfg.to_dict()), set(PLACES)
    given = {"preset": name}
    for _ in range(2):                                      # a setting may change others: lfm has one scale
        base = resolve(given)
        given |= {key: getattr(cfg, key) for key in cfg.to_dict() if key not in places
                  and getattr(base, key) != getattr(cfg, key)}
    if given.get("vae"):
        given["vae"] = place(given["vae"], "DIR")
    if name == "digits":                                    # the defaults
        del given["preset"]
    words = ["python", "train.py", *config.flags(given)]
    words += ["--data", "DIR"] if cfg.dataset in ("folder", "celebahq", "imagenet") else []
    return shlex.join(words + (["--init", "RUN"] if cfg.init else []))


def scores(run: Run) -> str:
    """Those in the run's directory that were measured on these weights."""
    parts = []
    for file in sorted(run.folder.glob("scores*.json")):
        report = checkpoint.read_json(file, "scores of a run") or {}
        if "n_reference" in report and (report.get("step"), report.get("weights")) == (run.step, run.weights):
            cost = f", {report['nfe']:g} calls of the network each" if "nfe" in report else ""
            keys = ("steps", "interval", "noise_scale", "labels", "vectors")
            how = "".join(f", {key.replace('_', ' ')} {report[key]}" for key in keys
                          if report.get(key) not in (None, [], [0, 1], "balanced"))
            parts.append(f"{report['num']} images, seed {report['seed']}, {report['solver']}, guidance "
                         f"{report['cfg_scale']:g}{how}{cost}; `real`: as many real images, scored the same way.\n\n"
                         f"```\n{table(report)}\n```")
    return "\n\n".join(parts) or "Not measured on these weights. `python fid.py` measures them."


def limits(run: Run) -> str:
    cfg = run.cfg
    what = f"its {len(run.classes)} classes ({names_of(run)})" if run.classes else "what its training images show"
    copies = ("`novelty` above says how far samples are from training images: 0 is a copy, 1 as far as a real image"
              if "novelty" in scores(run) else f"Whether samples repeat training images is {UNKNOWN}")
    lines = [f"Images of {cfg.res} x {cfg.res} pixels, and nothing but {what}.",
             f"{copies}.",
             "Biases of the training images are repeated, and were not examined.",
             "Scores depend on the number of images, the solver and the features: compare only like with like."]
    if cfg.dataset == "digits":
        lines.append("A two-minute test of the method, not a useful generator.")
    return "\n".join(f"- {line}" for line in lines)


def names_of(run: Run, most: int = 10) -> str:
    more = f", ... {run.classes[-1]}" if len(run.classes) > most else ""
    return ", ".join(run.classes[: most - bool(more)]) + more


# ---------------------------------------------------------------------------------------------------------------------
# the hub


def check_push(args: argparse.Namespace) -> None:
    """Raises UserError, before the work, for an upload that cannot be."""
    if args.push and not args.export:
        raise UserError("--push uploads an export: name its directory too, --export DIR")
    if args.push and (not HUB.fullmatch(args.push) or "@" in args.push):
        raise UserError(f"--push takes OWNER/NAME on the Hugging Face hub, not {args.push!r}")
    if args.push and not args.yes and not sys.stdin.isatty():
        raise UserError("--push asks before it uploads, and nobody can answer here: add --yes to upload unasked")


def public(run: Run, folder: Path, files: list[str], name: str) -> str:
    """What an upload makes public, in lines for people."""
    what = {"model.safetensors": f"{run.weights} weights at step {run.step}",
            "config.json": "the settings without folders" + (f"; classes {names_of(run)}" if run.classes else ""),
            "README.md": "the card; edit it before you answer, it is uploaded as it is then",
            "model_index.json": "a name, for diffusers", "samples.png": "40 generated images"}
    if isinstance(run.condition, Vectors):
        what["model.safetensors"] += f", and {len(run.condition.examples)} vectors of training images as they are"
    if run.cfg.vae and not place(run.cfg.vae, ""):
        what["config.json"] += f"; the folder of the autoencoder, {run.cfg.vae}"
    lines = [f"           {file:18s} {(folder / file).stat().st_size / 1e6:8.3f} MB  {what[file]}" for file in files]
    return "\n".join([f"public     {name} on the Hugging Face hub: everybody can read, copy and keep", *lines,
                      f"licence    {licence_of(run)[0]}, from its data: the README says so"])


def push(run: Run, folder: Path, files: list[str], args: argparse.Namespace) -> None:
    """Uploads these files, and no others, after a yes."""
    from huggingface_hub import CommitOperationAdd, HfApi

    print(public(run, folder, files, args.push))
    if not args.yes and not agreed():
        return print(f"nothing was uploaded; the files are in {folder}")
    with explain(f"cannot upload to {args.push}",
                 f"; log in with `hf auth login`, or set HF_TOKEN. The files are in {folder}"):
        hub = HfApi()
        hub.create_repo(args.push, exist_ok=True)
        commit = hub.create_commit(args.push, [CommitOperationAdd(file, folder / file) for file in files],
                                   commit_message=f"LapFlow export, step {run.step}")
    print(f"uploaded   {commit.commit_url}")


def agreed() -> bool:
    try:
        return input("upload?    [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
