"""Shared by the tests: small random networks, and a way to run a script as a user would."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
from config import Config
from model import MoTDiT

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def random_model(seed=0, **kwargs) -> MoTDiT:
    """A small MoT-DiT with random weights everywhere: an untrained one returns zeros, which would hide mistakes."""
    torch.manual_seed(seed)
    settings = dict(size=(48, 2, 3, 2), in_channels=2, resolution=16, num_scales=3, num_classes=5)
    model = MoTDiT(**{**settings, **kwargs}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model


def random_bands(model: MoTDiT, batch=2, seed=1, dtype=torch.float32) -> list:
    generator = torch.Generator().manual_seed(seed)
    sides = [model.resolution >> k for k in reversed(range(model.num_scales))]
    return [torch.randn(batch, model.in_channels, s, s, generator=generator, dtype=dtype) for s in sides]


TINY = dict(size="32,2,2,2", batch=16, solver="midpoint", solver_steps=4, warmup=0, lr=1e-3, log_every=5,
            num_samples=10)


def tiny(tmp_path, name="run", **settings) -> Config:
    """A run of seconds on the digits."""
    return Config(**{**TINY, "out": str(tmp_path / name), "steps": 20, "save_every": 10, **settings})


def state(cfg: Config) -> dict:
    return checkpoint.load_newest(Path(cfg.out))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


FAULTS = []                                                 # (what, injected, survived, what was lost)


def pytest_terminal_summary(terminalreporter):
    """The table of tests/test_faults.py: what was broken on purpose, and what it cost."""
    if FAULTS:
        terminalreporter.section("faults")
        terminalreporter.write_line(f"{'':44s} {'injected':>8s} {'survived':>8s}  lost")
        for what, injected, survived, lost in FAULTS:
            terminalreporter.write_line(f"{what:44s} {injected:8d} {survived:8d}  {lost}")


@pytest.fixture
def run_script(tmp_path):
    """run_script("train.py", "--steps", "3") in an empty directory; returns the finished process."""
    def run(script, *arguments):
        process = subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=tmp_path,
                                 capture_output=True, text=True, timeout=300,
                                 env={"OMP_NUM_THREADS": "2", **os.environ})
        assert process.returncode == 0, process.stdout + process.stderr
        return process

    return run


@pytest.fixture
def give_up(tmp_path, monkeypatch, capsys):
    """give_up("train.py", "--size", "M/2"): what a script says as it exits with an error. It runs in this process,
    where torch is loaded already; anything but a clean exit is raised here, and the test fails with it."""
    def run(script, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert stop.value.code not in (0, None)
        return capsys.readouterr().err + (stop.value.code if isinstance(stop.value.code, str) else "")

    return run
