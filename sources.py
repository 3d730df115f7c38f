"""Where images come from: a folder, a zip archive, parquet files, an LMDB, or a data set on the Hugging Face hub.

`open_source` lists the images with their labels and reads none; `Source.image(i, R)` decodes one. Every image of the
project passes through `crop`, so training, encoding and scoring see the same pixels.

    DIR/*.jpg                     no classes
    DIR/cat/*.png  DIR/dog/...    one class for each subfolder, in natural order (9 before 10), at any depth below
    DIR/train/...  DIR/val/...    one of the splits
    FILE.zip                      as a folder; FILE.parquet or a folder of such: an image column, perhaps a label column
    DIR/*.tfrecords               TensorFlow records with `shape` and `data`, as GLOW and PGAN store CelebA-HQ
    DIR/data.mdb                  LMDB with keys 0, 1, ...: encoded images, or raw bytes as NVAE and LFM write them
    hf:OWNER/NAME@REVISION        parquet or image-folder data sets; needs the extra: pip install -e '.[data]'
"""

import hashlib
import io
import math
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from config import UserError, first_line

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")     # PIL knows many more: it hands PostScript to Ghostscript
LARGEST = 2**30                                             # bytes of an image in an archive, unpacked
SPLITS = {"train", "training", "val", "valid", "validation", "test"}

WHERE = {  # said when nothing is found; what is known was last looked up in November 2026
    "celebahq": """CelebA-HQ is not ours to host (non-commercial research licence of CelebA). Known sources:
  30,000 JPEG of 1024 px, zip      https://github.com/switchablenorms/CelebAMask-HQ   (folder CelebA-HQ-img)
  rebuilt PNG of 1024 px           https://github.com/tkarras/progressive_growing_of_gans
  256 px tfrecords of GLOW, LMDB   https://github.com/NVlabs/NVAE   (27,000 for training; LFM uses the same)
  parquet on the hub               --data hf:OWNER/NAME@REVISION, for example jxie/celeba-hq""",
    "imagenet": """ImageNet needs an account and its terms accepted (non-commercial research):
  https://image-net.org/download   or   https://www.kaggle.com/c/imagenet-object-localization-challenge/data
Give the folder that holds train/n01440764 and the other 999, the zip of Kaggle, or a parquet copy of it""",
}


@dataclass
class Source:
    """Images that can be read one at a time: names, labels (one per image), names of the classes (none: no labels)."""

    where: str
    names: list[str]
    labels: list[int]
    classes: list[str]
    fingerprint: str                                        # of the names and sizes
    open: Callable[[int], object]                           # i -> what PIL can open, or an array (H, W, 3)

    def __len__(self) -> int:
        return len(self.names)

    def size(self, i: int) -> tuple[int, int]:
        """Width and height of image i, without decoding it. Raises UserError when it cannot be read."""
        from PIL import Image

        opened = self.opened(i)
        if isinstance(opened, np.ndarray):
            return opened.shape[1], opened.shape[0]
        try:
            with Image.open(opened, formats=FORMATS) as image:
                return image.size
        except Exception as problem:                        # as in read_image
            raise UserError(f"cannot read {self.names[i]!r} of {self.where}: {first_line(problem)}") from None

    def image(self, i: int, resolution: int) -> np.ndarray:
        """Image i as uint8 (3, R, R). Raises UserError naming the file when it cannot be read."""
        return read_image(self.opened(i), resolution, self.names[i])

    def opened(self, i: int) -> Path | io.BytesIO | np.ndarray:
        """What read_image takes. Raises UserError naming the image when the archive does not give it out."""
        try:
            return self.open(i)
        except Exception as problem:                        # zip, LMDB, parquet and records: each raises its own kinds
            raise UserError(f"cannot read {self.names[i]!r} of {self.where}: {first_line(problem)}") from None


def natural(name: str) -> list:
    """Sort key in which "9" comes before "10"."""
    return [(0, len(part.lstrip("0")), part.lstrip("0")) if part.isascii() and part.isdecimal() else (1, 0, part)
            for part in re.split(r"([0-9]+)", str(name)) if part] + [(2, 0, str(name))]


def open_source(dataset: str, where: str, split: str = "train") -> Source:
    """Lists the images of `where`. Raises UserError when nothing is found, with what to do about it."""
    if not where:
        raise UserError(f"--dataset {dataset} needs its images: add --data DIR\n{WHERE.get(dataset, '')}".rstrip())
    try:
        source = _open(dataset, where, split)
    except OSError as problem:                              # no permission, a name that is too long, a disk that fails
        raise UserError(f"cannot read {where!r}: {first_line(problem)}") from None
    if dataset == "celebahq":                               # faces have no classes
        source.labels, source.classes = [0] * len(source), []
    if dataset == "imagenet" and len(source.classes) != 1000:
        raise UserError(f"ImageNet has 1000 classes, but {where} shows {len(source.classes)}\n{WHERE['imagenet']}")
    return source


def _open(dataset: str, where: str, split: str) -> Source:
    path = Path(where)
    if where.startswith("hf:") or path.suffix == ".parquet" or (path.is_dir() and any(path.glob("**/*.parquet"))):
        return _parquet(where, split)
    if path.suffix == ".zip" and path.is_file():
        return _zip(path, split)
    if (path / "data.mdb").is_file() or (path.suffix == ".mdb" and path.is_file()):
        return _lmdb(path)
    if path.is_dir() and any(path.glob("**/*.tfrecord*")):
        return _tfrecords(path, split)
    if path.is_dir():
        return _folder(path, split)
    raise UserError(f"there is no image folder {where!r}; name one with --data\n{WHERE.get(dataset, '')}".rstrip())


def arrange(where: str, names: list[str], split: str, strip: bool) -> tuple[list[str], list[int], list[str]]:
    """Chooses the split and names the classes: paths in natural order, labels, classes.

    strip: a top directory that holds everything, as archives have, is no class.
    """
    images = sorted((n for n in names if PurePosixPath(n).suffix.lower() in EXTENSIONS
                     and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(n).parts)), key=natural)
    faces = [n for n in images if "CelebA-HQ-img" in PurePosixPath(n).parts]
    images = faces or images                                # CelebAMask-HQ comes with a mask for every part of a face
    parts = [PurePosixPath(n).parts for n in images]
    depth = 0
    while strip and parts and len({p[depth] for p in parts}) == 1 and all(len(p) > depth + 1 for p in parts):
        depth += 1
    tops = {p[depth] for p in parts if len(p) > depth + 1}
    if parts and tops and tops <= SPLITS and all(len(p) > depth + 1 for p in parts):
        kept = [i for i, p in enumerate(parts) if p[depth] == split]
        if not kept:
            raise UserError(f"{where} has the splits {', '.join(sorted(tops))}, but no {split!r}")
        images, parts, depth = [images[i] for i in kept], [parts[i] for i in kept], depth + 1
    if not images:
        raise UserError(f"no images in {where!r}; looked for {', '.join(sorted(EXTENSIONS))}")
    inside = [p[depth] if len(p) > depth + 1 else "" for p in parts]
    classes = sorted(set(inside) - {""}, key=natural)
    if not classes:
        return images, [0] * len(images), []
    if "" in inside:
        raise UserError(f"{where!r} holds both class folders and images, such as {parts[inside.index('')][-1]!r}: "
                        "move the images into a class folder, or the class folders away")
    number = {name: i for i, name in enumerate(classes)}
    order = sorted(range(len(images)), key=lambda i: number[inside[i]])             # stable: natural inside a class
    return [images[i] for i in order], [number[inside[i]] for i in order], classes


def fingerprint(names: list[str], sizes: list[int]) -> str:
    lines = "\n".join(f"{n} {s}" for n, s in zip(names, sizes, strict=True))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()       # a file's name need not be UTF-8


def _folder(path: Path, split: str) -> Source:
    found, seen = [], set()

    def stop(problem):
        raise UserError(f"cannot list {path}: {first_line(problem)}") from None

    for directory, folders, files in os.walk(path, followlinks=True, onerror=stop):
        if (real := os.path.realpath(directory)) in seen:   # links may form a loop
            folders.clear()
            continue
        seen.add(real)
        found += [os.path.relpath(os.path.join(directory, name), path).replace(os.sep, "/") for name in files]
    names, labels, classes = arrange(str(path), found, split, strip=False)

    def size(file):
        try:
            return file.stat().st_size
        except OSError:                                     # gone by now, or a broken link: reading it will say so
            return -1

    sizes = [size(path / name) for name in names]
    return Source(str(path), names, labels, classes, fingerprint(names, sizes), lambda i: path / names[i])


def _zip(path: Path, split: str) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as problem:                            # a damaged directory raises many kinds
        raise UserError(f"{path} is no zip archive that can be read: {first_line(problem)}") from None
    infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    names, labels, classes = arrange(str(path), list(infos), split, strip=True)
    sizes = [infos[name].file_size for name in names]

    def entry(i):                                           # never unpacked to a file: names may say ../
        if sizes[i] > LARGEST:
            raise ValueError(f"it has {sizes[i]:,} bytes unpacked, a decompression bomb")
        return io.BytesIO(archive.read(names[i]))

    return Source(str(path), names, labels, classes, fingerprint(names, sizes), entry)


def _lmdb(path: Path) -> Source:
    try:
        import lmdb
    except ImportError:
        raise UserError("reading an LMDB needs the package lmdb: pip install -e '.[data]'") from None
    try:
        database = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
        with database.begin() as reading:
            count = sum(1 for key, _ in reading.cursor() if key.isdigit())
    except lmdb.Error as problem:
        raise UserError(f"{path} is no LMDB that can be read: {problem}") from None

    def entry(i):
        with database.begin() as reading:
            raw = reading.get(str(i).encode())
        if raw is None:
            raise KeyError("there is no such key")
        side, encoded = math.isqrt(len(raw) // 3), raw[:4] in (b"\x89PNG", b"RIFF") or raw[:3] == b"\xff\xd8\xff"
        if 3 * side * side == len(raw) and not encoded:     # NVAE and LFM at 256: bytes (H, W, 3) without a header
            return np.frombuffer(raw, np.uint8).reshape(side, side, 3)
        return io.BytesIO(raw)

    if not count:
        raise UserError(f"the LMDB {path} has no keys 0, 1, ...; it is not in the form of NVAE and LFM")
    names = [str(i) for i in range(count)]
    return Source(str(path), names, [0] * count, [], fingerprint([path.name], [count]), entry)


def _tfrecords(path: Path, split: str) -> Source:
    """A record is framed by its length and two checksums; an image is raw bytes and a shape, (H, W, C) or (C, H, W)."""
    files = sorted(path.glob("**/*.tfrecord*"), key=lambda file: natural(str(file)))
    of_split = [f for f in files if split in re.split(r"[-_./\\]", str(f.relative_to(path.parent)))]
    places = []                                             # file, offset and length of every record
    for file in of_split or files:
        size, offset = file.stat().st_size, 0
        with open(file, "rb") as stream:
            while offset < size:
                stream.seek(offset)
                length = int.from_bytes(stream.read(8), "little")
                if offset + 16 + length > size:
                    raise UserError(f"{file} is cut off, or no file of TensorFlow records")
                places.append((file, offset + 12, length))
                offset += 16 + length
    if not places:
        raise UserError(f"there is no record in the .tfrecords of {path}")

    def entry(i):
        file, offset, length = places[i]
        with open(file, "rb") as stream:
            stream.seek(offset)
            example = stream.read(length)
        values = {}
        for _, feature in _fields(dict(_fields(example))[1]):                       # Example, Features, its entries
            feature = dict(_fields(feature))
            values[feature[1].decode()] = next(_fields(feature[2]))[1]              # name, list of bytes or numbers
        shape = []
        for _, number in _fields(values["shape"]):          # one by one, or packed into one piece
            shape += [number] if isinstance(number, int) else _varints(number)
        image = np.frombuffer(dict(_fields(values["data"]))[1], np.uint8).reshape(shape)
        return image.transpose(1, 2, 0) if shape[0] == 3 else image

    names, sizes = [f"{file.name} at {offset}" for file, offset, _ in places], [length for _, _, length in places]
    return Source(str(path), names, [0] * len(names), [], fingerprint(names, sizes), entry)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number of a protocol buffer, seven bits a byte, and where it ends."""
    value = shift = 0
    while raw[at] >= 128:
        value, shift, at = value | (raw[at] & 127) << shift, shift + 7, at + 1
    return value | raw[at] << shift, at + 1


def _varints(raw: bytes) -> list[int]:
    numbers, at = [], 0
    while at < len(raw):
        number, at = _varint(raw, at)
        numbers.append(number)
    return numbers


def _fields(raw: bytes):
    """(number, value) of the fields of a protocol buffer: whole numbers, and bytes for everything else."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        if tag & 7 == 0:
            value, at = _varint(raw, at)
        else:
            length, at = ({1: 8, 5: 4}[tag & 7], at) if tag & 7 in (1, 5) else _varint(raw, at)
            value, at = raw[at : at + length], at + length
        yield tag >> 3, value


def _parquet(where: str, split: str) -> Source:
    try:
        import datasets
    except ImportError:
        raise UserError("parquet files need the package datasets: pip install -e '.[data]'") from None
    try:
        if where.startswith("hf:"):
            name, _, revision = where[3:].partition("@")
            table = datasets.load_dataset(name, revision=revision or None, split=split)
            identity = [where], [len(table)]
        else:
            path = Path(where)
            files = sorted(path.glob("**/*.parquet"), key=lambda f: natural(str(f))) if path.is_dir() else [path]
            of_split = [f for f in files if split in re.split(r"[-_./\\]", str(f.relative_to(path.parent)))]
            files = of_split or files
            table = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
            identity = [f.name for f in files], [f.stat().st_size for f in files]
    except Exception as problem:                            # the package raises its own and those of the network
        said = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise UserError(f"cannot load {where}: {said}") from None
    images = [name for name, kind in table.features.items()
              if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)]
    if not images:
        raise UserError(f"{where} has no column of images; its columns are {', '.join(table.features)}")
    column = images[0]
    labels = next((name for name in ("label", "labels", "fine_label") if name in table.features), None)
    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    numbers, classes = [0] * len(table), []
    if labels:
        numbers = [int(n) for n in table[labels]]
        known = getattr(table.features[labels], "names", None)
        classes = list(known) if known else [str(n) for n in range(max(numbers) + 1)]

    def entry(i):
        value = table[i][column]
        return io.BytesIO(value["bytes"]) if value["bytes"] else Path(value["path"])

    names = [f"row {i}" for i in range(len(table))]
    return Source(where, names, numbers, classes, fingerprint(*identity), entry)


def read_image(file: Path | io.BytesIO | np.ndarray, resolution: int, name: str = "") -> np.ndarray:
    """One image as uint8 (3, R, R): upright, RGB, cropped. Raises UserError naming it when it cannot be read.

    file: a path, a binary stream, or an array (H, W, 3).
    """
    from PIL import Image, ImageOps

    try:
        if isinstance(file, np.ndarray):
            return crop(Image.fromarray(file).convert("RGB"), resolution)
        with Image.open(file, formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, of which nobody knows the white")
            if image.mode.startswith("I"):                  # 16-bit grey: PIL would clip it to white
                grey, hidden = np.asarray(image), image.info.get("transparency")
                image = Image.fromarray((grey.clip(0, 65535) // 257).astype(np.uint8))
                if hidden is not None:
                    image.putalpha(Image.fromarray(np.where(grey == hidden, 0, 255).astype(np.uint8)))
            if image.has_transparency_data:                 # transparent pixels become white
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return crop(image.convert("RGB"), resolution)
    except Exception as problem:                            # PIL's decoders raise anything for a damaged file
        raise UserError(f"cannot read the image {name or str(file)!r}: {first_line(problem)}; repair or remove it"
                        ) from None


def crop(image, resolution: int) -> np.ndarray:
    """A PIL image in RGB as uint8 (3, R, R), cut as in ADM (Dhariwal and Nichol 2021): halved while its short side is
    at least 2R (box), resized to R (bicubic), centre kept."""
    from PIL import Image

    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = tuple(max(resolution, round(side * scale)) for side in image.size)
    if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:          # a line of a million pixels would be a million times R x R
        raise ValueError(f"it is a strip of {image.width} x {image.height} pixels, no image that fills a square")
    array = np.asarray(image.resize(size, Image.Resampling.BICUBIC))                # (H, W, 3)
    top, left = (array.shape[0] - resolution) // 2, (array.shape[1] - resolution) // 2
    return array[top : top + resolution, left : left + resolution].transpose(2, 0, 1)


def download(name: str, patterns: list[str]) -> Path:
    """The files of OWNER/NAME or OWNER/NAME@REVISION on the hub, in its cache. Raises UserError without a network."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as problem:                            # the hub's own errors, and those of the network
        raise UserError(f"cannot get {name} from the Hugging Face hub ({type(problem).__name__}); without a network, "
                        f"download it where there is one and name the folder (mirrors: set HF_ENDPOINT)") from None
