"""What a run shows of itself: samples and scores in the midst of training and at its end, and a generation, watched."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import data
import fid
import gallery
import pictures
import runs
import sample
from config import UserError


def glance(run: runs.Run, dataset: data.Dataset) -> None:
    """In the midst of training: a grid of samples, and scores, each at its interval. What goes wrong is said."""
    cfg, matmul = run.cfg, torch.get_float32_matmul_precision()
    for what, every, num in (("grid", cfg.sample_every, 16), ("scores", cfg.eval_every, cfg.num_samples)):
        if not every or run.step % every:
            continue
        try:
            labels = runs.choose_labels("balanced", num, run.classes)
            with torch.compiler.set_stance("force_eager"):  # compiled graphs are for training's shapes
                images, report = sample.generate(run, num, labels, progress=False, **runs.solver_settings(cfg))
            if what == "grid":
                pictures.draw_grid(run.folder / f"samples-{run.step:08d}.png", images, labels, run.classes)
            else:
                with open(run.folder / "scores.jsonl", "a") as file:
                    file.write(json.dumps({**report, **fid.evaluate(dataset, images, labels, run.decode)}) + "\n")
        except (UserError, torch.OutOfMemoryError) as problem:
            print(f"no samples at step {run.step}: {problem}; training goes on", file=sys.stderr)
    torch.set_float32_matmul_precision(matmul)              # sampling sets it to full


def finish(run: runs.Run, dataset: data.Dataset) -> dict:
    """Samples, pictures and scores of a trained run."""
    num = run.cfg.num_samples
    labels = runs.choose_labels("balanced", num, run.classes)
    images, report = sample.generate(run, num, labels, **runs.solver_settings(run.cfg))
    pictures.draw_grid(run.folder / "samples.png", images, labels, run.classes)
    shown = runs.choose_labels("balanced", max(3, len(run.classes)), run.classes)
    draw_trajectory(run.folder / "trajectory.png", run, None if shown is None else shown[-3:])
    print(gallery.describe(report))
    try:
        scores = {**report, **fid.evaluate(dataset, images, labels, run.decode)}
        print(fid.table(scores))
    except UserError as problem:                            # a handful of images trains, but cannot be scored
        scores = report
        print(f"no scores  {problem}")
    (run.folder / "scores.json").write_text(json.dumps(scores, indent=2))
    return scores


def watch(run: runs.Run, labels: np.ndarray | None, seed: int = 0, count: int = 3, steps: int = 80) -> list:
    """The states of the first `count` images of a seed: [(t, bands)] at each Euler step and at t = 1."""
    schedule, _, draw_images = sample.method(run.cfg)
    y = None if labels is None else torch.as_tensor(labels[:count], device=run.device)
    states = []

    def watched(velocity, noise, schedule, **solver):
        def seen(bands, t):
            states.append((t.item(), bands))                                    # Euler calls once for each step
            return velocity(bands, t)

        bands, nfe = sample.solve(seen, noise, schedule, **solver)
        states.append((1.0, bands))
        return bands, nfe

    model, n = sample.Guided(run.model, run.cfg.cfg_scale), data.ImageRandom(seed, range(count), run.device)
    draw_images(model, n, y, schedule, run.shape, solve=watched, solver="euler", steps=steps)
    return states


def draw_trajectory(path: Path, run: runs.Run, labels: np.ndarray | None, seed: int = 0, count: int = 3) -> None:
    """Each band and their sum at several times, from noise to image, for a few images (Euler, 80 steps)."""
    states, (schedule, _, _) = watch(run, labels, seed, count), sample.method(run.cfg)
    contrast = 1 if run.facts.get("latent") is None else 0.4                    # latents: three channels, as they are

    def pixels(x):
        return data.to_uint8(contrast * x[:3]).permute(1, 2, 0).cpu().numpy()

    shown = [min(states, key=lambda state: abs(state[0] - t)) for t in np.linspace(0, 1, 9)]
    rows, names = [], []
    for image in range(count):
        parts = len(states[-1][1])                          # some systems flow whole images: no bands to show
        for i in range(parts if parts > 1 else 0):
            gain = 1 if i == 0 else 2                                           # fine bands: residuals around mid-grey
            start = schedule.segments[i][0]
            rows.append([pixels(gain * bands[i][image]) if i < len(bands) else f"from\nt = {start:.2g}"
                         for _, bands in shown])
            names.append(f"band {i}")
        rows.append([run.decode(schedule.image(bands)[image : image + 1])[0] for _, bands in shown])
        names.append("sum" if parts > 1 else f"image {image}")
    pictures.draw_images(path, rows, [], [f"t = {t:.2f}" for t, _ in shown], names)
