"""Checkpoints: whole or absent, plain tensors and values, newest by step number.

RUN/step-00001000.pt holds {version, step, config, data, model, ema, optimizer}. It is written to a temporary file,
flushed to the disk and renamed, so a crash leaves the previous one. The last few are kept (--keep). torch.save writes
a zip archive, whose own checksums (CRC-32 of each record) are verified before anything is used; it is read with
weights_only=True, so a file from a stranger cannot run code.
"""

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

from config import UserError, first_line

VERSION = 1


def steps(run: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    return sorted(run.glob("step-*.pt"), key=lambda path: path.name, reverse=True)


def path(run: Path, step: int) -> Path:
    return run / f"step-{step:08d}.pt"


def prepare(run: Path, fresh: bool, room: int) -> None:
    """Makes the run directory, emptied of an old run when asked. Raises UserError when it cannot be written, or when
    its disk has not `room` bytes for the checkpoints."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".writable").touch()
        (run / ".writable").unlink()
        for unfinished in run.glob("step-*.tmp"):
            unfinished.unlink()
        if fresh:
            for old in [*steps(run), run / "metrics.jsonl"]:
                old.unlink(missing_ok=True)
        room -= sum(path.stat().st_size for path in steps(run))
        free = shutil.disk_usage(run).free
    except OSError as problem:
        raise UserError(f"the run directory {run} cannot be written: {problem}; choose another with --out") from None
    if free < room:
        raise UserError(f"the checkpoints need {room / 1e9:.1f} GB more, but there are {free / 1e9:.1f} GB free for "
                        f"{run}: choose another directory with --out, or keep fewer with --keep")


def save(run: Path, state: dict, keep: int = 2, keep_every: int = 0) -> Path:
    """Writes RUN/step-N.pt atomically, then removes all but the newest `keep` and the multiples of `keep_every`.

    Raises UserError when the disk refuses; what was there before stays.
    """
    target = path(run, state["step"])
    temporary = target.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as problem:              # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write the checkpoint {target}: {problem}; the previous one is intact") from None
    for old in steps(run)[keep:]:
        if not keep_every or int(old.stem[5:]) % keep_every:
            old.unlink()
    return target


def read(path: Path, checked: bool = False) -> dict:
    """The contents of one checkpoint, on the CPU. Raises UserError when it is damaged, foreign or too old or new.

    checked: another process has verified it; it is mapped into memory, which the processes of a machine then share.
    """
    try:
        if not checked:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise UserError(f"the checkpoint {path} is damaged: the checksum of {damaged!r} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=checked)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"the checkpoint {path} is refused: it holds more than tensors and plain values") from None
    except Exception as problem:                            # zipfile and torch raise many kinds for a damaged file
        raise UserError(f"the checkpoint {path} cannot be read: {first_line(problem)}") from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else None
        raise UserError(f"the checkpoint {path} has version {found!r:.20}, this code reads version {VERSION}")
    kinds = {"step": int, "config": dict, "data": dict, "model": dict, "ema": (dict, type(None)), "optimizer": dict}
    wrong = [name for name, kind in kinds.items() if name not in state or not isinstance(state[name], kind)]
    if wrong:
        raise UserError(f"the checkpoint {path} is none of train.py: it lacks {', '.join(wrong)}")
    return state


def read_json(file: Path, what: str) -> dict | None:
    """A JSON object, None without the file. Raises UserError, saying that it is no `what`, for anything else."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as problem:
        raise UserError(f"{file} cannot be read as {what}: {first_line(problem)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is no {what}: it is not a JSON object")
    return found


def append_line(file: Path, entry: dict) -> None:
    """Appends one line of JSON and flushes it to the disk. The line before it may have been cut off by a kill."""
    with open(file, "a") as stream:
        stream.write("\n" + json.dumps(entry) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(files: Iterable[Path]) -> list[dict]:
    """The entries of files of such lines; a line that a kill cut off does not count."""
    found = []
    for file in sorted(files):
        for line in file.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            found += [entry] if isinstance(entry, dict) else []
    return found


def load_newest(run: Path) -> dict | None:
    """The newest whole checkpoint of a run, or None without any. A damaged one is named and passed over."""
    problems = []
    for path in steps(run):
        try:
            return read(path)
        except UserError as problem:
            problems.append(problem)
            print(f"warning: {problem}; trying the one before it", file=sys.stderr)
    if problems:
        raise UserError(f"no checkpoint of {run} can be used; start over with --fresh")
    return None


def newest_run(root: Path = Path("out")) -> Path:
    """The run below `root` that was saved last. Raises UserError without any."""
    runs = {path.parent: path.stat().st_mtime for path in sorted(root.glob("**/step-*.pt"))}
    if not runs:
        raise UserError(f"there is no trained run below {str(root)!r}; train one with python train.py, "
                        "or name its directory")
    return max(runs, key=runs.get)
