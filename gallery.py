"""Samples on disk: written batch by batch, by any number of processes, and continued after a stop.

    OUT/samples.npz           --format npz     `images` uint8 (N, H, W, C), `labels` (N,), -1 when unconditional
    OUT/shard-00000250.npz    --format shards  the same for one batch, named by its first image
    OUT/png/00000250.png      --format png     one file for each image
    OUT/grid.png, report.json                  the first hundred; what they cost and how they were made

A batch is written, and then noted in a file of the process that wrote it; a stop costs the batches in flight.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import checkpoint
import pictures
import runs
import sources
from config import UserError, first_line
from ranks import Ranks


class Gallery:
    """A directory of samples. job: everything that decides what is drawn; only an equal one is continued.

    ranks: None to read what is there.
    """

    def __init__(self, out: Path, job: dict, format: str, ranks: Ranks | None):
        self.out, self.job, self.format, self.ranks = out, {**job, "format": format}, format, ranks

    def prepare(self, chunks: list[range]) -> list[range]:
        """Makes the directory; returns the chunks that are not there yet. Raises UserError when it cannot."""
        self.ranks.first_does(self.begin)
        done = {note["first"] for note in self.notes() if self.there(note)} if self.ranks.first else None
        done = self.ranks.share(done)
        return [chunk for chunk in chunks if chunk.start not in done]

    def begin(self) -> None:
        job = json.loads(json.dumps(self.job))              # tuples are lists there
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            found = read_job(self.out)
            old = [*self.out.glob("shard-*.npz"), *self.out.glob("notes-*.jsonl"), *self.out.glob("png/*")]
            if found != job:
                if old and (found or {}).get("format") != "npz":
                    raise UserError(f"{self.out} holds other samples: choose another directory with --out, or "
                                    "delete it")
                for part in old:                            # of a single file that was not finished
                    part.unlink()
                (self.out / "job.json").write_text(json.dumps(job))
            if self.format == "png":
                (self.out / "png").mkdir(exist_ok=True)
        except OSError as problem:
            raise UserError(f"the directory {self.out} cannot be written: {problem}; choose another with --out"
                            ) from None

    def there(self, note: dict) -> bool:
        if self.format == "png":
            return all((self.out / "png" / f"{note['first'] + i:08d}.png").exists() for i in range(note["count"]))
        return (self.out / f"shard-{note['first']:08d}.npz").exists()

    def write(self, numbers: range, images: np.ndarray, labels: np.ndarray | None, note: dict) -> None:
        from PIL import Image

        try:
            if self.format == "png":
                for i, image in zip(numbers, images, strict=True):
                    Image.fromarray(image.squeeze()).save(self.out / "png" / f"{i:08d}.png")
            else:
                temporary = self.out / f"unfinished-{self.ranks.rank}.npz"
                np.savez(temporary, images=images, labels=or_none(labels, len(images)))
                os.replace(temporary, self.out / f"shard-{numbers.start:08d}.npz")
            checkpoint.append_line(self.out / f"notes-{self.ranks.rank}.jsonl", note)
        except OSError as problem:
            raise UserError(f"samples cannot be written to {self.out}: {problem}; the same command goes on from there"
                            ) from None

    def notes(self) -> list[dict]:
        """What is known of the finished batches, in the order of their images."""
        notes = checkpoint.read_lines(self.out.glob("notes-*.jsonl"))
        found = {note["first"]: note for note in notes
                 if all(isinstance(note.get(name), int) for name in ("first", "count"))}
        return [found[first] for first in sorted(found)]

    def finish(self, report: dict, labels: np.ndarray | None, classes: list[str]) -> str:
        """The grid, the report, and one file of the shards when asked for. Returns what was written."""
        notes = self.notes()
        if sum(note["count"] for note in notes) != self.job["num"] or not all(map(self.there, notes)):
            raise UserError(f"samples are missing in {self.out}: the same command draws them")
        shards = [self.out / f"shard-{note['first']:08d}.npz" for note in notes]
        first, wrote = [], f"{len(shards)} shards" if self.format == "shards" else f"png/ ({report['num']} files)"
        for images, _ in read_samples(self.out, finished=False):
            first.append(images)
            if sum(map(len, first)) >= 100:
                break
        pictures.draw_grid(self.out / "grid.png", np.concatenate(first)[:100],
                           None if labels is None else labels[:100], classes)
        (self.out / "report.json").write_text(json.dumps(report, indent=2))
        if self.format == "npz":
            images, all_labels = (np.concatenate(column) for column in zip(*map(read_npz, shards), strict=True))
            np.savez_compressed(self.out / "samples.tmp.npz", images=images, labels=all_labels)
            os.replace(self.out / "samples.tmp.npz", self.out / "samples.npz")
            for file in [*self.out.glob("notes-*.jsonl"), *shards, self.out / "job.json"]:      # in this order
                file.unlink()
            wrote = "samples.npz"
        return f"{self.out}/grid.png, {wrote}, report.json"


def or_none(labels: np.ndarray | None, count: int) -> np.ndarray:
    """Labels as they are stored: -1 without classes."""
    return np.full(count, -1) if labels is None else labels


def read_npz(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """`images` uint8 (N, H, W, C) and `labels` (N,) of an .npz. Raises UserError when it holds none.

    Also ADM's sample files, whose images are arr_0 and labels arr_1.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images = arrays["images" if "images" in arrays else "arr_0"]
            key = next((k for k in ("labels", "arr_1") if k in arrays), None)
            labels = arrays[key] if key else or_none(None, len(images))
        if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != (len(images),):
            raise ValueError(f"its images have the shape {images.shape} {images.dtype}, and not (N, H, W, C) uint8")
        return images, labels
    except Exception as problem:                            # numpy raises many kinds for a damaged file
        raise UserError(f"{file} is no samples.npz of sample.py: {first_line(problem)}") from None


def read_job(folder: Path) -> dict | None:
    return checkpoint.read_json(folder / "job.json", "job of sample.py")


def read_report(folder: Path) -> dict:
    """report.json of a directory of samples, empty without one. Raises UserError when sample.py did not write it."""
    report = checkpoint.read_json(folder / "report.json", "report of sample.py") or {}
    try:
        if "nfe_segments" in report:
            describe(report)
    except (KeyError, TypeError, ValueError, OverflowError) as problem:
        raise UserError(f"{folder / 'report.json'} is no report of sample.py: {first_line(problem)}") from None
    return report


def open_samples(where: Path, batch: int = 250, finished: bool = True) -> tuple[int, list]:
    """What samples there are: how many, and (first, read) pairs; read() gives images uint8 (B, H, W, C) and labels.

    where: a samples.npz, a directory that sample.py wrote, or any folder of images. Raises UserError when there are
    none, and for a directory whose samples are not complete (finished=False: takes what is there).
    """
    job = read_job(where) if where.is_dir() else None
    format = job.get("format") if job else None
    if format and finished:
        noted = sum(note["count"] for note in Gallery(where, {}, format, None).notes())
        if format == "npz" or noted != job.get("num"):
            raise UserError(f"the samples in {where} are not complete: the command that draws them goes on")
    if where.suffix == ".npz" or (format is None and (where / "samples.npz").exists()):
        images, labels = read_npz(where if where.suffix == ".npz" else where / "samples.npz")
        return len(images), [(i, lambda i=i: (images[i : i + batch], labels[i : i + batch]))
                             for i in range(0, len(images), batch)]
    shards = sorted(where.glob(f"shard-{8 * '[0-9]'}.npz")) if format in ("shards", "npz") else []
    if shards:
        firsts = [int(file.stem[6:]) for file in shards]
        return firsts[-1] + len(read_npz(shards[-1])[0]), [
            (first, lambda file=file: read_npz(file)) for first, file in zip(firsts, shards, strict=True)]
    source = sources.open_source("folder", str(where / "png" if format == "png" else where))
    side = min(source.size(0))

    def read(first):
        numbers = range(first, min(first + batch, len(source)))
        if any(source.size(i) != (side, side) for i in numbers):
            raise UserError(f"the images of {where} are not all {side} x {side}: scores need equal squares")
        images = np.stack([source.image(i, side) for i in numbers]).transpose(0, 2, 3, 1)
        return images, np.array([source.labels[i] if source.classes else -1 for i in numbers])

    return len(source), [(first, lambda first=first: read(first)) for first in range(0, len(source), batch)]


def read_samples(where: Path, batch: int = 250, finished: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (images, labels) of open_samples, one batch after the other."""
    for _, read in open_samples(where, batch, finished)[1]:
        yield read()


# ---------------------------------------------------------------------------------------------------------------------
# what samples cost


def report_of(run: runs.Run, notes: list[dict], seed: int, batch: int, settings: dict) -> dict:
    """What images cost, and how they were made; NFE and network passes are means over the batches."""
    nfe, num = np.mean([note["nfe"] for note in notes], axis=0).tolist(), sum(note["count"] for note in notes)
    return {"num": num, "seed": seed, "batch": batch, **settings, "nfe_segments": nfe, "nfe": sum(nfe),
            "forwards": sum(note["forwards"] for note in notes) / len(notes),
            "seconds_per_image": sum(note["seconds"] for note in notes) / num,
            "memory_gb": runs.peak_memory(run.device), "device": str(run.device),
            "weights": run.weights, "step": run.step, "run": str(run.folder)}


def describe(report: dict) -> str:
    """NFE, cost and provenance of generated images, in lines for people."""
    settings = [f"{key} {report[key]:g}" for key in ("rtol", "atol", "steps") if report.get(key)]
    if report["solver"] == "dopri5":
        settings.append(f"norm over the {report['norm']}")
    low, high = report.get("interval", (0, 1))
    between = "" if (low, high) == (0, 1) else f" between t = {low:g} and {high:g}"
    segments = " + ".join(f"{n:g}" for n in report["nfe_segments"])
    return (f"weights    {report['weights']} at step {report['step']} of {report['run']}\n"
            f"solver     {report['solver']}, {', '.join(settings)}, {report['batch']} images at a time\n"
            f"guidance   {report['cfg_scale']:g}{between}, network in {report.get('precision', 'float32')}\n"
            f"NFE        {segments} = {report['nfe']:g} by segment ({report['forwards']:g} network passes per image)\n"
            f"time       {report['seconds_per_image']:.4f} s per image on {report['device']}, peak memory "
            f"{report.get('memory_gb', math.nan):.2f} GB")
