"""Speed, measured. Every line of a table is a real run of the code that users run, on this machine.

    python bench.py train --preset celebahq-256 --record results/bench.jsonl
    torchrun --nproc_per_node=8 bench.py train --preset celebahq-1024 --steps 200
    python bench.py fid --record results/bench.jsonl

train: the preset's own training loop (its batch, precision, compilation, cache) on random latents of its real shapes;
from its metrics, over the second half, the medians of images per second and share of the peak, and the peak of memory.

fid: statistics of 50,000 x 2,048 random features, as of FID-50k, added up in batches, and the Frechet distance of two
such sets; without the network, which is the larger part of an evaluation.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import config

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python bench.py train|fid [--preset NAME] [--setting VALUE ...] [--record FILE]")
    PARSER.add_argument("what", choices=("train", "fid"))
    config.add_config_flags(PARSER)
    PARSER.add_argument("--record", metavar="FILE", help="append the result and how it was made to a .jsonl file")
    PARSER.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    ARGUMENTS = vars(PARSER.parse_args())

import numpy as np
import torch

import data
import features
import fid
import plan
import runs
import train
from config import Config, UserError
from ranks import Ranks


def random_cache(folder: Path, cfg: Config, count: int = 1024) -> data.Latents:
    """A latent cache of noise in the real shapes, read by the real code."""
    channels, classes, side, _ = plan.shapes(cfg)
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    moments = generator.standard_normal((count, 2, 2 * channels, side, side), np.float32).astype(np.float16)
    moments[:, :, channels:] = np.abs(moments[:, :, channels:]) * 0.1
    moments.tofile(folder / "moments.f16")
    np.save(folder / "labels.npy", generator.integers(0, max(1, classes), count))
    vae = {"name": cfg.vae, "sha256": "", "shift": [0.0] * channels, "scale": [1.0] * channels}
    dataset = data.Latents(folder, {"count": count, "channels": channels, "side": side, "vae": vae,
                                    "fingerprint": "random", "classes": [str(i) for i in range(classes)]}, cfg.flip)
    dataset.latent = None                                   # nothing will be decoded
    return dataset


def bench_train(cfg: Config, ranks: Ranks, folder: Path) -> dict:
    """Trains cfg.steps steps into `folder` and summarises its metrics. Images per second are of all processes."""
    dataset = random_cache(folder / f"cache-{ranks.rank}", cfg) if cfg.space == "latent" else data.load(cfg)
    run, _, _ = train.train(cfg, True, ranks, None, float("inf"), dataset)
    written = (run.folder / "metrics.jsonl").read_text().splitlines() if ranks.first else []
    lines = [json.loads(line) for line in written]
    later = lines[len(lines) // 2 :]                        # compilation and warm-up are over

    def median(key):
        values = [line[key] for line in later if line[key] is not None]
        return statistics.median(values) if values else None

    return {"row": config.find_row(cfg), "processes": ranks.world, "images_per_second": median("images_per_second"),
            "mfu": median("mfu"), "memory_gb": median("memory_gb"), "data_wait": median("data_wait"),
            "seconds_first_line": cfg.log_every * cfg.batch / lines[0]["images_per_second"] if lines else None,
            "parameters": run.model.count_parameters(), "batch": cfg.batch}


def bench_fid(count: int = 50_000, dim: int = 2048, batch: int = 250) -> dict:
    """Seconds and peak memory of what fid.py does with the features of `count` images."""
    generator, made, began = np.random.default_rng(0), [], time.perf_counter()
    for scale in (1.0, 1.1):
        statistics = features.Statistics({}, count)
        for _ in range(count // batch):
            drawing = time.perf_counter()
            drawn = scale * generator.standard_normal((batch, dim), np.float32)
            began += time.perf_counter() - drawing          # making them up does not count
            statistics.add(drawn)
        made.append((statistics.mean, statistics.cov))
    added = time.perf_counter()
    distance = fid.frechet_distance(*made[0], *made[1])
    return {"images": count, "features": dim, "seconds_statistics_of_one": (added - began) / 2,
            "seconds_distance": time.perf_counter() - added, "frechet": distance,
            "memory_gb": runs.peak_memory(torch.device("cpu"))}


def main(arguments: dict) -> None:
    record, device, what = arguments.pop("record"), arguments.pop("device"), arguments.pop("what")
    fid.check_record(record)
    if what == "fid":
        return show(bench_fid(), record, Config(), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        given = {"steps": 200, "log_every": 10, "save_every": 10**9, "keep": 1, "sample_every": 0, "logger": ""}
        cfg = config.resolve({**given, **arguments, "out": str(Path(folder) / "run")})
        ranks = Ranks.start(device)
        try:
            result = bench_train(cfg, ranks, Path(folder))
        finally:
            ranks.stop()
        if not ranks.first:
            return
        show(result, record, cfg, ranks.device)


def show(result: dict, record: str | None, cfg: Config, device) -> None:
    for name, value in result.items():
        print(f"{name:26s} {'unknown' if value is None else value}")
    if record:
        fid.record(Path(record), cfg, device, result)


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except UserError as problem:
        sys.exit(f"error: {problem}")
