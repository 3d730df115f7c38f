"""The README tells the truth: its excerpts are the code, its map exists, and its four forks work."""

import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
TINY = ["--size", "32,2,2,2", "--steps", "3", "--batch", "16", "--solver", "midpoint", "--solver-steps", "4",
        "--num-samples", "12"]


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def test_excerpts_are_the_code():
    """Parts between lines of three dots stand in the file one after the other, word for word."""
    found = blocks(section("The idea in five steps"), "python")
    assert [block.splitlines()[0] for block in found] == [
        f"# {name}.py" for name in ("pyramid", "schedule", "model", "schedule", "sample")]
    for block in found:
        name, _, code = block.partition("\n")
        source, place = (ROOT / name[2:]).read_text(), 0
        for part in re.split(r"^\.\.\.\n", code, flags=re.M):
            place = source.find(part, place)
            assert place >= 0 and len(part) > 50, f"not in {name[2:]}:\n{part}"
            place += len(part)
        assert 3 <= len(code.splitlines()) <= 15


def test_the_map_names_what_is_there():
    rows = [row.split("|")[1:-1] for row in section("From the paper to the code").split("| file | what")[0].splitlines()
            if row.startswith("|")][2:]
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(rows) >= 12
    for _, where, proof in rows:
        assert "](" in where and "`" in proof
        sources = "".join((ROOT / file).read_text() for file in re.findall(r"\]\((.*?)\)", where))
        for name in re.findall(r"`(.*?)`", where):
            assert re.search(rf"^ *(def|class) {name.split('.')[-1]}\b|^{name} = ", sources, flags=re.M), name
        for name in re.findall(r"`(.*?)`", proof):
            assert f"def {name}(" in tests, name


def test_links_and_anchors_lead_somewhere():
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
               for title in re.findall(r"^#+ (.*)$", README, flags=re.M)}
    for target in re.findall(r"\]\((?!http)(.*?)\)", README):
        file, _, anchor = target.partition("#")
        assert (ROOT / file).exists(), target
        assert not anchor or anchor in anchors, target


def apply(block: str, folder) -> None:
    """A diff of the README: files from lines ---, hunks from lines @@, each found by its text."""
    for part in re.split(r"^--- ", block, flags=re.M)[1:]:
        name, *hunks = re.split(r"\n@@\n", part)
        for hunk in hunks:
            rows = hunk.rstrip("\n").split("\n")
            old = "\n".join(row[1:] for row in rows if row[:1] != "+")
            new = "\n".join(row[1:] for row in rows if row[:1] != "-")
            text = (folder / name).read_text()
            assert text.count(old) == 1, f"{text.count(old)} times in {name}:\n{old}"
            (folder / name).write_text(text.replace(old, new))


@pytest.fixture
def fork(tmp_path):
    for path in [*ROOT.glob("*.py"), ROOT / "baselines", ROOT / "pyproject.toml"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    return tmp_path


def run(fork, *command):
    done = subprocess.run([sys.executable, *command], cwd=fork, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_forks(fork):
    """All four, one after the other, into one copy; each trains, samples and is scored."""
    text = section("Fork it")
    dataset, path, mask, method = blocks(text, "diff")
    for block in (dataset, path, mask, method):
        apply(block, fork)
    (new_file,) = blocks(text, "python")
    (fork / new_file.split("\n")[0][2:]).write_text(new_file)
    out = run(fork, "train.py", "--dataset", "stripes", *TINY, "--path", "cosine", "--mask", "neighbours",
              "--num-scales", "3", "--out", "out/stripes")
    assert "1 x 16 x 16, 3 bands, 2 classes" in out and "frechet_pixel" in out
    assert "12 generated images" in run(fork, "fid.py", "out/stripes", "--num", "12")
    out = run(fork, "train.py", *TINY, "--method", "logitnormal", "--num-scales", "1", "--out", "out/mine")
    assert "1 bands, 10 classes" in out and "frechet_pixel" in out
    check = """if True:
        import torch
        from model import MoTDiT, attention
        from schedule import PATHS, Schedule
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode
        t = torch.linspace(0.4, 0.9, 9, dtype=torch.float64, requires_grad=True)
        alpha, sigma, d_alpha, d_sigma = Schedule((0.0, 0.3), "cosine").coefficients(1, t)
        for value, slope in ((alpha, d_alpha), (sigma, d_sigma)):
            assert torch.allclose(torch.autograd.grad(value.sum(), t)[0], slope)
        ends = Schedule((0.0, 0.3), "cosine").coefficients(1, torch.tensor([0.3, 1.0]))
        assert torch.allclose(ends[0], torch.tensor([0.0, 1.0])) and ends[1][1].abs() < 1e-7
        q, k, v = ([torch.randn(1, 1, n, 4) for n in (2, 3, 5)] for _ in range(3))
        before = attention(q, k, v, "neighbours", 0)
        v[0] += 1
        moved = [not torch.equal(a, b) for a, b in zip(before, attention(q, k, v, "neighbours", 0))]
        assert moved == [True, True, False], moved
        model = MoTDiT("32,2,2,2", 1, 16, 3, 2, mask="neighbours")
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model([torch.randn(1, 1, s, s) for s in (4, 8, 16)], torch.tensor([0.9]))
        assert counter.get_total_flops() == model.flops(2)
        """
    run(fork, "-c", check)


def test_no_function_is_longer_than_a_screen():
    import ast

    for path in [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py"), *ROOT.glob("docs/*.py"), *ROOT.glob("results/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
