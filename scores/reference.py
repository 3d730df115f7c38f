"""References: what generated images are compared with, made once from real images.

    python -m scores.reference --data DIR --res 256 --out faces.npz                 with Inception, for FID
    torchrun --nproc_per_node=8 -m scores.reference --dataset celebahq --data DIR

The file holds mean and covariance of the features (mu, sigma, as pytorch-fid names them), the features, and how they
were made. `python fid.py RUN --ref faces.npz` refuses another extractor or resolution.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
from config import UserError, explain
from data.sources import chunks_of, open_source
from run.ranks import Ranks
from scores import features as extractors

KEEP = 50_000                                               # features kept of a set: 0.4 GB of Inception's


@dataclass
class Statistics:
    """Mean (D,) and covariance (D, D) of the features of a set of images; the features (N, D) of at most KEEP of them,
    evenly spaced, None where they are not known; how: extractor, resolution, n, and where the images came from."""

    mean: np.ndarray
    cov: np.ndarray
    features: np.ndarray | None
    how: dict


def statistics_of(batches: Iterable[tuple[int, np.ndarray]], extractor: Callable, how: dict, total: int,
                  ranks: Ranks) -> Statistics | None:
    """One pass over (number of the first, images) of this process, added up in float64: the statistics of all processes
    together, in the first one; None in the others."""
    count, sums, products, features, step = 0, 0.0, 0.0, {}, max(1, math.ceil(total / KEEP))
    with tqdm(total=total, desc="features", unit="img", leave=False, disable=not ranks.first or None) as bar:
        for first, images in batches:
            part = extractor(images)                                                # (B, D)
            x = part.astype(np.float64)
            count, sums, products = count + len(x), sums + x.sum(axis=0), products + x.T @ x
            features[first] = part[-first % step :: step]
            bar.update(min(len(images) * ranks.world, bar.total - bar.n))
    if not (parts := ranks.gather((count, sums, products, features))):
        return None
    count, sums, products = (sum(part[k] for part in parts) for k in range(3))
    kept = {first: x for *_, features in parts for first, x in features.items()}
    cov = (products - np.outer(sums, sums) / count) / (count - 1)
    return Statistics(sums / count, (cov + cov.T) / 2, np.concatenate([kept[first] for first in sorted(kept)]),
                      {**how, "n": count})


def save_reference(file: Path, statistics: Statistics) -> None:
    """mu, sigma, features, and how they were made."""
    with explain(f"the reference cannot be written to {file}", kinds=OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".tmp.npz")
        np.savez(temporary, mu=statistics.mean, sigma=statistics.cov, features=statistics.features,
                 how=np.array(json.dumps(statistics.how)))
        os.replace(temporary, file)


def load_reference(file: str) -> Statistics:
    """A reference of scores.reference, or mu and sigma of ADM or pytorch-fid. Raises UserError for other files."""
    with explain(f"{file} is not a reference, an .npz with mu and sigma as scores.reference writes"):
        with np.load(file, allow_pickle=False) as arrays:
            mean, cov = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
            features = arrays["features"] if "features" in arrays else None
            how = json.loads(str(arrays["how"])) if "how" in arrays else {}
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or not isinstance(how, dict) or (
                features is not None and (features.ndim != 2 or features.shape[1] != len(mean))):
            raise ValueError("its arrays have the wrong shapes")
        return Statistics(mean, cov, features, how)


def check_comparable(reference: Statistics, how: dict, file: str) -> None:
    """Raises UserError when extractor or resolution of the two sides differ."""
    for key in ("extractor", "res"):
        if key in reference.how and reference.how[key] != how[key]:
            raise UserError(f"{file} cannot be compared with these images: its {key} is {reference.how[key]}, theirs "
                            f"is {how[key]}; make a reference with the same (python -m scores.reference)")


def check_enough(n: int, dim: int, force: bool = False) -> None:
    """Raises UserError for fewer images than features, whose covariance is singular, unless forced."""
    if n < 2 or n < dim + 1 and not force:
        raise UserError(f"{n} images are too few for {dim} features: the distance would mean nothing. Take at least "
                        f"{dim + 1} (papers: 50000), or look at it anyway with --force")


# ---------------------------------------------------------------------------------------------------------------------
# the program


def add_extractor_flags(parser: argparse.ArgumentParser) -> None:
    """Of scores.reference and fid.py."""
    parser.add_argument("--extractor-file", default="", help="its TorchScript file [downloaded once, hash checked]")
    parser.add_argument("--trust", action="store_true", help="accept an --extractor-file with another hash")
    parser.add_argument("--force", action="store_true", help="allow fewer images than features")


def load_extractor(args: argparse.Namespace, name: str, ranks: Ranks) -> Callable:
    """The extractor; the first process downloads what is missing before the others look for it."""
    load = partial(extractors.load_extractor, name, args.extractor_file, ranks.device, args.trust)
    ranks.first_does(load)
    return load()


def main() -> None:
    parser = config.parser(__doc__, "python -m scores.reference --data DIR [--res N] [--features NAME] [--out FILE]")
    parser.add_argument("--data", default="", help="real images: a folder, zip, parquet file or hf:OWNER/NAME@REVISION")
    parser.add_argument("--dataset", default="folder", choices=("folder", "celebahq", "imagenet"), help="[folder]")
    parser.add_argument("--split", default="train", help="which split, when the data has several [train]")
    parser.add_argument("--res", type=int, default=256, help="height and width in pixels [256]")
    parser.add_argument("--features", default="inception", help="inception, efficientnet or pixels [inception]")
    add_extractor_flags(parser)
    parser.add_argument("--batch", type=int, default=250, help="images at a time [250]")
    parser.add_argument("--out", default="reference.npz", help="the file to write [reference.npz]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    args = parser.parse_args()
    if args.res < 1 or args.batch < 1:
        raise UserError("--res and --batch must be at least 1")
    with Ranks.start(args.device) as ranks:
        source = open_source(args.dataset, args.data, args.split)
        ranks.first_does(lambda: source.warn_of_small(args.res))
        extractor = load_extractor(args, args.features, ranks)
        how = {"extractor": extractor.identity, "res": args.res, "source": args.data,
               "crop": "ADM: box halving, bicubic, centre", "fingerprint": source.fingerprint}
        chunks = chunks_of(len(source), args.batch)
        read = ((chunk.start, np.stack([source.image(i, args.res) for i in chunk]).transpose(0, 2, 3, 1))
                for chunk in chunks[ranks.rank :: ranks.world])
        statistics = statistics_of(read, extractor, how, len(source), ranks)
        if ranks.first:
            check_enough(statistics.how["n"], len(statistics.mean), args.force)
            save_reference(Path(args.out), statistics)
            print(f"reference  {args.out}: {statistics.how['n']:,} images of {args.res} pixels, "
                  f"{extractor.identity[:40]}")


if __name__ == "__main__":
    config.run(main)
