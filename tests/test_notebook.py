"""docs/lapflow.ipynb: it is what docs/notebook.py makes of the sources, it is small, and its cells run."""

import ast
import base64
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from docs import notebook

IGNORED = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "*.egg-info", "out", "latents", "judges", "samples")


def test_the_notebook_is_made_of_the_sources():
    """After a change of docs/notebook.py, or of a function shown there: python -m docs.notebook."""
    saved = json.loads(notebook.FILE.read_text())["cells"]
    made = notebook.cells()
    assert [(cell["cell_type"], cell["source"]) for cell in saved] == [(c["cell_type"], c["source"]) for c in made]
    kinds = [cell["cell_type"] for cell in made]
    assert kinds.count("code") == 9 and kinds.count("markdown") == 9


def test_the_notebook_is_small_and_has_its_pictures():
    assert notebook.FILE.stat().st_size < 1_000_000
    text = notebook.FILE.read_text()
    assert len(pictures(json.loads(text))) == 8
    assert '"Traceback' not in text and "/root/" not in text and "/home/" not in text and str(ROOT) not in text


def pictures(saved: dict) -> list[np.ndarray]:
    data = [output["data"]["image/png"] for cell in saved["cells"] for output in cell.get("outputs", ())
            if output["output_type"] == "display_data"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L")) for png in data]


def test_an_excerpt_is_a_whole_function_without_its_docstring():
    text = notebook.excerpt("schedule.Schedule.interpolate")
    code = text.removeprefix("```python\n# schedule.py\n").removesuffix("\n```")
    node = ast.parse(code).body[0]
    assert node.name == "interpolate" and not ast.get_docstring(node) and len(node.body) >= 2
    assert '"""' not in code and "{{" not in "".join("".join(cell["source"]) for cell in notebook.cells())


def test_outputs_are_what_a_cell_prints_and_its_picture():
    def code(source):
        return {"cell_type": "code", "source": [source], "outputs": [], "execution_count": None, "metadata": {}}

    made = [code("from PIL import Image\nprint('one')\n2 + 2"), code("Image.new('L', (3, 2), 7)")]
    notebook.execute(made)
    assert made[0]["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["one\n"]}]
    (picture,) = pictures({"cells": made})
    assert picture.shape == (2, 3) and (picture == 7).all() and made[1]["execution_count"] == 2
    with pytest.raises(ZeroDivisionError):
        notebook.execute([code("1 / 0")])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("git"), reason="the first cell clones with git")
def test_the_cells_run_in_an_empty_directory(tmp_path):
    """As on a hosted notebook: the first cell clones the repository; a short training."""
    shutil.copytree(ROOT, tmp_path / "origin", ignore=IGNORED)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x.example"]
    for command in ([*git, "init", "-q"], [*git, "add", "-A"], [*git, "commit", "-qm", "x"]):
        subprocess.run(command, cwd=tmp_path / "origin", check=True)
    (tmp_path / "empty").mkdir()
    script = f"""if True:
        from pathlib import Path
        from docs import notebook
        cells, file = notebook.cells({str(tmp_path / "origin")!r}), Path("made.ipynb").resolve()
        for cell in cells:                                  # a hundred digits, not as many as there are real ones
            cell["source"] = [line.replace('"steps": steps', '"steps": steps, "num_samples": 100')
                              for line in cell["source"]]
        notebook.execute(cells)
        notebook.write(file, cells)
        """
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "empty", capture_output=True, text=True,
                          timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT), "LAPFLOW_STEPS": "30"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "empty" / "lapflow" / "out" / "notebook" / "step-00000030.pt").exists()
    file = tmp_path / "empty" / "made.ipynb"
    drawn = pictures(json.loads(file.read_text()))
    assert len(drawn) == 8 and all(picture.std() > 5 and min(picture.shape) > 100 for picture in drawn)
    assert file.stat().st_size < 1_000_000
