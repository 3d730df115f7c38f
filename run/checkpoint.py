"""Checkpoints: whole or absent, plain tensors and values, newest by step number.

RUN/step-00001000.pt holds {version, step, config, data, model, ema, optimizer}. It is written to a temporary file,
flushed to the disk and renamed, so a crash leaves the previous one. torch.save writes a zip archive, whose checksums
are verified before anything is used; it is read with weights_only=True, so a file from a stranger cannot run code.
Training waits for a copy of the state only; a thread writes it.
"""

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from config import Config, UserError, differences, explain
from run.ranks import Ranks

VERSION = 2


def steps(run: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    return sorted(run.glob("step-*.pt"), key=lambda path: path.name, reverse=True)


def is_export(folder: Path) -> bool:
    return (folder / "model.safetensors").exists()


def path(run: Path, step: int) -> Path:
    return run / f"step-{step:08d}.pt"


def prepare(cfg: Config, fresh: bool, room: int, finished: bool) -> None:
    """Makes the run directory and its config.json. Old checkpoints go when fresh, scores unless the run is finished.
    The checkpoints need `room` bytes of its disk."""
    run = Path(cfg.out)
    if is_export(run):
        raise UserError(f"{run} is an export, and a run cannot be in it too: choose another directory with --out")
    with explain(f"the run directory {run} cannot be written", "; choose another with --out", OSError):
        run.mkdir(parents=True, exist_ok=True)
        room -= sum(path.stat().st_size for path in steps(run))
        if (free := shutil.disk_usage(run).free) < room:
            raise UserError(f"the checkpoints need {room / 1e9:.1f} GB more, but there are {free / 1e9:.1f} GB free "
                            f"for {run}: choose another directory with --out, or keep fewer: --keep, --keep-every")
        (run / "config.json").write_text(json.dumps(cfg.to_dict(), indent=2) + "\n")        # before anything goes
        old = [*steps(run), run / "metrics.jsonl", run / "scores.jsonl"] if fresh else []
        scores = [] if finished else run.glob("scores*.json")                       # of a shorter or an older run
        for file in [*run.glob("step-*.tmp"), *old, *scores]:
            file.unlink(missing_ok=True)


def save(run: Path, state: dict, keep: int = 2, keep_every: int = 0) -> Path:
    """Writes RUN/step-N.pt atomically; removes all but it, the newest `keep` - 1 others, multiples of `keep_every`."""
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
    for old in [file for file in steps(run) if file != target][keep - 1 :]:         # a damaged one may be newer
        if not keep_every or int(old.stem[5:]) % keep_every:
            old.unlink()
    return target


def copied(value: object) -> object:
    """Tensors, and those in dictionaries, in memory of their own: pinned, and still on their way, from a GPU."""
    if isinstance(value, dict):
        return {name: copied(part) for name, part in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value, non_blocking=value.is_cuda)


class Writer:
    """Saves the checkpoints of a run in a thread, while training goes on: one at a time, each from a copy of the state.

        with writer:
            writer.save(state)

    The next save and the end of the block wait for the file before. Where it could not be written, they end all
    processes with its UserError. An error inside the block waits too, alone: the processes may not be together then.
    """

    def __init__(self, cfg: Config, ranks: Ranks):
        self.cfg, self.ranks, self.pool = cfg, ranks, ThreadPoolExecutor(1)
        self.writing: Future | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        with self.pool:                                     # its end waits for the thread
            if kind is None:
                self.ranks.first_does(self.wait)
        if self.failed:
            print(f"warning: {self.writing.exception()}", file=sys.stderr)

    @property
    def failed(self) -> bool:
        """True when the next save will raise: the loop need not wait for it."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def wait(self) -> None:
        """Until the last file is whole. Raises UserError when it could not be written."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def save(self, state: dict) -> None:
        """In all processes: the first copies its state and begins to write it, the others wait for the copy."""
        self.ranks.first_does(lambda: self.begin(state))

    def begin(self, state: dict) -> None:
        self.wait()
        device, copy = self.ranks.device, state
        with suppress(RuntimeError):                        # no memory for a copy: training waits for the file
            copy = copied(state)
        there = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

        def write():
            if there:
                there.synchronize()
            save(Path(self.cfg.out), copy, self.cfg.keep, self.cfg.keep_every)

        self.writing = self.pool.submit(write)
        if copy is state:
            self.wait()


def read(path: Path, checked: bool = False, mapped: bool = False) -> dict:
    """The contents of one checkpoint, on the CPU. Raises UserError when it is damaged, foreign, or of another version.
    checked: another process has verified it. Then, and when mapped, only what is used of the file is read, into memory
    that the processes of a machine share."""
    with explain(f"the checkpoint {path} cannot be read"):  # zipfile and torch raise many kinds for a damaged file
        if not checked:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise UserError(f"the checkpoint {path} is damaged: the checksum of {damaged!r} is wrong")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=checked or mapped)
        except pickle.UnpicklingError:
            raise UserError(f"the checkpoint {path} is refused: it holds more than tensors and plain values") from None
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise UserError(f"the checkpoint {path} has version {version!r:.20}, this code reads version {VERSION}")
    kinds = {"step": int, "config": dict, "data": dict, "model": dict, "ema": (dict, type(None)), "optimizer": dict}
    if wrong := [name for name, kind in kinds.items() if name not in state or not isinstance(state[name], kind)]:
        raise UserError(f"{path} is not a train.py checkpoint: it lacks {', '.join(wrong)}")
    return state


def check_same_run(state: dict, cfg: Config, facts: dict) -> None:
    """Raises UserError when a checkpoint is of a run with other settings, or on other data, than these."""
    old = Config.from_dict(state["config"])
    changes = [f"{name} was {getattr(old, name)!r} and is now {getattr(cfg, name)!r}" for name in differences(old, cfg)]
    problem = f"was made with other settings: {'; '.join(changes)}" if changes else ""
    if not changes and any(facts[name] != state["data"].get(name) for name in facts):
        problem = "was trained on other images or classes than now"
    if problem:
        raise UserError(f"the run in {cfg.out} {problem}. Choose another directory with --out, or start over with "
                        "--fresh")


def read_json(file: Path, what: str) -> dict | None:
    """A JSON object, None without the file. Raises UserError, naming `what` it should be, for anything else."""
    with explain(f"{file} cannot be read as {what}"):
        if not file.exists():
            return None
        content = json.loads(file.read_bytes())
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a {what}: it is not a JSON object")
    return content


def append_line(file: Path, entry: dict) -> None:
    """Appends one line of JSON, on the disk when it returns. The line before it may have been cut off by a kill."""
    with open(file, "a") as stream:
        stream.write("\n" + json.dumps(entry) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(files: Iterable[Path]) -> list[dict]:
    """The entries of files of such lines; a file that is missing, or a line that a kill cut off, is left out."""
    entries = []
    for file in sorted(filter(Path.exists, files)):
        for line in file.read_bytes().splitlines():
            with suppress(ValueError, RecursionError):
                entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def load_newest(run: Path, mapped: bool = False) -> dict | None:
    """The newest whole checkpoint of a run, or None without any. A damaged one is named and skipped."""
    files = steps(run)
    for file in files:
        try:
            return read(file, mapped=mapped)
        except UserError as problem:
            print(f"warning: {problem}; trying the one before it", file=sys.stderr)
    if files:
        raise UserError(f"no checkpoint of {run} can be used; start over with --fresh")
    return None


def newest_run(root: Path = Path("out")) -> Path:
    """The run below `root` that was saved last."""
    runs = {path.parent: path.stat().st_mtime for path in sorted(root.glob("**/step-*.pt"))}
    if not runs:
        raise UserError(f"there is no trained run below {str(root)!r}; train one with python train.py, "
                        "or name its directory")
    return max(runs, key=runs.get)
