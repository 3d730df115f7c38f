"""Samples on disk: written batch by batch, by any number of processes, and continued after a stop.

    OUT/samples.npz           --format npz     `images` uint8 (N, H, W, C), `labels` (N,), -1 when unconditional
    OUT/shard-00000250.npz    --format shards  the same for one batch, named by its first image
    OUT/png/00000250.png      --format png     one file for each image
    OUT/grid.png, report.json                  the first hundred; what they cost and how they were made

A batch is written, and then noted in a file of the process that wrote it; a stop costs the batches in flight.
"""

import json
import os
from pathlib import Path

import numpy as np

import pictures
import sources
from config import UserError


class Gallery:
    """A directory of samples. job: everything that decides what is drawn; only an equal one is continued."""

    def __init__(self, out: Path, job: dict, format: str, ranks):
        self.out, self.job, self.format, self.ranks = out, {**job, "format": format}, format, ranks

    def prepare(self, chunks: list[range]) -> list[range]:
        """Makes the directory; returns the chunks that are not there yet. Raises UserError when it cannot."""
        self.ranks.first_does(self.begin)
        done = {note["first"] for note in self.notes()}
        self.ranks.barrier()                                # all have read the notes before anyone adds to them
        return [chunk for chunk in chunks if chunk.start not in done]

    def begin(self) -> None:
        job, plain = self.out / "job.json", json.loads(json.dumps(self.job))
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "png").mkdir(exist_ok=True) if self.format == "png" else None
            if job.exists() and job.read_text() == json.dumps(plain):
                return
            old = [*self.out.glob("shard-*.npz"), *self.out.glob("notes-*.jsonl"), *self.out.glob("png/*.png")]
            if old and self.format != "npz":
                raise UserError(f"{self.out} holds other samples: choose another directory with --out, or delete it")
            for file in old:
                file.unlink()
            job.write_text(json.dumps(plain))
        except OSError as problem:
            raise UserError(f"the directory {self.out} cannot be written: {problem}; choose another with --out"
                            ) from None

    def write(self, numbers: range, images: np.ndarray, labels: np.ndarray | None, note: dict) -> None:
        from PIL import Image

        if self.format == "png":
            for i, image in zip(numbers, images, strict=True):
                Image.fromarray(image.squeeze()).save(self.out / "png" / f"{i:08d}.png")
        else:
            temporary = self.out / f"unfinished-{self.ranks.rank}.npz"
            np.savez(temporary, images=images, labels=np.full(len(images), -1) if labels is None else labels)
            os.replace(temporary, self.out / f"shard-{numbers.start:08d}.npz")
        with open(self.out / f"notes-{self.ranks.rank}.jsonl", "a") as file:
            file.write("\n" + json.dumps(note))             # a line that a kill cut off does not spoil the next
            file.flush()
            os.fsync(file.fileno())

    def notes(self) -> list[dict]:
        """What is known of the finished batches, in the order of their images."""
        found = {}
        for file in self.out.glob("notes-*.jsonl"):
            for line in file.read_text().splitlines():
                try:
                    note = json.loads(line)
                    found[note["first"]] = note
                except (ValueError, KeyError, TypeError):
                    continue
        return [found[first] for first in sorted(found)]

    def finish(self, report: dict, labels: np.ndarray | None, classes: list[str]) -> str:
        """The grid, the report, and one file of the shards when asked for. Returns what was written."""
        if self.format == "png":
            wrote, firsts = f"png/ ({report['num']} files)", sorted(self.out.glob("png/*.png"))[:100]
            first = np.stack([_plain(file) for file in firsts])
        else:
            shards = sorted(self.out.glob("shard-*.npz"))
            wrote, first = f"{len(shards)} shards", np.concatenate([read_npz(file)[0] for file in shards[:100]])[:100]
        if self.format == "npz":
            parts = [read_npz(file) for file in shards]
            images, all_labels = (np.concatenate(column) for column in zip(*parts, strict=True))
            np.savez_compressed(self.out / "samples.npz", images=images, labels=all_labels)
            for file in [*shards, *self.out.glob("notes-*.jsonl"), self.out / "job.json"]:
                file.unlink()
            wrote = "samples.npz"
        (self.out / "report.json").write_text(json.dumps(report, indent=2))
        pictures.draw_grid(self.out / "grid.png", first, None if labels is None else labels[:100], classes)
        return f"{self.out}/grid.png, {wrote}, report.json"


def _plain(file: Path) -> np.ndarray:
    from PIL import Image

    image = np.asarray(Image.open(file))
    return image if image.ndim == 3 else image[:, :, None]


def read_npz(file) -> tuple[np.ndarray, np.ndarray]:
    """`images` uint8 (N, H, W, C) and `labels` (N,) of an .npz. Raises UserError when it holds none.

    Also ADM's sample files, whose images are arr_0 and labels arr_1.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images = arrays["images" if "images" in arrays else "arr_0"]
            key = next((k for k in ("labels", "arr_1") if k in arrays), None)
            labels = arrays[key] if key else np.full(len(images), -1)
        if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != (len(images),):
            raise ValueError(f"its images have the shape {images.shape} {images.dtype}, and not (N, H, W, C) uint8")
        return images, labels
    except Exception as problem:                            # numpy raises many kinds for a damaged file
        said = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(f"{file} is no samples.npz of sample.py: {said}") from None


def read_samples(where: Path, batch: int = 250):
    """Yields (images uint8 (B, H, W, C), labels (B,) or -1) of a samples.npz, a folder of shards, or of images.

    Raises UserError when there are none.
    """
    if where.suffix == ".npz":
        images, labels = read_npz(where)
        for i in range(0, len(images), batch):
            yield images[i : i + batch], labels[i : i + batch]
    elif shards := sorted(where.glob("shard-*.npz")):
        for file in shards:
            yield read_npz(file)
    elif (where / "samples.npz").exists():
        yield from read_samples(where / "samples.npz", batch)
    else:
        source = sources.open_source("folder", str(where / "png" if (where / "png").is_dir() else where))
        size = _size(source)
        for i in range(0, len(source), batch):
            numbers = range(i, min(i + batch, len(source)))
            images = np.stack([source.image(n, size) for n in numbers]).transpose(0, 2, 3, 1)
            yield images, np.array([source.labels[n] if source.classes else -1 for n in numbers])


def _size(source) -> int:
    """The side of the first image of a folder; all are read at it."""
    from PIL import Image

    opened = source.open(0)
    with Image.open(opened) as image:
        return min(image.size)
