"""Scores: how close generated images are to real ones.

    python fid.py                               500 images of the newest run against its own training data, no download
    python fid.py RUN --num 1000 --cfg 1.5      another run, another number, with guidance
    python fid.py DIR/samples.npz               images that sample.py wrote (also a folder of them)
    python fid.py ref --data DIR --res 256 --out faces.npz                  statistics of real images, with Inception
    torchrun --nproc_per_node=8 fid.py RUN -n 50000 --ref faces.npz         FID-50k and the rest

Without a reference: Frechet distance of pixels in [0, 1] (averaged to 8 x 8), precision and recall (k = 3) on the same
features, sliced Wasserstein distance of every pyramid level from 16 pixels up, and a nearest-neighbour test against
copying; with classes, how often a classifier agrees with the requested label, and the variance left inside each class.
With --ref: Frechet distance, precision, recall and KID on the reference's features (Inception: FID; DINOv2: FDD), and
the inception score, in one pass over the images. All of them depend on the number of images: compare only equal n.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import config

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python fid.py [RUN | FOLDER | NPZ] [--ref FILE] | ref --data DIR")
    PARSER.add_argument("what", nargs="?", help="run, export, .npz or folder of images [the newest run]; or: ref")
    config.add_sampling_flags(PARSER)
    PARSER.add_argument("-n", "--num", type=int, default=500, help="number of images to draw and score [500]")
    PARSER.add_argument("--ref", metavar="FILE", help="compare with this reference: of fid.py ref, ADM or pytorch-fid")
    PARSER.add_argument("--repeat", type=int, default=1, help="draw so many sets, of seeds SEED, SEED+1, ... [1]")
    PARSER.add_argument("--force", action="store_true", help="score fewer images than the features have dimensions")
    PARSER.add_argument("--extractor", help="inception, dinov2 or pixels [inception]")
    PARSER.add_argument("--extractor-file", default="", help="its TorchScript file [downloaded once, hash checked]")
    PARSER.add_argument("--trust", action="store_true", help="accept an --extractor-file with another hash")
    PARSER.add_argument("--codec", choices=("none", "jpeg"), default="none",
                        help="jpeg: both sides through JPEG of quality 75, the protocol of LFM [none]")
    PARSER.add_argument("--dataset", default="folder", choices=("folder", "celebahq", "imagenet"), help="of ref")
    PARSER.add_argument("--data", default="", help="of ref or of an export: real images, as latents.py reads")
    PARSER.add_argument("--split", default="train", help="of ref: which split, where the data have several [train]")
    PARSER.add_argument("--res", type=int, default=256, help="of ref: height and width in pixels [256]")
    PARSER.add_argument("--out", default="reference.npz", help="of ref: the file to write [reference.npz]")
    PARSER.add_argument("--record", metavar="FILE", help="append the result and how it was made to a .jsonl file")
    ARGUMENTS = PARSER.parse_args()

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import features
import gallery
import runs
import sample
import sources
from config import Config, UserError
from features import pixel_features
from pyramid import decompose
from ranks import Ranks

# ---------------------------------------------------------------------------------------------------------------------
# distances between sets of features (N, D)


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017), in float64.

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: the result
    cannot turn complex, whatever the rank.
    """
    mean_1, cov_1, mean_2, cov_2 = (np.asarray(a, np.float64) for a in (mean_1, cov_1, mean_2, cov_2))
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_2 @ root).clip(0)).sum()
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * cross)


def _distances(a: np.ndarray, b: np.ndarray) -> torch.Tensor:
    """Euclidean distances (len(a), len(b)); of few features from differences, so that equal points are at 0."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).flatten(1) for x in (a, b))
    exact = a.shape[1] <= 512                               # of many, from products: minutes, not hours
    return torch.cdist(a, b, compute_mode=f"{'donot_' if exact else ''}use_mm_for_euclid_dist")


def _coverage(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """Share of `points` that lie within the distance of a centre to its own k-th nearest other centre."""
    if len(centres) <= k or not len(points):
        raise UserError(f"precision and recall with k = {k} need more than {k} images on both sides")
    radius = torch.cat([_distances(part, centres).kthvalue(k + 1, dim=1).values     # the nearest is the centre itself
                        for part in np.array_split(centres, -(-len(centres) // 1000))])
    inside = [(_distances(part, centres) <= radius).any(dim=1)
              for part in np.array_split(points, -(-len(points) // 1000))]
    return torch.cat(inside).double().mean().item()


def precision(*, real: np.ndarray, fake: np.ndarray, k: int = 3) -> float:
    """Share of the fake features inside the k-nearest-neighbour manifold of the real (Kynkaanniemi et al. 2019)."""
    return _coverage(np.asarray(fake), np.asarray(real), k)


def recall(*, real: np.ndarray, fake: np.ndarray, k: int = 3) -> float:
    """Share of the real features inside the k-nearest-neighbour manifold of the fake (Kynkaanniemi et al. 2019)."""
    return _coverage(np.asarray(real), np.asarray(fake), k)


def kid(real: np.ndarray, fake: np.ndarray, subsets: int = 100, size: int = 1000,
        seed: int = 0) -> tuple[float, float]:
    """Kernel distance (Binkowski et al. 2018): unbiased MMD^2 with the kernel (x y / D + 1)^3, mean and standard
    deviation over random subsets of both sides. Raises UserError when a side has fewer images than a subset."""
    real, fake = (torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (real, fake))
    if min(len(real), len(fake)) < size:
        raise UserError(f"KID needs at least {size} images on both sides, not {len(real)} real and {len(fake)} others")
    random, values = np.random.default_rng(seed), []
    for _ in range(subsets):
        x, y = (side[torch.from_numpy(random.choice(len(side), size, replace=False))] for side in (fake, real))
        xx, yy, xy = (((a @ b.T) / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append((within - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values))


def inception_score(probabilities: np.ndarray, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """exp of the mean KL divergence of class probabilities (N, classes) from their mean (Salimans et al. 2016): mean
    and standard deviation over shuffled splits."""
    p = np.asarray(probabilities, np.float64)
    p = p[np.random.default_rng(seed).permutation(len(p))]
    values = []
    for part in np.array_split(p, min(splits, len(p))):
        mean = part.mean(axis=0, keepdims=True)
        ratio = np.where(part > 0, part / np.maximum(mean, 1e-300), 1.0)
        values.append(math.exp((part * np.log(ratio)).sum(axis=1).mean()))
    return float(np.mean(values)), float(np.std(values))


def sliced_wasserstein(real: np.ndarray, fake: np.ndarray, patches: int = 32, directions: int = 512,
                       seed: int = 0) -> dict[int, float]:
    """Distance of 7 x 7 patches at each pyramid level, x 1000, by the side of the level (Karras et al. 2018, App. B).

    real, fake: images uint8 (N, H, W, C), as many of both as the smaller set has. The levels are those of pyramid.py,
    from the full size down to 16 pixels; each set is normalised per channel, as there; {} below 16 pixels.
    Karras et al. take 128 patches of 16,384 images; a few hundred images leave a floor, printed as "real".
    """
    side = real.shape[1]
    num_scales = 1
    while side % 2**num_scales == 0 and side >> num_scales >= 16:
        num_scales += 1
    if side < 16:
        return {}
    count, generator = min(len(real), len(fake)), torch.Generator().manual_seed(seed)

    def descriptors(images, level):
        x = torch.from_numpy(np.ascontiguousarray(images[:count])).permute(0, 3, 1, 2).float() / 255
        band = decompose(x, num_scales)[level]                                      # (N, C, H_i, W_i)
        last = band.shape[-1] - 7
        top, left = torch.randint(0, last + 1, (2, count, patches), generator=generator)
        rows, columns = top[..., None] + torch.arange(7), left[..., None] + torch.arange(7)     # (N, patches, 7)
        picked = band[torch.arange(count)[:, None, None, None], :, rows[..., :, None], columns[..., None, :]]
        picked = picked.flatten(0, 1).permute(0, 3, 1, 2)                           # (N patches, C, 7, 7)
        picked = picked - picked.mean(dim=(0, 2, 3), keepdim=True)
        return (picked / picked.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-8)).flatten(1)

    result = {}
    for level in range(num_scales):
        a, b = descriptors(real, level), descriptors(fake, level)
        total = 0.0
        for _ in range(directions // 128):
            lines = F.normalize(torch.randn(a.shape[1], 128, generator=generator), dim=0)
            total += ((a @ lines).sort(dim=0).values - (b @ lines).sort(dim=0).values).abs().mean().item()
        result[side >> (num_scales - 1 - level)] = 1000 * total / (directions // 128)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# scores of images


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D)."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def class_scores(real: np.ndarray, real_labels: np.ndarray, fake: np.ndarray, fake_labels: np.ndarray) -> dict:
    """How often a support-vector classifier of real images agrees with the label asked for, and the mean over classes
    of the variance of the generated images over that of the real ones."""
    from sklearn.svm import SVC

    wanted = [c for c in np.unique(fake_labels) if (fake_labels == c).sum() > 1 and (real_labels == c).sum() > 1]
    variances = [(fake[fake_labels == c].var(axis=0).sum(), real[real_labels == c].var(axis=0).sum()) for c in wanted]
    ratios = [a / b for a, b in variances if b > 1e-9]      # a class of equal images has none
    scores = {"class_variance": float(np.mean(ratios))} if ratios else {}
    if len(np.unique(real_labels)) > 1:
        classifier = SVC(C=10).fit(real, real_labels)
        scores["label_agreement"] = float((classifier.predict(fake) == fake_labels).mean())
    return scores


def nearest(points: np.ndarray, others: np.ndarray, same: bool = False) -> float:
    """Median distance of a point to the nearest of the others; same=True leaves out the point itself."""
    parts = np.array_split(points, -(-len(points) // 1000))
    return torch.cat([_distances(p, others).kthvalue(2 if same else 1, dim=1).values for p in parts]).median().item()


def score(real: np.ndarray, real_labels: np.ndarray, fake: np.ndarray, fake_labels: np.ndarray | None = None) -> dict:
    """All scores of fake images against real ones; images uint8 (N, H, W, C), labels (N,) or None."""
    a, b = pixel_features(real), pixel_features(fake)
    if len(b) < 5 or len(a) < 5:
        raise UserError(f"scores need at least 5 images on both sides, not {len(a)} real and {len(b)} generated ones")
    scores = {"n": len(b), "n_reference": len(a),
              "frechet_pixel": frechet_distance(*statistics(a), *statistics(b)),
              "precision": precision(real=a, fake=b), "recall": recall(real=a, fake=b)}
    if usual := nearest(a, a, same=True):                   # 0 when most real images have an exact double
        scores["novelty"] = nearest(b, a) / usual
    for side, distance in sliced_wasserstein(real, fake).items():
        scores[f"swd_{side}"] = distance
    if fake_labels is not None:
        scores.update(class_scores(a, real_labels, b, fake_labels))
    return scores


MEANING = {
    "frechet_pixel": "Frechet distance of pixels in [0, 1], 8 x 8; lower is better",
    "precision": "share of generated images among the real ones (k = 3)",
    "recall": "share of real images among the generated ones (k = 3)",
    "novelty": "distance to the nearest real image, over that between real images; near 0 means copies",
    "class_variance": "variance inside a class, over the real one; 1 is right",
    "label_agreement": "share that a classifier of real images puts in the class asked for",
}


def evaluate(dataset: data.Dataset, images: np.ndarray, labels: np.ndarray | None, decode: Callable) -> dict:
    """Scores of generated images against the training set and, under "real", of as many real ones (at most half of
    them) against the remaining ones: what a perfect generator would get.

    decode: data x1 -> uint8 images, as the run's own: latents are compared as the autoencoder gives them back.
    """
    real, real_labels = dataset.reference(max(2 * len(images), 2000))
    real = np.concatenate([decode(part) for part in real.split(256)])
    if labels is not None:                                  # asked for some classes only: compare with those
        real, real_labels = (a[np.isin(real_labels, labels)] for a in (real, real_labels))
    scores = score(real, real_labels, images, labels)
    n = min(len(images), len(real) // 2)
    if n >= 5:
        scores["real"] = score(real[n:], real_labels[n:], real[:n], None if labels is None else real_labels[:n])
    return scores


def table(scores: dict) -> str:
    """The scores in lines for people."""
    real = scores.get("real", {})
    lines = [f"reference  {scores['n']} generated images against {scores['n_reference']} of the training set; "
             f"real: {real.get('n', 0)} of these against the others", f"{'':16s} {'this run':>9s} {'real':>9s}"]
    for name, value in scores.items():
        if name in MEANING or name.startswith("swd_"):
            text = MEANING.get(name, f"sliced Wasserstein x 1000 of the level of {name[4:]} pixels; lower is better")
            lines.append(f"{name:16s} {value:9.4f} {real.get(name, math.nan):9.4f}   {text}")
    return "\n".join(lines)


def check_record(file: str | None) -> None:
    """Raises UserError, before the work, when a result could not be appended to the file."""
    try:
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            open(file, "a").close()
    except OSError as problem:
        raise UserError(f"results cannot be appended to {file}: {problem}") from None


def commit() -> str:
    """Of this code; "-dirty" with changes."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
                         cwd=Path(__file__).parent)
    return git.stdout.strip()


def record(file: Path, cfg: Config | None, device: torch.device, scores: dict) -> None:
    """Appends one line with all that is needed to repeat a measurement; the tables of README.md are made from such."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {os.cpu_count()} cores"
    line = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "hardware": name,
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
            "config": cfg.to_dict() if cfg else None, **scores}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as stream:
            stream.write(json.dumps(line) + "\n")
    except OSError as problem:
        raise UserError(f"the result cannot be appended to {file} ({problem}): {json.dumps(scores)}") from None


def cpu_name() -> str:
    """The processor's own name where the system tells it (Linux), its architecture elsewhere."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# against a reference


MANIFOLD = 10_000                                           # images of each side for precision and recall, at most


def title(n: int) -> str:
    """50,000 -> "50k", 2,048 -> "2048": a Frechet distance is never shown without its number of images."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)


def compare(statistics: features.Statistics, reference: features.Reference, force: bool = False) -> dict:
    """Scores of the statistics of generated images against a reference.

    Raises UserError when there are fewer images than features (the covariance is singular) unless forced.
    """
    n, dim = statistics.count, len(reference.mean)
    if statistics.mean.shape != reference.mean.shape:
        raise UserError(f"the reference has {dim} features, the extractor gives {len(statistics.mean)}: they differ")
    check_enough(n, dim, force)
    name = {"inception": "fid", "dinov2": "fdd"}.get(statistics.how["extractor"].split()[0], "frechet")
    scores = {"n": n, "n_reference": reference.how.get("n"), "name": f"{name.upper()}-{title(n)}",
              name: frechet_distance(statistics.mean, statistics.cov, reference.mean, reference.cov)}
    if reference.features is not None:                      # mean and covariance alone are enough for the first
        real, fake = (side[np.random.default_rng(1).permutation(len(side))]         # folders are sorted by class
                      for side in (reference.features, statistics.all_features()))
        some = {"real": real[:MANIFOLD], "fake": fake[:MANIFOLD]}
        scores["precision"], scores["recall"] = precision(**some), recall(**some)
        scores["n_recall"] = min(MANIFOLD, n)
        scores["kid"], scores["kid_std"] = kid(real, fake, size=min(1000, len(real), len(fake)))
    if statistics.probabilities:
        scores["inception_score"], scores["inception_score_std"] = inception_score(statistics.all_probabilities())
    return scores


def statistics_of(batches: Iterable[tuple[int, np.ndarray]], extractor: Callable, how: dict, total: int,
                  ranks: Ranks) -> features.Statistics:
    """One pass over (first, images) of this process: the statistics of all of them together, in the first process."""
    result = features.Statistics(how, total)
    with tqdm(total=total, desc="features", unit="img", leave=False, disable=not ranks.first) as bar:
        for first, images in batches:
            result.add(*extractor(features.through_codec(images, how["codec"])), first=first)
            bar.update(min(len(images) * ranks.world, bar.total - bar.n))
    return result.gather(ranks)


def load_extractor(args: argparse.Namespace, name: str, ranks: Ranks) -> features.Extractor:
    """The extractor; the first process downloads what is missing before the others look for it."""
    def load():
        return features.load_extractor(name, args.extractor_file, ranks.device, args.trust)

    ranks.first_does(load)
    return load()


def make_reference(args: argparse.Namespace, ranks: Ranks) -> None:
    """python fid.py ref: statistics of real images."""
    source = sources.open_source(args.dataset, args.data, args.split)
    extractor = load_extractor(args, args.extractor or "inception", ranks)
    how = {"extractor": extractor.identity, "codec": args.codec, "res": args.res, "source": args.data,
           "crop": "ADM: box halving, bicubic, centre", "fingerprint": source.fingerprint}
    chunks = sample.chunks_of(len(source), args.batch)[ranks.rank :: ranks.world]
    read = ((chunk.start, np.stack([source.image(i, args.res) for i in chunk]).transpose(0, 2, 3, 1))
            for chunk in chunks)
    statistics = statistics_of(read, extractor, how, len(source), ranks)
    if ranks.first:
        if statistics.count <= len(statistics.mean) and not args.force:
            raise UserError(f"{statistics.count} images are too few for a reference of {len(statistics.mean)} "
                            "features; --force makes it anyway")
        features.save_reference(Path(args.out), statistics)
        print(f"reference  {args.out}: {statistics.count:,} images of {args.res} pixels, {extractor.identity[:40]}, "
              f"codec {args.codec}")


def against_reference(args: argparse.Namespace, ranks: Ranks) -> None:
    """python fid.py WHAT --ref FILE: one set of files, or --repeat sets of a run. Appends a line of results."""
    reference, what = features.load_reference(args.ref), args.what
    known = reference.how.get("extractor", "").split(" ")[0]
    if args.extractor and known and args.extractor != known:
        raise UserError(f"{args.ref} was made with {known}: it cannot be compared with {args.extractor}")
    extractor = load_extractor(args, known if known in features.EXTRACTORS else args.extractor or "inception", ranks)
    files = what is not None and Path(what).exists() and not is_run(Path(what))
    reports, rows, cfg, folder = [], [], None, Path(what or ".")
    if files:
        total, parts = gallery.open_samples(Path(what), args.batch)
        res = parts[0][1]()[0].shape[1]
        beside = folder if folder.is_dir() else folder.parent                       # where sample.py says how
        reports = [{**gallery.read_report(beside), "samples": what}]
    else:
        run = runs.load_run(what, args.raw, str(ranks.device), args.vae)
        if args.compile:
            runs.compile_blocks(run.model)
        cfg, folder, res, total = run.cfg, run.folder, run.cfg.res, args.num
        settings, labels = runs.solver_settings(cfg, args), runs.choose_labels(args.labels, args.num, run.classes)
    how = {"extractor": extractor.identity, "codec": args.codec, "res": res}
    features.check_comparable(reference, how, args.ref)
    check_enough(total, len(reference.mean), args.force)    # before any is drawn
    for repeat in range(1 if files else args.repeat):
        if files:
            drawn = ((first, read()[0]) for first, read in parts[ranks.rank :: ranks.world])
        else:
            notes, chunks = [], sample.chunks_of(args.num, args.batch)[ranks.rank :: ranks.world]
            batches = sample.batches(run, chunks, labels, args.seed + repeat, **settings)
            drawn = (notes.append(note) or (numbers.start, images) for numbers, images, note in batches)
        statistics = statistics_of(drawn, extractor, how, total, ranks)
        if not files:
            notes = [note for part in ranks.gather(notes) for note in part]
        if ranks.first:
            rows.append(compare(statistics, reference, args.force))
            if not files:
                reports.append(gallery.report_of(run, notes, args.seed + repeat, args.batch, settings))
    if not ranks.first:
        return
    print(f"samples    {what}" if files else gallery.describe(reports[-1]))
    print(f"reference  {args.ref}: {reference.how.get('n', 'an unknown number of')} images; extractor "
          f"{extractor.identity[:40]}, codec {args.codec}")
    scores = {"name": rows[0]["name"], "n": rows[0]["n"], "n_recall": rows[0].get("n_recall"), "codec": args.codec,
              "reference": {"file": Path(args.ref).name, **reference.how}, "extractor": extractor.identity,
              "sets": reports}
    for key in (key for key, value in rows[0].items() if isinstance(value, float)):
        values = [row[key] for row in rows]
        scores[key], scores[f"{key}_sets"] = float(np.mean(values)), values
        spread = f" ± {np.std(values, ddof=1):.4f} over {len(rows)} sets" if len(rows) > 1 else ""
        shown = rows[0]["name"] if key in ("fid", "fdd", "frechet") else key
        print(f"{shown:20s} {scores[key]:10.4f}{spread}")
    record(Path(args.record or "results/fid.jsonl"), cfg, ranks.device, scores)
    print(f"wrote      {args.record or 'results/fid.jsonl'}")


def check_enough(n: int, dim: int, force: bool) -> None:
    """Raises UserError for fewer images than features: the covariance would be singular."""
    if n < dim + 1 and not force:
        raise UserError(f"{n} images are too few for {dim} features: the distance would mean nothing. Draw at least "
                        f"{dim + 1} (papers: 50000), or look at it anyway with --force")


def is_run(folder: Path) -> bool:
    return any(folder.glob("step-*.pt")) or (folder / "model.safetensors").exists()


def main(args: argparse.Namespace) -> None:
    config.check_sampling_flags(args, least=5)
    check_record(args.record)
    if args.repeat < 1 or args.res < 1:
        raise UserError("--repeat and --res must be at least 1")
    if args.what == "ref" or args.ref:
        ranks = Ranks.start(args.device)
        try:
            (make_reference if args.what == "ref" else against_reference)(args, ranks)
        finally:
            ranks.stop()
    else:
        against_training_data(args)


def against_training_data(args: argparse.Namespace) -> None:
    """python fid.py [WHAT]: the scores that need no download. A folder or .npz belongs to the newest run."""
    files = args.what is not None and Path(args.what).exists() and not is_run(Path(args.what))
    run = runs.load_run(None if files else args.what, args.raw, args.device, args.vae)
    if args.compile:
        runs.compile_blocks(run.model)
    if args.data:                                           # an export does not say where its images are
        run.cfg = dataclasses.replace(run.cfg, data=args.data)
    dataset, scored = data.load(run.cfg), run.folder
    if dataset.classes != run.classes:
        raise UserError(f"the data of {run.folder} has changed: it was trained on the classes {run.classes}")
    if files:
        where = Path(args.what)
        images, labels = (np.concatenate(part) for part in zip(*gallery.read_samples(where), strict=True))
        if images.shape[1:] != run.image_shape:
            raise UserError(f"{where} holds images of shape {images.shape[1:]}; the run {run.folder} makes "
                            f"{run.image_shape}")
        labels = labels if run.classes and labels.min() >= 0 else None
        scored = where if where.is_dir() else where.parent
        report = {**gallery.read_report(scored), "samples": args.what}
        print(f"samples    {args.what}" + (f"\n{gallery.describe(report)}" if "nfe_segments" in report else ""))
    else:
        labels = runs.choose_labels(args.labels, args.num, run.classes)
        settings = runs.solver_settings(run.cfg, args)
        images, report = sample.generate(run, args.num, labels, args.seed, args.batch, **settings)
        print(gallery.describe(report))
    scores = evaluate(dataset, images, labels, run.decode)
    print(table(scores))
    (scored / "scores.json").write_text(json.dumps({**report, **scores}, indent=2))
    if args.record:
        record(Path(args.record), run.cfg, run.device, {**report, **scores})


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except UserError as problem:
        sys.exit(f"error: {problem}")
