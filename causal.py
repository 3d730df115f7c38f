"""What only a causal pyramid can do. Coarse bands never read finer ones, so they do not depend on the finer noise:

    python sample.py --preview --num 40              thumbnails: the coarsest band alone, integrated to t = 1
    python sample.py --refine 3,17,42                the chosen ones, finished: the thumbnails are their coarse bands
    python sample.py --vary 17 --num 8               image 17 again with other details: its coarse noise, new fine noise
    python sample.py --upsample small.png --num 4    super-resolution without training: the coarse band is imposed

--bands 2 takes the two coarsest bands for all four. With a fixed-step solver the coarse bands agree to float rounding;
dopri5 chooses its steps with the fine bands in view, so there they agree to its tolerance.
"""

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import gallery
import pictures
import runs
import sample
import sources
from config import UserError
from pyramid import decompose, reconstruct, up
from schedule import Schedule, noise_bands


def draw_bands(run: runs.Run, noise: list[torch.Tensor], labels: np.ndarray | None, cfg_scale: float = 1.0,
               interval: tuple[float, float] = (0.0, 1.0), precision: str = "float32", **solver) -> tuple[list, int]:
    """Bands at t = 1 from their noise: all K of them, or a prefix. Returns them and the calls of the network."""
    schedule = Schedule(run.cfg.starts, run.cfg.path)
    model = sample.Guided(run.model, cfg_scale, interval, precision)
    y = None if labels is None else torch.as_tensor(labels, device=run.device)
    return sample.solve(lambda bands, t: model(bands, t.expand(len(noise[0])), y), noise, schedule,
                        jumps=model.jumps(y), **solver)


def noise_of(run: runs.Run, seed: int, numbers: Iterable[int]) -> list[torch.Tensor]:
    """The noise of the images with these numbers: K bands."""
    return noise_bands(data.ImageRandom(seed, numbers, run.device), run.shape, run.cfg.num_scales, run.cfg.noise)


def preview(run: runs.Run, numbers: Iterable[int], labels: np.ndarray | None, seed: int = 0, bands: int = 1,
            **settings) -> tuple[torch.Tensor, int]:
    """The coarsest bands, alone, of the images with these numbers: those that the whole images will have, up to
    rounding when the steps are fixed. Returns x1 at the small size (B, C, h, w) and the calls of the network."""
    found, nfe = draw_bands(run, noise_of(run, seed, numbers)[:bands], labels, **settings)
    return reconstruct(found), nfe


def vary(run: runs.Run, number: int, count: int, labels: np.ndarray | None, seed: int = 0, bands: int = 1,
         **settings) -> tuple[torch.Tensor, int]:
    """Variations of one image: its coarse noise, and `count` times new fine noise (that of images of another seed).

    The bands of white noise are independent of each other, so each is a fair sample. Returns x1 and the calls."""
    coarse, fine = noise_of(run, seed, [number]), noise_of(run, seed + 1, range(count))
    noise = [coarse[i].expand_as(fine[i]) if i < bands else fine[i] for i in range(len(fine))]
    found, nfe = draw_bands(run, noise, labels, **settings)
    return reconstruct(found), nfe


@dataclass(frozen=True)
class Tail:
    """The segments of a schedule in which the finest bands are generated; band 0 of it is band `first`."""

    whole: Schedule
    first: int

    @property
    def num_scales(self) -> int:
        return self.whole.num_scales - self.first

    @property
    def segments(self) -> list[tuple[float, float]]:
        return self.whole.segments[self.first :]

    def enter(self, j: int, bands: list[torch.Tensor], x0: torch.Tensor) -> list[torch.Tensor]:
        return self.whole.enter(j + self.first, bands, x0)


def upsample(run: runs.Run, small: torch.Tensor, count: int, labels: np.ndarray | None, seed: int = 0,
             cfg_scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0), precision: str = "float32",
             **solver) -> tuple[torch.Tensor, int]:
    """Images (count, C, H, W) whose coarse bands are those of `small` (C, h, w), in [-1, 1] or normalised latents.

    At time t the known bands are at alpha_i(t) x_1 + sigma(t) x_0, exactly where training saw them; the finer bands are
    integrated from their start times. Raises UserError when the size of `small` is not that of a pyramid's level.
    """
    side, schedule = run.shape[1], Schedule(run.cfg.starts, run.cfg.path)
    levels = {side >> k: schedule.num_scales - k for k in range(1, schedule.num_scales)}        # size -> known bands
    if small.shape[-1] not in levels or small.shape[-1] != small.shape[-2]:
        raise UserError(f"the coarse bands of this run are {' or '.join(map(str, sorted(levels)))} pixels wide, "
                        f"not {tuple(small.shape[-2:])}")
    known = levels[small.shape[-1]]
    x1 = decompose(small.to(run.device).expand(count, -1, -1, -1), known)
    noise = noise_of(run, seed, range(count))
    model = sample.Guided(run.model, cfg_scale, interval, precision)
    y = None if labels is None else torch.as_tensor(labels, device=run.device)

    def velocity(bands, t):
        imposed, _ = schedule.interpolate(x1, noise[:known], t.float().expand(count))
        return model(imposed + bands, t.expand(count), y)[known:]

    fine, nfe = sample.solve(velocity, noise[known:], Tail(schedule, known), jumps=model.jumps(y), **solver)
    return reconstruct(x1 + fine), nfe


# ---------------------------------------------------------------------------------------------------------------------
# the four flags of sample.py


def main(run: runs.Run, args: argparse.Namespace, out: Path) -> None:
    """Draws, writes one picture, the images and a report, and prints what was measured."""
    if run.cfg.method != "lapflow":
        raise UserError("previews, variations and their like need the bands of LapFlow: this run was trained with "
                        f"--method {run.cfg.method}")
    if run.cfg.mask == "none" and not args.upsample:
        raise UserError("previews and variations need coarse bands that do not read finer ones: this run was trained "
                        "with --mask none")
    if not args.preview and args.num > args.batch:
        raise UserError(f"these images are drawn in one batch: at most --batch {args.batch}, not {args.num}")
    if not 1 <= args.bands < max(2, run.cfg.num_scales):
        raise UserError(f"--bands must be between 1 and {run.cfg.num_scales - 1} for the {run.cfg.num_scales} bands of "
                        f"this run, not {args.bands}")
    settings = runs.solver_settings(run.cfg, args)
    runs.check_guidance(run.cfg, settings["cfg_scale"], run.classes)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"the directory {out} cannot be written: {problem}; choose another with --out") from None
    runs.full_float32()
    with torch.no_grad():
        if args.preview:
            report = show_previews(run, args, settings, out)
        elif args.refine is not None:
            report = show_refined(run, args, settings, out)
        elif args.vary is not None:
            report = show_variations(run, args, settings, out)
        else:
            report = show_upsampled(run, args, settings, out)
    report = {**report, "seed": args.seed, "bands": args.bands, **settings, "run": str(run.folder), "step": run.step,
              "weights": run.weights}
    (out / f"{report['what']}.json").write_text(json.dumps(report, indent=2))
    if args.record:
        import fid  # built on sample.py, as this file is

        fid.record(Path(args.record), run.cfg, run.device, report)


def save(file: Path, images: np.ndarray, labels: np.ndarray | None, **more) -> None:
    np.savez_compressed(file, images=images, labels=gallery.or_none(labels, len(images)), **more)


def show_previews(run: runs.Run, args: argparse.Namespace, settings: dict, out: Path) -> dict:
    labels = runs.choose_labels(args.labels, args.num, run.classes)
    images, seconds = [], 0.0
    preview(run, range(min(2, args.num)), None if labels is None else labels[:2], args.seed, args.bands, **settings)
    run.ready()                                             # warm: loading does not count
    for numbers in sample.chunks_of(args.num, args.batch):
        began = time.perf_counter()
        mine = None if labels is None else labels[numbers.start : numbers.stop]
        x1, nfe = preview(run, numbers, mine, args.seed, args.bands, **settings)
        images.append(run.decode(x1))
        seconds += time.perf_counter() - began
    few = range(min(args.num, args.batch))                  # whole images of the first batch, for the comparison
    began = time.perf_counter()
    mine = None if labels is None else labels[: len(few)]
    run.decode(reconstruct(draw_bands(run, noise_of(run, args.seed, few), mine, **settings)[0]))
    speed_up = (time.perf_counter() - began) / len(few) / (seconds / args.num)
    images = np.concatenate(images)
    save(out / "previews.npz", images, labels)
    pictures.draw_grid(out / "previews.png", images, np.arange(args.num), [str(i) for i in range(args.num)])
    print(f"previews   {args.num} thumbnails of {images.shape[1]} x {images.shape[2]}, {nfe} calls of the network, "
          f"{seconds / args.num:.4f} s each: {speed_up:.1f} times faster than whole images")
    print(f"wrote      {out}/previews.png, previews.npz; finish some with --refine 0,3,7 and the same seed and solver")
    return {"what": "preview", "num": args.num, "nfe": nfe, "seconds_per_image": seconds / args.num,
            "speed_up": speed_up}


def show_refined(run: runs.Run, args: argparse.Namespace, settings: dict, out: Path) -> dict:
    try:
        numbers = [int(text) for text in args.refine.split(",")]
    except ValueError:
        raise UserError(f"--refine takes image numbers like 3,17,42, not {args.refine!r}") from None
    if min(numbers) < 0:
        raise UserError("--refine takes image numbers from 0")
    labels = runs.choose_labels(args.labels, max(numbers) + 1, run.classes)
    labels = None if labels is None else labels[numbers]
    bands, nfe = draw_bands(run, noise_of(run, args.seed, numbers), labels, **settings)
    again, _ = preview(run, numbers, labels, args.seed, args.bands, **settings)
    gap = (reconstruct(bands[: args.bands]) - again).abs().max().item()
    images = run.decode(reconstruct(bands))
    save(out / "refined.npz", images, labels, numbers=np.array(numbers))
    pictures.draw_images(out / "refined.png", [list(run.decode(again)), list(images)], [],
                         [f"image {i}" for i in numbers], ["preview", "finished"])
    print(f"refined    images {args.refine}: {nfe} calls; their coarse bands differ from the previews by {gap:.1e}")
    print(f"wrote      {out}/refined.png, refined.npz")
    return {"what": "refine", "numbers": numbers, "nfe": nfe, "largest_difference": gap}


def show_variations(run: runs.Run, args: argparse.Namespace, settings: dict, out: Path) -> dict:
    if args.vary < 0:
        raise UserError("--vary takes the number of an image, from 0")
    labels = runs.choose_labels(args.labels, args.vary + 1, run.classes)
    labels = None if labels is None else np.full(args.num, labels[args.vary])
    x1, nfe = vary(run, args.vary, args.num, labels, args.seed, args.bands, **settings)
    one = None if labels is None else labels[:1]
    original, _ = draw_bands(run, noise_of(run, args.seed, [args.vary]), one, **settings)
    small = decompose(x1, run.cfg.num_scales - args.bands + 1)[0]
    spread, inside = small.std(dim=0, correction=0).mean().item(), x1.std(dim=0, correction=0).mean().item()
    images = run.decode(torch.cat([reconstruct(original), x1]))
    save(out / "variations.npz", images[1:], labels)
    pictures.draw_images(out / "variations.png", [list(images[:10])], [],
                         [f"image {args.vary}", *(f"{i}" for i in range(min(9, args.num)))])
    print(f"variations {args.num} of image {args.vary}, {nfe} calls: standard deviation between them {inside:.3f}, of "
          f"their averages over coarse pixels {spread:.3f}")
    print(f"wrote      {out}/variations.png, variations.npz")
    return {"what": "vary", "number": args.vary, "num": args.num, "nfe": nfe, "std": inside, "std_coarse": spread}


def show_upsampled(run: runs.Run, args: argparse.Namespace, settings: dict, out: Path) -> dict:
    factor, latent = 2 ** (run.cfg.num_scales - args.bands), run.facts.get("latent")
    if run.cfg.num_scales == 1:
        raise UserError("a run with one band has nothing finer to generate")
    pixels = sources.read_image(Path(args.upsample), run.cfg.res // factor, args.upsample)      # (3, r, r)
    pixels = pixels if latent or run.shape[0] == 3 else np.rint(pixels.mean(axis=0, keepdims=True)).astype(np.uint8)
    x = torch.tensor(pixels, device=run.device)[None].float() / 127.5 - 1
    if latent:          # an approximation: the coarse band is the average of a latent, not the latent of the average
        auto = run.autoencoder
        small = ((auto.moments(x).chunk(2, dim=1)[0] - auto.shift) * auto.scale)[0]
    else:
        small = x[0]
    labels = runs.choose_labels(args.labels, args.num, run.classes)
    x1, nfe = upsample(run, small, args.num, labels, args.seed, **settings)
    images = run.decode(x1)
    cubic = torch.nn.functional.interpolate(x, scale_factor=factor, mode="bicubic", align_corners=False)
    back = torch.from_numpy(images).permute(0, 3, 1, 2).float().to(x.device) / 127.5 - 1
    errors = {}
    for name, large in (("ours", back), ("bicubic", cubic.clamp(-1, 1))):
        again = decompose(large, run.cfg.num_scales - args.bands + 1)[0]
        errors[name] = 127.5 * (again - x).square().mean().sqrt().item()
    blocks = x
    for _ in range(run.cfg.num_scales - args.bands):
        blocks = up(blocks)
    shown = [data.to_images(blocks)[0], data.to_images(cubic.clamp(-1, 1))[0], *images[:8]]
    save(out / "upsampled.npz", images, labels)
    pictures.draw_images(out / "upsampled.png", [shown], [], ["input", "bicubic", *map(str, range(len(shown) - 2))])
    print(f"upsampled  {args.upsample}: {x.shape[-1]} -> {run.cfg.res} pixels, {args.num} images, {nfe} calls")
    print(f"fidelity   averaged down again they differ from the input by {errors['ours']:.2f} of 255 (root mean "
          f"square); bicubic by {errors['bicubic']:.2f}")
    print(f"wrote      {out}/upsampled.png, upsampled.npz")
    return {"what": "upsample", "image": args.upsample, "num": args.num, "nfe": nfe, "rms_of_input": errors["ours"],
            "rms_of_input_bicubic": errors["bicubic"]}
