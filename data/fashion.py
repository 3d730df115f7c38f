"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): 60,000 grey images of clothes and 10,000 for tests, 10 classes.

The files are the idx files of its repository, gzipped: a header of big-endian integers (a magic number, then the
sizes), then one byte for each pixel or label.
"""

import gzip
import hashlib
from pathlib import Path

import numpy as np

from config import UserError, explain
from data.sources import LARGEST, open_source

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
PREFIX = {"train": "train", "test": "t10k"}
HOW = """get Fashion-MNIST in one of these ways:
  apt-get install dataset-fashion-mnist           the files of Debian are found without --data
  --data DIR                                      with the four .gz files of github.com/zalandoresearch/fashion-mnist
  --data hf:zalando-datasets/fashion_mnist        from the Hugging Face hub"""


def read(where: str, split: str = "train") -> tuple[np.ndarray, np.ndarray, str]:
    """Pixels uint8 (N, 1, 32, 32), padded by 2 with black, labels int64 (N,), and a fingerprint of both.

    where: a folder with the four files, hf:OWNER/NAME, or "" for the folder of the Debian package; split: train or
    test. Raises UserError when the files are missing, damaged or of another data set.
    """
    if where.startswith("hf:"):
        source = open_source("fashion", where, split)
        if source.size(0) != (28, 28):
            raise UserError(f"the images of {where} are not 28 x 28: it is not Fashion-MNIST")
        pixels = np.stack([source.image(i, 28)[0] for i in range(len(source))])
        labels = np.array(source.labels)
    else:
        folder, names = Path(where or DEBIAN), [f"{PREFIX[split]}-{kind}-ubyte.gz" for kind in
                                                ("images-idx3", "labels-idx1")]
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"there is no {missing[0]} in {folder}; {HOW}")
        pixels, labels = (read_idx(folder / name, shape) for name, shape in zip(names, ((28, 28), ()), strict=True))
        where = str(folder)
    if len(pixels) != len(labels):
        raise UserError(f"the {split} files of {where} do not belong together: {len(pixels)} images, {len(labels)} "
                        "labels")
    classes = np.unique(labels).tolist()
    if classes != list(range(len(CLASSES))):
        raise UserError(f"the {split} labels of {where} must be 0 to {len(CLASSES) - 1}, each at least once, but are "
                        f"{', '.join(map(str, classes[:20])) or 'none'}")
    pixels = np.pad(pixels[:, None], ((0, 0), (0, 0), (2, 2), (2, 2)))              # (N, 1, 32, 32)
    labels = labels.astype(np.int64)
    return pixels, labels, hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()


def read_idx(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of a gzipped idx file, (N, *shape). Raises UserError for a damaged file or another shape."""
    with explain(f"{file} cannot be read as an idx file", "; get it again"), gzip.open(file) as stream:
        header = np.frombuffer(stream.read(4 * (2 + len(shape))), ">i4").tolist()
        if header[:1] != [0x801 + len(shape)] or tuple(header[2:]) != shape:        # 08: bytes, then the dimensions
            raise ValueError(f"its header is not that of bytes of the shape {('N', *shape)}")
        size = header[1] * int(np.prod(shape))
        if not 0 < size < LARGEST:
            raise ValueError(f"it claims {size:,} bytes")
        content = stream.read(size + 1)
    if len(content) != size:
        raise UserError(f"{file} is {'cut off' if len(content) < size else 'too long'}: its header promises {size:,} "
                        "bytes; get it again")
    return np.frombuffer(content, np.uint8).reshape(-1, *shape)
