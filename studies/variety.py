"""Where LapFlow loses the variety of its images: in which band, and before which time.

    python -m studies.variety RUN [RUN ...] [--record FILE]      runs on one data set with classes and a test split

The first row of a run scores its images. In the row "real until T_j" the bands 0..j-1 of test images stand at T_j as
training sees them, and the network goes on from there: what this row does better is lost before T_j, the rest after it.
Runs of other systems have the first row only. Columns: Frechet distance and recall in the features of a classifier of
these data, its agreement with the label, and the variance inside a class over the real one, of features, bands and
principal components of the pixels.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import config
import fid
import sample
from config import UserError
from data import batches
from extras.causal import later, noise_of
from pyramid import decompose
from run import load, log
from run.load import Run
from scores.classes import class_variance
from scores.classifier import Classifier, load_classifier
from scores.features import pixel_features
from studies.output import markdown, origin

BANDS = 3                                                   # in which the variance is counted
COMPONENTS = (slice(8), slice(8, 64), slice(64, None))      # principal components of the pixels inside a class
COLUMNS = {"frechet": 2, "label_agreement": 3, "recall": 3, "class_variance": 3, "band_variance": 3,
           "component_variance": 2}


def real_until(run: Run, j: int, x1: Tensor, y: Tensor, seed: int = 0, cfg_scale: float = 1.0,
               interval: tuple[float, float] = (0.0, 1.0), precision: str = "float32", **solver) -> Tensor:
    """Images (B, C, H, W) whose bands 0..j-1 are those of x1 (B, C, H, W) at T_j, with noise of their own; after it the
    network moves them, and the finer bands join as always."""
    schedule, model = run.schedule, sample.Guided(run.model, cfg_scale, interval, precision)
    noise = noise_of(run, seed, range(len(x1)))
    now = torch.full((len(x1),), schedule.starts[j], device=run.device)
    given, _ = schedule.interpolate(schedule.split(x1)[:j], noise[:j], now)
    bands, _ = sample.solve(lambda bands, t: model(bands, t.expand(len(x1)), y), schedule.scaled(noise)[j:],
                            later(schedule, j, given), jumps=model.jumps(y), **solver)
    return schedule.image(bands)


def scores(real: tuple, images: np.ndarray, labels: np.ndarray, judge: Classifier) -> dict:
    """The columns; real: images uint8 (N, H, W, C) and their labels."""
    bands, real_bands = ([band.flatten(1).numpy() for band in decompose(
        torch.from_numpy(side).permute(0, 3, 1, 2).float(), BANDS)] for side in (images, real[0]))
    band_variance = [class_variance(a, real[1], b, labels)["class_variance"]
                     for a, b in zip(real_bands, bands, strict=True)]
    pixels, real_pixels = (pixel_features(x, min(32, x.shape[1])) for x in (images, real[0]))
    within = np.concatenate([real_pixels[real[1] == c] - real_pixels[real[1] == c].mean(axis=0) for c in set(real[1])])
    axes = np.linalg.eigh(within.T @ within)[1][:, ::-1]                            # (D, D), the widest first
    components = [class_variance(real_pixels @ axes[:, part], real[1], pixels @ axes[:, part], labels).get(
        "class_variance", np.nan) for part in COMPONENTS]   # of 64 pixels there are no others
    judged = fid.judge(judge, *real, images, labels) | {
        "band_variance": band_variance, "component_variance": components}
    return {name: judged[name] for name in COLUMNS}


def measured(run: Run, num: int, batch: int = 200) -> Iterator[tuple[str, dict]]:
    """(name, scores) of each row, real images first."""
    dataset = batches.load(run.cfg)
    test = dataset.held_out().reference(2 * num) if dataset.classes and dataset.held_out else None
    if test is None or len(test[0]) < 2 * num:
        raise UserError(f"{run.cfg.dataset} has no classes, or no test split of {2 * num} images: variety needs both")
    images, labels = run.decode(test[0]), test[1]
    judge, real = load_classifier(dataset, run.decode, run.device), (images[num:], labels[num:])
    x1, y, labels = test[0][:num].to(run.device), torch.from_numpy(labels[:num]).to(run.device), labels[:num]
    yield "real images", scores(real, images[:num], labels, judge)
    settings, ours = load.solver_settings(run.cfg), run.cfg.method == "lapflow"
    starts = ", ".join(f"{start:.3g}" for start in run.cfg.starts[1:])
    drawn, _ = sample.generate(run, num, y.cpu(), batch=batch, **settings)
    yield run.cfg.method + f", starts {starts}" * ours, scores(real, drawn, labels, judge)
    for j in range(1, run.cfg.num_scales if ours else 1):
        parts = [run.decode(real_until(run, j, x1[i : i + batch], y[i : i + batch], seed=i, **settings))
                 for i in tqdm(range(0, num, batch), desc="sampling", leave=False)]
        yield f"... real until {run.cfg.starts[j]:.3g}", scores(real, np.concatenate(parts), labels, judge)


def table(lines: list[dict]) -> str:
    """Markdown; real images once."""
    if not lines:
        return "not measured yet"
    rows = []
    for line in lines:
        cells = [", ".join(f"{x:.{places}f}" for x in np.atleast_1d(line[key])) for key, places in COLUMNS.items()]
        if [line["row"], *cells] not in rows:
            rows.append([line["row"], *cells])
    head = ["", "FD, classifier", "agreement", "recall", "variance inside a class", "of its bands, coarse to fine",
            "of its principal components 1-8, 9-64, others"]
    return (f"{markdown(head, rows)}\n\n{lines[0]['num']} images against as many of the test split; "
            f"{origin(lines, 'hardware', 'versions')}.")


def main() -> None:
    parser = config.parser(__doc__, "python -m studies.variety RUN [RUN ...] [-n N] [--record FILE]")
    parser.add_argument("runs", nargs="+", help="run directories or exports")
    parser.add_argument("-n", "--num", type=int, default=1000, help="number of images [1000]")
    parser.add_argument("--record", metavar="FILE", help="append each row and how it was made to a .jsonl file")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    args, lines = parser.parse_args(), []
    log.check_record(args.record)
    for name in args.runs:
        run = load.load_run(name, device=args.device)
        for row, values in measured(run, args.num):
            lines.append({"what": "variety", "run": Path(name).name, "row": row, "num": args.num, **values})
            if args.record:
                log.record(args.record, run.cfg, run.device, lines[-1])
    lines = [{**log.provenance(run.device), **line} for line in lines]
    print(table(lines))


if __name__ == "__main__":
    config.run(main)
