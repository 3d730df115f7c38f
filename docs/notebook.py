"""Builds docs/lapflow.ipynb: the method in a notebook, from the pyramid of a photograph to digits, trained and varied.

    python -m docs.notebook [FILE]                  runs every cell, minutes on two cores, and writes it with pictures
    python -m docs.notebook --repository URL        the address that a notebook without the code clones

Code of the method is copied from the sources, so it cannot differ from them; a test compares the file with this one.
A cell's last expression is its output when it is a picture. LAPFLOW_STEPS shortens the training.
"""

import ast
import base64
import io
import json
import os
import re
from contextlib import redirect_stdout
from pathlib import Path

from PIL import Image

import config

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "lapflow.ipynb"

CELLS = """
# LapFlow in a notebook

LapFlow ([Zhao, Molodyk, Xue, Chen, ICLR 2026](https://arxiv.org/abs/2602.19461)) generates images with a Laplacian
pyramid: its bands flow from noise to data inside one transformer, the coarse ones first. Here: the pyramid of a
photograph, the schedule, digits that are trained, and what a causal pyramid can do. All of it takes minutes on two
CPU cores; a GPU is used when there is one.

*Made by `python -m docs.notebook` from the sources: change them there.*

### Install

Nothing happens in a copy of the repository with its packages installed.
%%
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = ""                                             # its address, when this notebook came without the code

if not Path("model.py").exists():
    if not Path("../model.py").exists():
        assert REPOSITORY or Path("lapflow").exists(), "write the address of the repository into REPOSITORY"
        if not Path("lapflow").exists():
            subprocess.run(["git", "clone", "--quiet", REPOSITORY, "lapflow"], check=True)
    os.chdir("lapflow" if Path("lapflow").exists() else "..")
sys.path.insert(0, os.getcwd())
if not find_spec("torchdiffeq"):
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", "."], check=True)
OUT = Path("out/notebook")
OUT.mkdir(parents=True, exist_ok=True)
%%
## The pyramid of a photograph

$D$ averages blocks of 2 x 2 pixels, $U$ doubles each pixel. Band 0 is a thumbnail, each finer band the detail that
the next smaller image lacks:

$$b_0 = D^{K-1} x, \\qquad b_i = D^{K-1-i} x - U D^{K-i} x, \\qquad x = \\sum_i U^{K-1-i} b_i$$

{{pyramid.decompose}}
%%
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from data.batches import to_images
from pyramid import decompose, reconstruct
from run.pictures import draw_images

photo = load_sample_image("china.jpg")[:384, 128:512]       # by danielbuechele, CC BY 2.0
photo = np.asarray(Image.fromarray(photo).reduce(4))        # (96, 96, 3)
x = torch.tensor(photo).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, 96, 96) in [-1, 1]
bands = decompose(x, 3)
print("bands", [tuple(band.shape[1:]) for band in bands], "- their sum differs from the photograph by",
      f"{(reconstruct(bands) - x).abs().max():.0e}")
cells = [x, bands[0], 2 * bands[1], 2 * bands[2], reconstruct(bands)]
draw_images(OUT / "pyramid.png", [[to_images(cell)[0] for cell in cells]], [],
            ["photograph", "band 0", "band 1 (x 2)", "band 2 (x 2)", "their sum"])
Image.open(OUT / "pyramid.png")
%%
## The schedule

Time 0 is noise, time 1 is data. Band $i$ enters at its start time $T_i$ as noise, and moves straight to its data
while the noise of all bands fades together. That noise is one white image, split by the same pyramid, so a band can
join without correction:

$$x_t^{(i)} = \\frac{t - T_i}{1 - T_i}\\, x_1^{(i)} + (1 - t)\\, x_0^{(i)}, \\qquad t \\in [T_i, 1]$$

{{schedule.Schedule.interpolate}}
%%
from schedule import Schedule

schedule = Schedule(starts=(0.0, 1 / 3, 2 / 3))
noise = decompose(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), 3)
times, rows = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [[], [], []]
for t in times:
    active = sum(start <= t for start in schedule.starts)   # bands that have entered
    xt, v = schedule.interpolate(bands[:active], noise[:active], torch.tensor([t]))
    for i in range(3):
        late = f"from\\nt = {schedule.starts[i]:.2f}"
        rows[i].append(to_images(xt[i] * (1 if i == 0 else 2))[0] if i < active else late)
draw_images(OUT / "schedule.png", rows, [], [f"t = {t:.1f}" for t in times], ["band 0", "band 1", "band 2"])
Image.open(OUT / "schedule.png")
%%
## Train the digits

8 x 8 handwritten digits, two bands: 1,000 steps, two minutes on two free CPU cores, and longer on a busy machine, as
here. Stage $s$ takes the bands $0 \\dots s$ at a random time and learns their velocities. No band reads a finer one, so
the first bands alone are a valid input:

{{schedule.loss}}
%%
import train
from run.paper import resolve

steps = int(os.environ.get("LAPFLOW_STEPS", 1000))
cfg = resolve({"dataset": "digits", "steps": steps, "log_every": 100, "out": str(OUT)})
scores = train.finish(train.train(cfg))                     # run again, it continues, or only samples and scores
Image.open(OUT / "samples.png")
%%
## Draw

One line loads a run, an export, or OWNER/NAME on the Hugging Face hub; one call draws. Image i depends on the seed
and on i alone.
%%
from run.load import load_run

run = load_run(str(OUT))
sevens = run.sample(labels=["7"] * 10, seed=0)              # uint8 (10, 8, 8, 1)
guided = run.sample(labels=["7"] * 10, seed=0, cfg_scale=3.0)
draw_images(OUT / "sevens.png", [list(sevens), list(guided)], [], [], ["no guidance", "guidance 3"])
Image.open(OUT / "sevens.png")
%%
## Watch the bands flow

A solver moves the coarse band alone from $T_0 = 0$ to $T_1 = 0.5$; then the fine band joins as noise, and both go on
to $t = 1$.
%%
import sample
from run.pictures import draw_trajectory, watch

y = torch.tensor([3, 5, 8])
states = watch(run, sample.Guided(run.model), sample.solve, y, seed=0)      # [(t, bands), ...]
draw_trajectory(OUT / "trajectory.png", run, states)
Image.open(OUT / "trajectory.png")
%%
## Preview, refine, vary

Coarse bands do not depend on finer ones. So a preview is the coarse band alone, in less time, and exactly the coarse
band of the image that comes later (with fixed steps). Look at thirty, and finish the ones you like:
%%
import time

small = run.sample(30, steps=20, preview=True)              # (30, 4, 4, 1)
images = run.sample(30, steps=20)                           # the same thirty, whole
seconds = []
for preview in (True, False):
    began = time.perf_counter()
    run.sample(30, steps=20, preview=preview)
    seconds.append(time.perf_counter() - began)
print(f"previews {seconds[0]:.2f} s, images {seconds[1]:.2f} s")
draw_images(OUT / "previews.png", [list(small[i : i + 10]) for i in (0, 10, 20)],
            [[str(i + k) for k in range(10)] for i in (0, 10, 20)])
Image.open(OUT / "previews.png")
%%
from extras.causal import draw_bands, noise_of, vary

chosen, settings = [3, 17, 22], dict(solver="heun", steps=20)
y = torch.tensor(chosen) % 10                               # their classes: they come in turn
finished, nfe = draw_bands(run, noise_of(run, 0, chosen), y, **settings)
refined = run.decode(run.schedule.image(finished))
assert np.abs(refined.astype(int) - images[chosen]).max() <= 1  # the whole images of above
draw_images(OUT / "refined.png", [list(small[chosen]), list(refined)], [], [f"image {i}" for i in chosen],
            ["preview", "finished"])
Image.open(OUT / "refined.png")
%%
**Vary:** the same coarse noise with new fine noise gives the same digit with other details.
%%
x1, nfe = vary(run, 17, 9, torch.full((9,), 7), **settings)
draw_images(OUT / "variations.png", [[refined[1], *run.decode(x1)]], [], ["image 17", *map(str, range(9))])
Image.open(OUT / "variations.png")
%%
## Next

- Your own images: `python train.py --dataset folder --data my-images --res 64`; subfolders become classes.
- Share a run: `python sample.py out/notebook --export shared` writes weights and a model card, `--push OWNER/NAME`
  uploads them after a question.
- The [README](../README.md) explains the method in five steps, and lists what was measured and what was not.""".strip()


def excerpt(name: str) -> str:
    """The source of MODULE.FUNCTION or MODULE.CLASS.METHOD, without its docstring, as a block of Markdown."""
    module, *names = name.split(".")
    text = (ROOT / f"{module}.py").read_text()
    node = ast.parse(text)
    for part in names:
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    lines, indent = text.splitlines()[node.lineno - 1 : node.end_lineno], node.col_offset
    if ast.get_docstring(node):
        first, last = node.body[0].lineno - node.lineno, node.body[0].end_lineno - node.lineno
        lines[first : last + 1] = []
    return "\n".join(["```python", f"# {module}.py", *(line[indent:] for line in lines), "```"])


def cells(repository: str = "") -> list[dict]:
    """Those of the notebook, without outputs. Cells are divided by %%; Markdown begins with #, ** or a capital."""
    result = []
    for text in CELLS.replace('REPOSITORY = ""', f"REPOSITORY = {json.dumps(repository)}").split("\n%%\n"):
        markdown = re.match(r"#|\*\*", text)
        text = re.sub(r"\{\{([\w.]+)\}\}", lambda match: excerpt(match[1]), text)
        cell = {"cell_type": "markdown" if markdown else "code", "metadata": {}, "source": text.splitlines(True)}
        result.append(cell if markdown else {**cell, "execution_count": None, "outputs": []})
    return result


def execute(notebook: list[dict]) -> None:
    """Runs the code cells in order, in this process, and fills in their outputs: what they print, and a picture."""
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cell for cell in notebook if cell["cell_type"] == "code"):
        tree, printed = ast.parse("".join(cell["source"])), io.StringIO()
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with redirect_stdout(printed):
            exec(compile(tree, f"cell {number}", "exec"), names)
            value = last and eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        cell["execution_count"] = number + 1
        if text := printed.getvalue():
            cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": text.splitlines(True)})
        if isinstance(value, Image.Image):
            png = io.BytesIO()
            value.convert("RGB").save(png, "png", optimize=True)
            cell["outputs"].append({"output_type": "display_data", "metadata": {}, "data": {
                "image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["a picture"]}})


def write(file: Path, notebook: list[dict]) -> None:
    about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
             "language_info": {"name": "python"}}
    file.write_text(json.dumps({"cells": notebook, "metadata": about, "nbformat": 4, "nbformat_minor": 4}, indent=1,
                               ensure_ascii=False) + "\n")


def main() -> None:
    parser = config.parser(__doc__, "python -m docs.notebook [FILE] [--repository URL]")
    parser.add_argument("file", nargs="?", type=Path, default=FILE, help="to write [docs/lapflow.ipynb]")
    parser.add_argument("--repository", default="", metavar="URL", help="what it clones where the code is missing")
    args = parser.parse_args()
    file = args.file.resolve()
    os.chdir(ROOT)
    notebook = cells(args.repository)
    execute(notebook)
    write(file, notebook)
    print(f"wrote      {args.file}: {len(notebook)} cells, {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    config.run(main)
