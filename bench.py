"""Speed, measured. Every line of a table is a real run of the code that users run, on this machine.

    python bench.py train --preset celebahq-256 --record results/bench.jsonl
    torchrun --nproc_per_node=8 bench.py train --preset celebahq-1024 --steps 200

train: the preset's own training loop (its batch, precision, compilation, cache) on random latents of its real shapes;
from its metrics, over the second half, the medians of images per second and share of the peak, and the peak of memory.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import config

if __name__ == "__main__":                                  # before torch is loaded: --help answers at once
    PARSER = config.parser(__doc__, "python bench.py train --preset NAME [--setting VALUE ...] [--record FILE]")
    PARSER.add_argument("what", choices=("train",))
    config.add_config_flags(PARSER)
    PARSER.add_argument("--record", metavar="FILE", help="append the result and how it was made to a .jsonl file")
    PARSER.add_argument("--device", help="cpu, cuda, cuda:1, mps [the best there is]")
    ARGUMENTS = vars(PARSER.parse_args())

import numpy as np

import data
import fid
import plan
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


def main(arguments: dict) -> None:
    record, device = arguments.pop("record"), arguments.pop("device")
    arguments.pop("what")
    fid.check_record(record)
    with tempfile.TemporaryDirectory() as folder:
        given = {"steps": 200, "log_every": 10, "save_every": 10**9, "keep": 1, "sample_every": 0, "log": ""}
        cfg = config.resolve({**given, **arguments, "out": str(Path(folder) / "run")})
        ranks = Ranks.start(device)
        try:
            result = bench_train(cfg, ranks, Path(folder))
        finally:
            ranks.stop()
        if not ranks.first:
            return
        for name, value in result.items():
            print(f"{name:20s} {'unknown' if value is None else value}")
        if record:
            fid.record(Path(record), cfg, ranks.device, result)


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except UserError as problem:
        sys.exit(f"error: {problem}")
