"""mini.py: the method on one page, from its first import to its picture."""

import ast
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

SOURCE = (ROOT / "mini.py").read_text()


def test_it_imports_the_method_and_nothing_else_of_the_project():
    names = {node.names[0].name if isinstance(node, ast.Import) else node.module for node in ast.walk(ast.parse(SOURCE))
             if isinstance(node, (ast.Import, ast.ImportFrom))}
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert names & ours == {"pyramid", "schedule", "model"}
    assert not {name for name in names if name.split(".")[0] in ours} - {"pyramid", "schedule", "model"}


def test_it_is_the_first_listing_of_the_readme():
    first = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)[1]
    assert first.strip() == SOURCE.strip()


@pytest.mark.slow
def test_it_draws_the_digits_that_were_asked_for(tmp_path):
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    shorter = SOURCE.replace("steps = 600", "steps = 300")   # for the time; 600 are better still
    assert shorter != SOURCE
    process = subprocess.run([sys.executable, "-c", shorter], cwd=tmp_path, capture_output=True, text=True, timeout=240,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.returncode == 0, process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mini.png"]
    picture = np.asarray(Image.open(tmp_path / "mini.png"))
    assert picture.shape == (640, 640) and picture.dtype == np.uint8
    small = picture[4::8, 4::8]                             # enlarged eight times without smoothing
    assert np.array_equal(small.repeat(8, axis=0).repeat(8, axis=1), picture)
    cells = small.reshape(10, 8, 10, 8).transpose(0, 2, 1, 3).reshape(100, 64)      # column c was asked for digit c
    real = load_digits()
    judge = SVC(gamma=0.001).fit(real.data, real.target)
    agreement = (judge.predict(cells * (16 / 255)) == np.arange(100) % 10).mean()
    print(f"{agreement:.0%} of the digits are those asked for")
    assert agreement >= 0.9
    copies = np.abs(cells[:, None] * (16 / 255) - real.data).mean(axis=2).min(axis=1)
    assert np.median(copies) > 0.5                          # of 16 grey levels: drawn, not copied
