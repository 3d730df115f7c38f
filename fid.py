"""Scores: how close generated images are to real ones, with measures that need no download.

    python fid.py                            500 images of the newest run against its own training data
    python fid.py --num 1000 --cfg 1.5       another number, with guidance
    python fid.py --samples DIR/samples.npz  images that sample.py wrote

Frechet distance of pixels in [0, 1] (averaged to 8 x 8), precision and recall (k = 3) on the same features, sliced
Wasserstein distance of every pyramid level from 16 pixels up, and a nearest-neighbour test against copying. With
classes: how often a classifier agrees with the requested label, and the variance left inside each class.
All of them depend on the number of images: compare only equal n.
"""

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import config

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python fid.py [--run DIR] [--num N] [options]")
    config.add_sampling_flags(PARSER)
    PARSER.add_argument("--num", type=int, default=500, help="number of images to draw and score [500]")
    PARSER.add_argument("--samples", help="score this samples.npz in place of drawing images")
    PARSER.add_argument("--record", metavar="FILE", help="append the result and how it was made to a .jsonl file")
    ARGUMENTS = PARSER.parse_args()

import numpy as np
import torch
import torch.nn.functional as F

import data
import runs
import sample
from config import UserError
from pyramid import decompose

# ---------------------------------------------------------------------------------------------------------------------
# distances between sets of features (N, D)


def frechet_distance(mean_1, cov_1, mean_2, cov_2) -> float:
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
    """Euclidean distances (len(a), len(b)), from differences and not from products: equal points are at 0."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).flatten(1) for x in (a, b))
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _coverage(points, centres, k: int) -> float:
    """Share of `points` that lie within the distance of a centre to its own k-th nearest other centre."""
    if len(centres) <= k or not len(points):
        raise UserError(f"precision and recall with k = {k} need more than {k} images on both sides")
    radius = torch.cat([_distances(part, centres).kthvalue(k + 1, dim=1).values     # the nearest is the centre itself
                        for part in np.array_split(centres, -(-len(centres) // 1000))])
    inside = [(_distances(part, centres) <= radius).any(dim=1)
              for part in np.array_split(points, -(-len(points) // 1000))]
    return torch.cat(inside).double().mean().item()


def precision(*, real, fake, k: int = 3) -> float:
    """Share of the fake features inside the k-nearest-neighbour manifold of the real (Kynkaanniemi et al. 2019)."""
    return _coverage(np.asarray(fake), np.asarray(real), k)


def recall(*, real, fake, k: int = 3) -> float:
    """Share of the real features inside the k-nearest-neighbour manifold of the fake (Kynkaanniemi et al. 2019)."""
    return _coverage(np.asarray(real), np.asarray(fake), k)


def sliced_wasserstein(real, fake, patches: int = 32, directions: int = 512, seed: int = 0) -> dict[int, float]:
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


def pixel_features(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) -> (N, 64 C): pixels in [0, 1], averaged to 8 x 8."""
    parts = [torch.tensor(images[i : i + 64]).permute(0, 3, 1, 2).double() / 255 for i in range(0, len(images), 64)]
    return torch.cat([F.adaptive_avg_pool2d(x, 8).flatten(1) for x in parts]).numpy()


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D)."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def class_scores(real, real_labels, fake, fake_labels) -> dict:
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


def nearest(points, others, same: bool = False) -> float:
    """Median distance of a point to the nearest of the others; same=True leaves out the point itself."""
    parts = np.array_split(points, -(-len(points) // 1000))
    return torch.cat([_distances(p, others).kthvalue(2 if same else 1, dim=1).values for p in parts]).median().item()


def score(real, real_labels, fake, fake_labels=None) -> dict:
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


def evaluate(dataset, images: np.ndarray, labels: np.ndarray | None, decode) -> dict:
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


def read_samples(file: str, shape: tuple) -> tuple[np.ndarray, np.ndarray]:
    """`images` and `labels` of a samples.npz. Raises UserError when it is not one, or of another shape than the run."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (OSError, KeyError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as problem:
        raise UserError(f"{file} is no samples.npz of sample.py: {problem}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape or labels.shape != (len(images),):
        raise UserError(f"{file} holds images of shape {images.shape} {images.dtype}; this run makes {shape} uint8")
    return images, labels


def check_record(file: str | None) -> None:
    """Raises UserError, before the work, when a result could not be appended to the file."""
    try:
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            open(file, "a").close()
    except OSError as problem:
        raise UserError(f"results cannot be appended to {file}: {problem}") from None


def record(file: Path, cfg: config.Config, device: torch.device, scores: dict) -> None:
    """Appends one line with all that is needed to repeat a measurement; the tables of README.md are made from such."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
                         cwd=Path(__file__).parent)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {os.cpu_count()} cores"
    line = {"date": time.strftime("%Y-%m-%d"), "commit": git.stdout.strip(), "hardware": name,
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
            "config": cfg.to_dict(), **scores}
    with open(file, "a") as stream:
        stream.write(json.dumps(line) + "\n")


def cpu_name() -> str:
    """The processor's own name where the system tells it (Linux), its architecture elsewhere."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def main(args) -> None:
    config.check_sampling_flags(args, least=5)
    check_record(args.record)
    run = runs.load_run(args.run, args.raw, args.device, args.vae)
    dataset, scored = data.load(run.cfg), run.folder
    if dataset.classes != run.classes:
        raise UserError(f"the data of {run.folder} has changed: it was trained on the classes {run.classes}")
    if args.samples:
        images, labels = read_samples(args.samples, (*run.shape[1:], run.shape[0]))
        labels, scored = (labels if run.classes else None), Path(args.samples).parent
        beside = scored / "report.json"                     # how sample.py made them
        report = {**(json.loads(beside.read_text()) if beside.exists() else {}), "samples": args.samples}
        print(f"samples    {args.samples}" + (f"\n{sample.describe(report)}" if "solver" in report else ""))
    else:
        labels = sample.choose_labels(args.labels, args.num, run.classes)
        settings = sample.solver_settings(run.cfg, args)
        images, report = sample.generate(run, args.num, labels, args.seed, args.batch, **settings)
        print(sample.describe(report))
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
