"""Samples on disk: written batch by batch, by any number of processes, and continued after a stop.

    OUT/samples.npz           --format npz     `images` uint8 (N, H, W, C), `labels` (N,), -1 without, or `vectors`
    OUT/shard-00000250.npz    --format shards  the same for one batch, named by its first image
    OUT/grid.png, report.json                  the first hundred; what they cost and how they were made

A batch is written, then noted in a file of its process; a stop costs the batches in flight. The condition y is a
tensor or array of labels (N,) or vectors (N, dim), or None.
"""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import UserError, explain
from data.conditions import find_label
from data.sources import chunks_of, open_source
from run import checkpoint, pictures
from run.load import Run
from run.memory import peak_memory
from run.ranks import Ranks


class Gallery:
    """A directory of samples. job: all that decides what is drawn, only an equal one is continued. ranks: None to read
    what is there."""

    def __init__(self, out: Path, job: dict, format: str, ranks: Ranks | None):
        self.out, self.job, self.format, self.ranks = out, {**job, "format": format}, format, ranks

    def prepare(self, chunks: list[range]) -> list[range]:
        """Makes the directory; returns the chunks that are missing."""
        self.ranks.first_does(self.begin)
        done = {note["first"] for note in self.notes() if self.file(note).exists()} if self.ranks.first else None
        done = self.ranks.share(done)
        return [chunk for chunk in chunks if chunk.start not in done]

    def begin(self) -> None:
        job = json.loads(json.dumps(self.job))              # JSON has lists for tuples
        with explain(f"the directory {self.out} cannot be written", "; choose another with --out", OSError):
            self.out.mkdir(parents=True, exist_ok=True)
            before = checkpoint.read_json(self.out / "job.json", "job of sample.py")
            if before == job:
                return
            old = [*self.out.glob("shard-*.npz"), *self.out.glob("notes-*.jsonl")]
            if old and (before or {}).get("format") != "npz":
                raise UserError(f"{self.out} holds other samples: choose another directory with --out, or delete it")
            for part in old:                                # of a single file that was not finished
                part.unlink()
            (self.out / "job.json").write_text(json.dumps(job))

    def file(self, note: dict) -> Path:
        """That of a batch."""
        return self.out / f"shard-{note['first']:08d}.npz"

    def write(self, numbers: range, images: np.ndarray, y: torch.Tensor | None, note: dict) -> None:
        """One batch: images uint8 (B, H, W, C), and their conditions (B, ...)."""
        with explain(f"samples cannot be written to {self.out}", "; the same command goes on from there", OSError):
            save_npz(self.file(note), images, y)
            checkpoint.append_line(self.out / f"notes-{self.ranks.rank}.jsonl", note)

    def fill(self, run: Run, chunks: list[range], draw: Callable, y: torch.Tensor | None, settings: dict) -> None:
        """All processes write the images that are missing; the first one the grid and the report, and prints it.

        draw(chunks) yields (numbers, images uint8 (B, H, W, C), note) for each chunk; y (N, ...): of all images."""
        todo, ranks, total = self.prepare(chunks), self.ranks, self.job["num"]
        with tqdm(total=total, initial=total - sum(map(len, todo)), desc="sampling", unit="img", leave=False,
                  disable=not ranks.first) as bar:
            for numbers, images, note in draw(todo[ranks.rank :: ranks.world]):
                self.write(numbers, images, None if y is None else y[numbers.start : numbers.stop], note)
                bar.update(min(len(numbers) * ranks.world, total - bar.n))
        ranks.barrier()

        def finish() -> str:
            report = report_of(run, self.notes(), self.job["seed"], self.job["batch"], settings)
            return f"{describe(report)}\nwrote      {self.finish(report, y, run.condition)}"

        ranks.say(ranks.first_does(finish))

    def notes(self) -> list[dict]:
        """Of the finished batches, in the order of their images."""
        notes = checkpoint.read_lines(self.out.glob("notes-*.jsonl"))
        by_first = {note["first"]: note for note in notes
                    if all(isinstance(note.get(name), int) for name in ("first", "count"))}
        return [by_first[first] for first in sorted(by_first)]

    def finish(self, report: dict, y: torch.Tensor | None, condition: torch.nn.Module | None) -> str:
        """Writes the grid, the report, and of npz the single file. Returns their names. y (N, ...): of all images."""
        notes = self.notes()
        shards = [self.file(note) for note in notes]
        if sum(note["count"] for note in notes) != self.job["num"] or not all(file.exists() for file in shards):
            raise UserError(f"samples are missing in {self.out}: the same command draws them")
        images = chain.from_iterable(read_npz(shard)[0] for shard in shards)
        pictures.draw_grid(self.out / "grid.png", np.stack(list(islice(images, 100))), None if y is None else y[:100],
                           condition)
        (self.out / "report.json").write_text(json.dumps(report, indent=2))
        if self.format == "npz":
            images, y = (np.concatenate(column) for column in zip(*map(read_npz, shards), strict=True))
            save_npz(self.out / "samples.npz", images, y, np.savez_compressed)
            for file in [*self.out.glob("notes-*.jsonl"), *shards, self.out / "job.json"]:      # in this order
                file.unlink()
        return f"{self.out}/grid.png, {'samples.npz' if self.format == 'npz' else f'{len(shards)} shards'}, report.json"


def folder_of(run: Run, args: argparse.Namespace) -> Path:
    """Where samples go: beside the run, or here when that lies in the hub's cache."""
    return Path(args.out or ("samples" if args.run and not Path(args.run).exists() else run.folder / "samples"))


def job_of(run: Run, args: argparse.Namespace, settings: dict) -> dict:
    """Everything that decides what a command of sample.py draws."""
    file = Path(args.vectors or "")
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    return {"run": str(run.folder), "step": run.step, "weights": run.weights, "fingerprint": run.fingerprint,
            "num": args.num, "seed": args.seed, "batch": args.batch, "labels": args.labels,
            "vectors": args.vectors and [args.vectors, digest], "noise_scale": run.cfg.noise_scale, **settings}


def arrays_of(y: torch.Tensor | np.ndarray | None, count: int) -> dict[str, np.ndarray]:
    """Conditions as they are stored: `labels` (N,), -1 without any, and `vectors` (N, dim)."""
    y = np.full(count, -1) if y is None else np.asarray(torch.as_tensor(y).cpu())
    return {"labels": y} if y.ndim == 1 else {"labels": np.full(count, -1), "vectors": y}


def save_npz(file: Path, images: np.ndarray, y: torch.Tensor | np.ndarray | None, save: Callable = np.savez) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f"unfinished-{file.name}")
    save(temporary, images=images, **arrays_of(y, len(images)))
    os.replace(temporary, file)


def read_npz(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """`images` uint8 (N, H, W, C) of an .npz, and y: its `vectors` (N, dim), or its `labels` (N,), -1 without any.

    Also of ADM's sample files, whose images are arr_0 and labels arr_1. Raises UserError for other files."""
    with explain(f"{file} is not a samples.npz of sample.py"):
        with np.load(file, allow_pickle=False) as arrays:
            images = arrays["images" if "images" in arrays else "arr_0"]
            key = next((k for k in ("vectors", "labels", "arr_1") if k in arrays), None)
            y = arrays[key] if key else np.full(len(images), -1)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"its images have the shape {images.shape} {images.dtype}, not (N, H, W, C) uint8")
        if y.shape[:1] != images.shape[:1] or (y.ndim, y.dtype.kind) not in ((1, "i"), (1, "u"), (2, "f")):
            raise ValueError(f"its {key} have the shape {y.shape} {y.dtype}")
        return images, y


def read_report(folder: Path) -> dict:
    """report.json of a directory of samples, empty without one. Raises UserError when sample.py did not write it."""
    report = checkpoint.read_json(folder / "report.json", "report of sample.py") or {}
    with explain(f"{folder / 'report.json'} is not a report of sample.py"):
        if "nfe_segments" in report:
            describe(report)
    return report


def open_samples(where: Path, batch: int = 250, classes: list[str] | None = None) -> tuple[int, list]:
    """The number of samples, and (first, read) pairs; read() gives images uint8 (B, H, W, C) and y (see read_npz).

    where: a samples.npz, a directory that sample.py wrote, complete, or any folder of images (subfolders: classes)."""
    job = (checkpoint.read_json(where / "job.json", "job of sample.py") if where.is_dir() else None) or {}
    if job.get("format"):
        samples = Gallery(where, {}, "shards", None)
        notes = samples.notes()
        if job["format"] != "shards" or sum(note["count"] for note in notes) != job.get("num"):
            raise UserError(f"the samples in {where} are not complete: the command that draws them goes on")
        return job["num"], [(note["first"], partial(read_npz, samples.file(note))) for note in notes]
    if where.suffix == ".npz" or (where / "samples.npz").exists():
        images, y = read_npz(where if where.suffix == ".npz" else where / "samples.npz")
        return len(images), [(i, lambda i=i: (images[i : i + batch], y[i : i + batch]))
                             for i in range(0, len(images), batch)]
    source = open_source("folder", str(where))
    side = min(source.size(0))
    places = [find_label(classes, name) if classes else i for i, name in enumerate(source.classes)] or [-1]

    def read_images(numbers):
        if any(source.size(i) != (side, side) for i in numbers):
            raise UserError(f"the images of {where} are not all {side} x {side}: scores need equal squares")
        images = np.stack([source.image(i, side) for i in numbers]).transpose(0, 2, 3, 1)
        return images, np.array([places[source.labels[i]] for i in numbers])

    return len(source), [(part.start, partial(read_images, part)) for part in chunks_of(len(source), batch)]


def report_of(run: Run, notes: list[dict], seed: int, batch: int, settings: dict) -> dict:
    """What the images cost, and how they were made; NFE and network passes are means over the batches. precision is a
    score: that of the network has another name."""
    nfe, num = np.mean([note["nfe"] for note in notes], axis=0).tolist(), sum(note["count"] for note in notes)
    how = {"network_precision" if key == "precision" else key: value for key, value in settings.items()}
    return {"num": num, "seed": seed, "batch": batch, "noise_scale": run.cfg.noise_scale, **how,
            "nfe_segments": nfe, "nfe": sum(nfe), "forwards": sum(note["forwards"] for note in notes) / len(notes),
            "seconds_per_image": sum(note["seconds"] for note in notes) / num,
            "memory_gb": peak_memory(run.device), "device": str(run.device),
            "weights": run.weights, "step": run.step, "run": str(run.folder)}


def describe(report: dict) -> str:
    """NFE, cost and provenance of generated images, in lines for people."""
    settings = [f"{key} {report[key]:g}" for key in ("rtol", "atol", "steps") if report.get(key)]
    if report["solver"] == "dopri5":
        settings.append(f"norm over the {report['norm']}")
    low, high = report.get("interval", (0, 1))
    between = "" if (low, high) == (0, 1) else f" between t = {low:g} and {high:g}"
    noise = f", noise x {','.join(f'{x:g}' for x in report['noise_scale'])}" if report.get("noise_scale") else ""
    network = report.get("network_precision", "float32") + noise
    segments = " + ".join(f"{n:g}" for n in report["nfe_segments"])
    return (f"weights    {report['weights']} at step {report['step']} of {report['run']}\n"
            f"solver     {report['solver']}, {', '.join(settings)}, {report['batch']} images at a time\n"
            f"guidance   {report['cfg_scale']:g}{between}, network in {network}\n"
            f"NFE        {segments} = {report['nfe']:g} by segment ({report['forwards']:g} network passes per image)\n"
            f"time       {report['seconds_per_image']:.4f} s per image on {report['device']}, peak memory "
            f"{report.get('memory_gb', math.nan):.2f} GB")
