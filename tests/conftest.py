"""Shared by the tests: small random networks, short runs, several processes, and programs as a user starts them."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

# One thread for each test process and its children, set before numpy and torch are loaded: the networks are tiny, and
# threads that wait for each other cost four times the work when two processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

import config
from config import Config
from model import MoTDiT
from run import checkpoint, gallery

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------------------------------
# networks


def random_model(seed=0, **kwargs) -> MoTDiT:
    """A small MoT-DiT with random weights everywhere: an untrained one returns zeros, which would hide mistakes."""
    torch.manual_seed(seed)
    settings = dict(size=(48, 2, 3, 2), in_channels=2, resolution=16, num_scales=3, num_classes=5)
    return randomize(MoTDiT(**{**settings, **kwargs}).eval())


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model


def random_bands(model: MoTDiT, batch=2, seed=1, dtype=torch.float32) -> list:
    generator = torch.Generator().manual_seed(seed)
    sides = [model.resolution >> k for k in reversed(range(model.num_scales))]
    return [torch.randn(batch, model.in_channels, s, s, generator=generator, dtype=dtype) for s in sides]


def read_samples(where: Path, batch: int = 250) -> tuple[np.ndarray, np.ndarray]:
    """All images and conditions of sample.py on disk, read in parts."""
    parts = [read() for _, read in gallery.open_samples(where, batch)[1]]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# runs

TINY = dict(size="32,2,2,2", batch=16, solver="midpoint", solver_steps=4, warmup=0, lr=1e-3, log_every=5,
            num_samples=10)


def tiny(tmp_path, name="run", **settings) -> Config:
    """A run of seconds on the digits."""
    return Config(**{**TINY, "out": str(tmp_path / name), "steps": 20, "save_every": 10, **settings})


FLAGS = ["--size", "32,2,2,2", "--batch", "12", "--solver", "midpoint", "--solver-steps", "4", "--num-samples", "6",
         "--warmup", "0", "--lr", "1e-3"]


def train_and_score(cfg: Config, record: str | None = None) -> dict:
    """What `python train.py` does: trains, then samples and scores."""
    import train

    return train.finish(train.train(cfg, device="cpu"), record)


def state(cfg: Config) -> dict:
    return checkpoint.load_newest(Path(cfg.out))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: dict, b: dict, **tolerance) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], **tolerance) for name in a)


def metrics(run: Path | str) -> list[dict]:
    return [json.loads(line) for line in open(Path(run) / "metrics.jsonl")]


def losses(run: Path | str) -> list:
    """The losses of the bands in each line, -1 where a band took no part."""
    return [[-1 if value is None else value for value in line["loss_bands"]] for line in metrics(run)]


def settings_of(run: Path, **changes) -> Config:
    """Those of a run, with changes."""
    values = json.loads((run / "config.json").read_text())
    return Config.from_dict({**values, "out": str(run), **changes})


def weights(run: Path | str) -> dict:
    return checkpoint.load_newest(Path(run))["model"]


def damage(path: Path, how: str) -> None:
    """Breaks a checkpoint."""
    raw = bytearray(path.read_bytes())
    if how == "version":                                    # of a later program
        return torch.save({**torch.load(path, weights_only=True), "version": 99}, path)
    if how == "flipped":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
        raw[largest.header_offset + 200] ^= 16
    path.write_bytes({"truncated": raw[: len(raw) // 2], "empty": b"", "flipped": raw, "text": b"hello"}[how])


FAULTS = []                                                 # (what, injected, survived, what was lost)


def pytest_collection_modifyitems(items):
    """Slow tests first: with two workers the longest is not what the other waits for."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_terminal_summary(terminalreporter):
    """The table of tests/slow/test_faults.py: what was broken on purpose, and what it cost."""
    if FAULTS:
        terminalreporter.section("faults")
        terminalreporter.write_line(f"{'':44s} {'injected':>8s} {'survived':>8s}  lost")
        for what, injected, survived, lost in FAULTS:
            terminalreporter.write_line(f"{what:44s} {injected:8d} {survived:8d}  {lost}")


# ---------------------------------------------------------------------------------------------------------------------
# processes


def fork(work: Callable[[], None], output: Path | str, environment: dict | None = None) -> int:
    """Runs work() in a child of this process, its output in a file: seconds faster than a new process. Its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.update(environment or {})
        torch.set_num_threads(1)                            # threads do not survive a fork
        config.run(work)
        code = 0
    except SystemExit as end:                               # as Python treats it
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


class Forks:
    """work() in `world` children of this process, which see what torchrun tells its own.

    wait() returns their exit codes (or minus the signal) and their outputs.
    """

    def __init__(self, world: int, work: Callable[[], None], folder: Path):
        self.files = [folder / f"output-{rank}.txt" for rank in range(world)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.pids = [fork(work, file, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                     for rank, file in enumerate(self.files)]

    def wait(self, seconds: float = 100) -> tuple[list[int], list[str]]:
        codes, until = {}, time.time() + seconds
        while len(codes) < len(self.pids) and time.time() < until:
            for pid in set(self.pids) - set(codes):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        for pid in set(self.pids) - set(codes):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        outputs = [file.read_text() for file in self.files]
        assert len(codes) == len(self.pids), f"still running after {seconds} s:\n" + "\n".join(outputs)
        return [codes[pid] for pid in self.pids], outputs


needs_fork = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process that has threads")


def program_of(name: str) -> list[str]:
    """train.py by its path; a program of a folder as a module, data.latents."""
    return [str(ROOT / name)] if name.endswith(".py") else ["-m", name]


def start(tmp_path, *arguments, processes=2, program="train.py", torchrun=()) -> subprocess.Popen:
    """A program by python, or by torchrun as several processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
    return subprocess.Popen([sys.executable, *(launcher if processes > 1 else []), *program_of(program),
                             *map(str, arguments)], cwd=tmp_path, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out
    return out


def at_first_checkpoint(run: Path, seconds: float = 120) -> None:
    """Waits until there is one."""
    until = time.time() + seconds
    while not list(run.glob("step-*.pt")):
        assert time.time() < until, f"no checkpoint in {run} after {seconds} s"
        time.sleep(0.01)


def worker(torchrun: int, rank: int) -> int:
    """The process number of a worker of this torchrun."""
    for folder in Path("/proc").iterdir():
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == torchrun and (
                    f"\0RANK={rank}\0".encode() in (folder / "environ").read_bytes()):
                return int(folder.name)
        except (OSError, IndexError):
            continue
    raise AssertionError(f"torchrun has no worker {rank}")


def run_here(monkeypatch, folder: Path, program: str, *arguments) -> None:
    """Runs a program in a directory, in this process, where torch is loaded already: "train.py" or "data.latents"."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)     # the module is imported already
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """program("sample.py", "-n", "12"): what it prints. It runs in this process, where torch is loaded already."""
    def start(name, *arguments):
        capsys.readouterr()
        run_here(monkeypatch, tmp_path, name, *arguments)
        return capsys.readouterr().out

    return start


@pytest.fixture
def give_up(tmp_path, monkeypatch, capsys):
    """give_up("train.py", "--size", "M/2"): what a program prints as it exits with an error. It runs in this process,
    where torch is loaded already; anything but a clean exit is raised here, and the test fails with it."""
    def run(program, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_here(monkeypatch, tmp_path, program, *arguments)
        assert stop.value.code not in (0, None)
        return capsys.readouterr().err + (stop.value.code if isinstance(stop.value.code, str) else "")

    return run
