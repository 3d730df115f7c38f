"""Where images come from: a folder, a zip archive, parquet files, or a data set on the Hugging Face hub.

`open_source` lists the images with their labels and reads none; `Source.image(i, R)` decodes one. Every image of the
project passes through `crop`, so training, encoding and scoring see the same pixels.

    DIR/*.jpg                     no classes
    DIR/cat/*.png  DIR/dog/...    one class for each subfolder, in natural order (9 before 10), at any depth below
    DIR/train/...  DIR/test/...   splits, each as above; test is held out, for scores
    FILE.zip                      as a folder
    FILE.parquet, DIR/*.parquet   an image column, perhaps a column label, labels or fine_label
    hf:OWNER/NAME@REVISION        a parquet or image-folder data set of the hub

With --condition vectors row i of vectors.npy, beside the images of a folder (in DIR/train when there are splits),
belongs to `Source.names[i]`; in parquet files the first column of lists of floats holds the vectors.
"""

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from config import UserError, explain

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")     # PIL knows many more: it hands PostScript to Ghostscript
LARGEST = 2**30                                             # bytes of an image in an archive, unpacked
SPLITS = dict(train="train", training="train", val="val", valid="val", validation="val", test="test")      # by name

WHERE = {                                                   # printed when no images are found
    "celebahq": """get CelebA-HQ from github.com/switchablenorms/CelebAMask-HQ (a zip), or the hub (--data
  hf:jxie/celeba-hq, parquet). LMDB of NVAE, tfrecords of GLOW (27,000 for training): convert to PNG or parquet""",
    "imagenet": """get ImageNet from image-net.org or kaggle.com/c/imagenet-object-localization-challenge, and name the
  folder with train/n01440764 and the other 999, the zip of Kaggle, or a parquet copy of it""",
}


@dataclass
class Source:
    """Images that can be read one at a time. Its methods raise UserError, naming the image or file."""

    where: str
    names: list[str]
    labels: list[int]                                       # one per image
    classes: list[str]                                      # their names; none: no labels
    fingerprint: str                                        # of the names and sizes
    open: Callable[[int], Path | io.BytesIO]                # i -> what PIL can open
    splits: set[str] = field(default_factory=set)           # names of all splits, when there are several
    load_vectors: Callable[[], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def size(self, i: int) -> tuple[int, int]:
        """Width and height of image i, without decoding it."""
        failure = f"cannot read {self.names[i]!r} of {self.where}"
        with explain(failure), Image.open(self.open(i), formats=FORMATS) as image:
            return image.size

    def warn_of_small(self, resolution: int) -> None:
        """Says when images are enlarged; looks at 64 of them."""
        some = np.linspace(0, len(self) - 1, min(64, len(self))).round().astype(int).tolist()
        with suppress(UserError):                           # one that cannot be read is named when its turn comes
            if small := sum(min(self.size(i)) < resolution for i in some):
                print(f"warning: {small} of {len(some)} images of {self.where} are smaller than {resolution} x "
                      f"{resolution}, and are enlarged")

    def image(self, i: int, resolution: int) -> np.ndarray:
        """Image i as uint8 (3, R, R)."""
        with explain(f"cannot read {self.names[i]!r} of {self.where}"):
            file = self.open(i)
        return read_image(file, resolution, self.names[i])

    def image_or_problem(self, i: int, resolution: int, skip_bad: bool) -> tuple[np.ndarray, str]:
        """Image i and ""; with skip_bad, black pixels and the problem of an image that cannot be read."""
        try:
            return self.image(i, resolution), ""
        except UserError as problem:
            if not skip_bad:
                raise UserError(f"{problem}, or leave out such images with --skip-bad") from None
            return np.zeros((3, resolution, resolution), np.uint8), str(problem)

    def vectors(self) -> np.ndarray:
        """The vectors of --condition vectors, float32 (N, dim)."""
        if self.load_vectors is None:
            raise UserError(f"{self.where} has no vectors: --condition vectors needs a folder with vectors.npy, or "
                            "parquet files with a column of lists of floats")
        return self.load_vectors()


def natural(name: str) -> list:
    """Sort key in which "9" comes before "10"."""
    return [(0, len(part.lstrip("0")), part.lstrip("0")) if part.isascii() and part.isdecimal() else (1, 0, part)
            for part in re.split(r"([0-9]+)", str(name)) if part] + [(2, 0, str(name))]


def open_source(dataset: str, where: str, split: str = "train") -> Source:
    """Lists the images of `where`. Raises UserError when there are none, with what to do about it."""
    hint, path = f"\n{WHERE[dataset]}" if dataset in WHERE else "", Path(where)
    if not where:
        raise UserError(f"--dataset {dataset} needs its images: add --data DIR{hint}")
    with explain(f"cannot read {where!r}", kinds=OSError):  # no permission, a name that is too long, a failing disk
        if where.startswith("hf:") or path.suffix == ".parquet" or (path.is_dir() and any(path.glob("**/*.parquet"))):
            source = _parquet(where, split)
        elif path.suffix.lower() == ".zip" and path.is_file():
            source = _zip(path, split)
        elif path.is_dir():
            source = _folder(path, split)
        else:
            raise UserError(f"there is no image folder {where!r}; name one with --data{hint}")
    if dataset == "celebahq":                               # faces have no classes
        source.labels, source.classes = [0] * len(source), []
    if dataset == "imagenet" and len(source.classes) != 1000:
        raise UserError(f"ImageNet has 1000 classes, but {where} shows {len(source.classes)}{hint}")
    return source


def arrange(where: str, files: list[str], split: str, strip: bool, size: Callable[[str], int],
            read: Callable[[str], Path | io.BytesIO]) -> Source:
    """The images of a split, by class and in natural order. size, read: of a file, by its name.

    strip: a top directory that holds everything, as archives have, is not a class.
    """
    parts = {name: PurePosixPath(name).parts for name in files if PurePosixPath(name).suffix.lower() in EXTENSIONS}
    parts = {name: p for name, p in parts.items() if not any(part.startswith((".", "__MACOSX")) for part in p)}
    faces = {name: p for name, p in parts.items() if "CelebA-HQ-img" in p}
    parts = faces or parts                                  # CelebAMask-HQ comes with a mask for every part of a face
    while (strip and len({p[0] for p in parts.values()}) == 1
           and all(len(p) > 1 and p[0] not in SPLITS for p in parts.values())):
        parts = {name: p[1:] for name, p in parts.items()}
    tops = {p[0] for p in parts.values()}
    splits = tops if tops <= SPLITS.keys() else set()
    if splits:
        parts = {name: p[1:] for name, p in parts.items() if SPLITS[p[0]] == SPLITS.get(split)}
    if splits and not parts:
        raise UserError(f"{where} has the splits {', '.join(sorted(splits))}, but no {split!r}")
    if not parts:
        raise UserError(f"no images in {where!r}; looked for {', '.join(sorted(EXTENSIONS))} and .parquet (LMDB and "
                        "tfrecord files must be converted to PNG or parquet first)")
    folders = {name: p[0] if len(p) > 1 else "" for name, p in parts.items()}
    classes = sorted(set(folders.values()) - {""}, key=natural)
    number = {folder: i for i, folder in enumerate(classes or [""])}
    if stray := [name for name, folder in folders.items() if folder not in number]:
        raise UserError(f"{where!r} holds both class folders and images, such as {min(stray, key=natural)!r}: move the "
                        "images into a class folder, or the class folders away")
    names = sorted(parts, key=lambda name: (number[folders[name]], natural(name)))
    classes = [name.encode(errors="replace").decode() for name in classes]          # one need not be UTF-8
    return Source(where, names, [number[folders[name]] for name in names], classes,
                  fingerprint(names, map(size, names)), lambda i: read(names[i]), splits)


def fingerprint(names: Iterable[str], sizes: Iterable[int]) -> str:
    lines = "\n".join(f"{n} {s}" for n, s in zip(names, sizes, strict=True))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()       # a file's name need not be UTF-8


def _folder(path: Path, split: str) -> Source:
    files = []

    def fail(problem):
        raise problem

    for directory, folders, inside in os.walk(path, followlinks=True, onerror=fail):
        if os.path.realpath(directory) in map(os.path.realpath, Path(directory).parents):       # a loop of links
            folders.clear()
            continue
        files += [os.path.relpath(os.path.join(directory, name), path).replace(os.sep, "/") for name in inside]

    def size(name):                                         # -1 of a broken link: reading it names it
        return os.path.getsize(path / name) if os.path.exists(path / name) else -1

    source = arrange(str(path), files, split, False, size, lambda name: path / name)
    vectors = path / (PurePosixPath(source.names[0]).parts[0] if source.splits else "") / "vectors.npy"
    source.load_vectors = lambda: read_vectors(vectors, len(source))
    return source


def _zip(path: Path, split: str) -> Source:
    with explain(f"{path} is not a zip archive that can be read"):
        archive = zipfile.ZipFile(path)
    infos = {info.filename.replace("\\", "/"): info for info in archive.infolist() if not info.is_dir()}

    def read(name):                                         # never unpacked to a file: names may contain ../
        if infos[name].file_size > LARGEST:
            raise ValueError(f"it has {infos[name].file_size:,} bytes unpacked, a decompression bomb")
        return io.BytesIO(archive.read(infos[name]))

    return arrange(str(path), list(infos), split, True, lambda name: infos[name].file_size, read)


def _parquet(where: str, split: str) -> Source:
    """Read by Hugging Face `datasets`, which runs no code of a data set."""
    with explain("parquet files need the package datasets", ": pip install -e '.[data]'", ImportError):
        import datasets
    with explain(f"cannot load {where}"):
        if where.startswith("hf:"):
            name, _, revision = where[3:].partition("@")
            table = datasets.load_dataset(name, revision=revision or None, split=split)
            splits, identity = set(table.info.splits or {}), fingerprint([where], [len(table)])
        else:
            files, splits = parquet_files(Path(where), split)
            table = datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train")
            identity = fingerprint([file.name for file in files], [file.stat().st_size for file in files])
        columns = table.features
        image = next((name for name, kind in columns.items()
                      if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)), None)
        if image is None:
            raise UserError(f"{where} has no column of images; its columns are {', '.join(columns)}")
        if isinstance(columns[image], datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))
        label = next((name for name in ("label", "labels", "fine_label") if name in columns), None)
        if label and getattr(columns[label], "dtype", "") == "string":
            table = table.class_encode_column(label)        # texts are the names of classes
            columns = table.features
        labels = [int(n) for n in table[label]] if label else [0] * len(table)
        classes = list(getattr(columns[label], "names", None) or map(str, range(max(labels) + 1))) if label else []
    if label and not 0 <= min(labels) <= max(labels) < len(classes):
        raise UserError(f"the column {label!r} of {where} holds labels from {min(labels)} to {max(labels)}, but there "
                        f"are {len(classes)} classes, from 0: is this a split without labels?")
    vector = next((name for name, kind in columns.items()   # a list of numbers has the kind of its elements
                   if getattr(getattr(kind, "feature", None), "dtype", "").startswith("float")), None)

    def entry(i):
        value = table[i][image]
        return io.BytesIO(value["bytes"]) if value["bytes"] else Path(value["path"])

    def vectors():
        rows = table.select_columns([vector]).with_format("numpy")[:][vector]
        return check_vectors(rows, len(table), f"the column {vector!r} of {where}")

    return Source(where, [f"row {i}" for i in range(len(table))], labels, classes, identity, entry, splits,
                  vectors if vector else None)


def parquet_files(path: Path, split: str) -> tuple[list[Path], set[str]]:
    """The files of a split in natural order, and all splits, which stand in the names: train-00000.parquet."""
    if not path.is_dir():
        return [path], set()
    files = sorted(path.glob("**/*.parquet"), key=natural)
    words = {file: set(re.split(r"[-_./\\]", str(file.relative_to(path)))) for file in files}
    chosen = [file for file in files if SPLITS.get(split, split) in (SPLITS.get(word, word) for word in words[file])]
    splits = SPLITS.keys() & set().union(*words.values())
    if splits and not chosen:
        raise UserError(f"{path} has the splits {', '.join(sorted(splits))}, but no {split!r}")
    return chosen or files, splits


def read_vectors(file: Path, count: int) -> np.ndarray:
    """vectors.npy of `count` images, float32 (count, dim), mapped into memory when it can be; no pickled objects."""
    with explain(f"{file} cannot be read as a .npy array"):
        if not file.exists():
            raise UserError(f"--condition vectors needs {file}: float numbers (N, dim), a row for each of the {count} "
                            "images in the order they are listed")
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    return check_vectors(array, count, str(file))


def check_vectors(array: np.ndarray, count: int, where: str) -> np.ndarray:
    """float32 (count, dim). Raises UserError for another shape or kind, and for numbers that are not finite."""
    dtype = getattr(array, "dtype", np.dtype(object))       # rows of several lengths come as a list
    if dtype.kind not in "fiu" or array.ndim != 2 or not array.shape[1]:
        raise UserError(f"{where} must hold numbers of the shape (N, dim), a row of the same length for each image, "
                        f"not {dtype} of the shape {np.shape(array)}")
    if len(array) != count:
        raise UserError(f"{where} holds {len(array)} vectors, but there are {count} images: each needs its row")
    with np.errstate(over="ignore"):
        array = array if array.dtype == np.float32 else array.astype(np.float32)
    for first in range(0, count, 65536):                    # of a file mapped into memory, a part at a time
        bad = ~np.isfinite(array[first : first + 65536]).all(axis=1)
        if bad.any():
            raise UserError(f"{where} holds numbers that are not finite in float32: see row {first + bad.argmax()}")
    return array


def read_image(file: Path | io.BytesIO, resolution: int, name: str = "") -> np.ndarray:
    """One image as uint8 (3, R, R): upright, RGB, cropped. Raises UserError naming it when it cannot be read."""
    name = name or str(file)
    with explain(f"cannot read the image {name!r}", "; repair or remove it"):
        return crop(read_photo(file), resolution)


def read_photo(file: Path | io.BytesIO) -> Image.Image:
    """A whole image, upright and RGB; transparent pixels are white. Raises what PIL raises."""
    with Image.open(file, formats=FORMATS) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode == "F":
            raise ValueError("float images are not supported, because their white level is unknown")
        if image.mode.startswith("I"):                      # 16-bit grey: PIL would clip it to white
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def crop(image: Image.Image, resolution: int) -> np.ndarray:
    """A PIL image in RGB as uint8 (3, R, R), cut as in ADM (Dhariwal and Nichol 2021): halved while its short side is
    at least 2R (box), resized to R (bicubic), centre kept. Raises ValueError for a strip too long to resize."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = tuple(max(resolution, round(side * scale)) for side in image.size)
    if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:          # a line of a million pixels would be a million times R x R
        raise ValueError(f"it is a strip of {image.width} x {image.height} pixels, too long for a square crop")
    array = np.asarray(image.resize(size, Image.Resampling.BICUBIC))                # (H, W, 3)
    top, left = (array.shape[0] - resolution) // 2, (array.shape[1] - resolution) // 2
    return array[top : top + resolution, left : left + resolution].transpose(2, 0, 1)


def chunks_of(num: int, batch: int) -> list[range]:
    """Images 0..num-1 in batches, the same ones for any number of processes."""
    return [range(first, min(first + batch, num)) for first in range(0, num, batch)]


def download(name: str, patterns: list[str]) -> Path:
    """The files of OWNER/NAME or OWNER/NAME@REVISION on the hub, in its cache. Raises UserError without a network."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    with explain(f"cannot get {name} from the Hugging Face hub",
                 "; without a network, download it where there is one and name the folder (mirrors: set HF_ENDPOINT)"):
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
