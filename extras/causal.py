"""What only a causal pyramid can do. Coarse bands never read finer ones, so they do not depend on the finer noise:

    python -m extras.causal preview -n 40                thumbnails: the coarsest band alone, integrated to t = 1
    python -m extras.causal refine --numbers 3,17,42     finishes these: the thumbnails are their coarse bands
    python -m extras.causal vary --number 17 -n 8        image 17 with its coarse noise and new fine noise
    python -m extras.causal upsample --image small.png   super-resolution without training: the coarse band is given

Each takes a RUN (the newest by default) and the flags of sample.py. Previews and images agree to float rounding when
the steps are fixed, and to its tolerance with dopri5, which sees the fine bands too.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import config
import sample
from config import UserError
from data import sources
from data.batches import ImageRandom, to_images
from data.conditions import check_guidance, choose
from pyramid import decompose
from run import gallery, graphs, load, log, pictures, solver
from run.load import Run
from schedule import Schedule


def later(schedule: Schedule, first: int, given: Sequence = ()) -> SimpleNamespace:
    """The segments from `first` on, for `sample.solve`. Bands 0..first-1 stand at T_first as `given`, or stay out."""
    return SimpleNamespace(num_scales=schedule.num_scales - first, segments=schedule.segments[first:],
                           enter=lambda j, bands, x0: schedule.enter(j + first, bands or list(given), x0))


def draw_bands(run: Run, noise: list[Tensor], y: Tensor | None, cfg_scale: float = 1.0,
               interval: tuple[float, float] = (0.0, 1.0), precision: str = "float32", known: tuple | list = (),
               **solver) -> tuple[list[Tensor], int]:
    """Bands at t = 1 from their noise: all K of them, or a prefix. Returns them and the number of network calls.

    known: the coarsest bands of x_1, when they are given: at time t they are at alpha_i(t) x_1 + sigma(t) x_0, exactly
    where training saw them, whatever --noise-scale the others start from."""
    model, y = sample.Guided(run.model, cfg_scale, interval, precision), None if y is None else y.to(run.device)
    schedule, first, count = run.schedule, len(known), len(noise[0])

    def velocity(bands, t):
        imposed, _ = schedule.interpolate(known, noise[:first], t.float().expand(count))
        return model(imposed + bands, t.expand(count), y)[first:]

    fine, nfe = sample.solve(velocity, schedule.scaled(noise)[first:], later(schedule, first), jumps=model.jumps(y),
                             **solver)
    return [*known, *fine], nfe


def noise_of(run: Run, seed: int, numbers: Iterable[int]) -> list[Tensor]:
    """K bands of the noise of the images with these numbers."""
    return run.schedule.draw_noise(ImageRandom(seed, numbers, run.device), run.shape)


def preview(run: Run, numbers: Iterable[int], y: Tensor | None, seed: int = 0, bands: int = 1,
            **settings) -> tuple[Tensor, int]:
    """The coarsest bands of the images with these numbers: x1 at the small size (B, C, h, w), and NFE."""
    coarse, nfe = draw_bands(run, noise_of(run, seed, numbers)[:bands], y, **settings)
    return run.schedule.image(coarse), nfe


def thumbnails(run: Run, num: int, y: Tensor | None, seed: int = 0, batch: int = 250,
               **settings) -> tuple[np.ndarray, int]:
    """Previews of the images 0..num-1 of a seed: uint8 (num, r, r, C), and NFE. y: of all images."""
    check_run(run)
    check_guidance(run.condition, run.cfg.label_drop, settings["cfg_scale"])
    parts = [preview(run, part, None if y is None else y[part.start : part.stop], seed, **settings)
             for part in sources.chunks_of(num, batch)]
    return np.concatenate([run.decode(x1) for x1, _ in parts]), parts[0][1]


def vary(run: Run, number: int, count: int, y: Tensor | None, seed: int = 0, bands: int = 1,
         **settings) -> tuple[Tensor, int]:
    """Variations of one image: its coarse noise, and `count` times the fine noise of another seed. Returns x1 and NFE.

    Each is a fair sample only where the bands of white noise are independent."""
    if run.schedule.noise == "pyramid" and run.schedule.pyramid != "haar":
        raise UserError("the bands of white noise are independent for the Haar pyramid only, so fine noise cannot be "
                        f"exchanged: this run was trained with --pyramid {run.schedule.pyramid}")
    coarse, fine = noise_of(run, seed, [number]), noise_of(run, seed + 1, range(count))
    noise = [coarse[i].expand_as(fine[i]) if i < bands else fine[i] for i in range(len(fine))]
    x1, nfe = draw_bands(run, noise, y, **settings)
    return run.schedule.image(x1), nfe


def upsample(run: Run, small: Tensor, count: int, y: Tensor | None, seed: int = 0, **settings) -> tuple[Tensor, int]:
    """Images (count, C, H, W) whose coarse bands are those of `small` (C, h, w), in [-1, 1] or normalised latents."""
    levels = {run.shape[1] >> k: run.cfg.num_scales - k for k in range(1, run.cfg.num_scales)}  # size -> known bands
    if small.shape[-1] not in levels or small.shape[-1] != small.shape[-2]:
        raise UserError(f"the coarse bands of this run are {' or '.join(map(str, sorted(levels)))} pixels wide, "
                        f"not {tuple(small.shape[-2:])}")
    x1 = small.to(run.device).expand(count, -1, -1, -1)
    known = decompose(x1, levels[small.shape[-1]], run.schedule.pyramid)
    bands, nfe = draw_bands(run, noise_of(run, seed, range(count)), y, known=known, **settings)
    return run.schedule.image(bands), nfe


def upsample_picture(run: Run, small: np.ndarray, count: int, y: Tensor | None, seed: int = 0,
                     **settings) -> tuple[np.ndarray, dict]:
    """The same for pixels, uint8 (3, r, r). Returns images uint8 (2 + count, R, R, C), the first two the input in
    blocks and bicubic, and a report: NFE, and how far the images are from the input when averaged down again."""
    finer, latent = (run.cfg.res // small.shape[-1]).bit_length() - 1, run.facts.get("latent")
    small = small if latent or run.shape[0] == 3 else np.rint(small.mean(axis=0, keepdims=True)).astype(np.uint8)
    x = torch.tensor(small, device=run.device)[None].float() / 127.5 - 1
    auto = run.autoencoder if latent else None          # an approximation: averages of latents, not latents of averages
    coarse = ((auto.moments(x).chunk(2, dim=1)[0] - auto.shift) * auto.scale)[0] if latent else x[0]
    x1, nfe = upsample(run, coarse, count, y, seed, **settings)
    images, blocks = run.decode(x1), x.repeat_interleave(2**finer, dim=2).repeat_interleave(2**finer, dim=3)
    cubic = torch.nn.functional.interpolate(x, scale_factor=2**finer, mode="bicubic").clamp(-1, 1)
    drawn = torch.from_numpy(images).permute(0, 3, 1, 2).float().to(x.device) / 127.5 - 1
    error, error_bicubic = (127.5 * (decompose(large, finer + 1, run.schedule.pyramid)[0] - x).square().mean().sqrt()
                            .item() for large in (drawn, cubic))
    return np.concatenate([to_images(blocks), to_images(cubic), images]), {
        "nfe": nfe, "rms_of_input": error, "rms_of_input_bicubic": error_bicubic}


# ---------------------------------------------------------------------------------------------------------------------
# the commands: each returns images uint8 (B, H, W, C), the arguments of pictures.draw_images, and a text


def show_previews(run: Run, args: argparse.Namespace, y: Tensor | None, settings: dict) -> tuple:
    images, nfe = thumbnails(run, args.num, y, args.seed, args.batch, bands=args.bands, **settings)
    starts = range(0, min(args.num, 100), 10)
    picture = [list(images[i : i + 10]) for i in starts], [[str(i + k) for k in range(10)] for i in starts]
    return images, picture, (
        f"previews   {args.num} thumbnails of {images.shape[1]} x {images.shape[2]}, {nfe} calls of the network")


def show_refined(run: Run, args: argparse.Namespace, y: Tensor | None, settings: dict) -> tuple:
    bands, nfe = draw_bands(run, noise_of(run, args.seed, args.numbers), y, **settings)
    again, _ = preview(run, args.numbers, y, args.seed, args.bands, **settings)
    gap = (run.schedule.image(bands[: args.bands]) - again).abs().max().item()
    images, titles = run.decode(run.schedule.image(bands)), [f"image {i}" for i in args.numbers]
    picture = [list(run.decode(again)), list(images)], [], titles, ["preview", "finished"]
    return images, picture, (
        f"refined    {', '.join(titles)}: {nfe} calls; their coarse bands differ from the previews by {gap:.1e}")


def show_variations(run: Run, args: argparse.Namespace, y: Tensor | None, settings: dict) -> tuple:
    number = args.numbers[0]
    x1, nfe = vary(run, number, args.num, y, args.seed, args.bands, **settings)
    bands, _ = draw_bands(run, noise_of(run, args.seed, [number]), None if y is None else y[:1], **settings)
    small = decompose(x1, run.cfg.num_scales - args.bands + 1, run.schedule.pyramid)[0]
    std, std_coarse = (x.std(dim=0, correction=0).mean().item() for x in (x1, small))
    images, original = run.decode(x1), run.decode(run.schedule.image(bands))
    picture = [[*original, *images[:9]]], [], [f"image {number}", *map(str, range(args.num))][:10]
    return images, picture, (
        f"variations {args.num} of image {number}, {nfe} calls: standard deviation between them {std:.3f}, of their "
        f"averages over coarse pixels {std_coarse:.3f}")


def show_upsampled(run: Run, args: argparse.Namespace, y: Tensor | None, settings: dict) -> tuple:
    small = sources.read_image(Path(args.image), run.cfg.res >> (run.cfg.num_scales - args.bands), args.image)
    images, report = upsample_picture(run, small, args.num, y, args.seed, **settings)
    return images[2:], ([list(images[:10])], [], ["input", "bicubic", *map(str, range(args.num))][:10]), (
        f"upsampled  {args.image}: {small.shape[-1]} -> {run.cfg.res} pixels, {args.num} images, {report['nfe']} "
        "calls\n"
        f"fidelity   averaged down again, off by {report['rms_of_input']:.2f} of 255 (root mean square); bicubic "
        f"{report['rms_of_input_bicubic']:.2f}")


COMMANDS = {"preview": (show_previews, "previews", 40), "refine": (show_refined, "refined", 0),  # and default --num
            "vary": (show_variations, "variations", 8), "upsample": (show_upsampled, "upsampled", 4)}


def image_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def check_run(run: Run, causal: bool = True) -> None:
    """Raises UserError for a run without coarse bands of their own; causal=False: where they may read finer ones."""
    for wrong, problem in (
            (run.cfg.method != "lapflow", f"this run was trained with --method {run.cfg.method}, not lapflow"),
            (run.cfg.mask not in ("causal", "self") and causal,
             f"this run was trained with --mask {run.cfg.mask}: its coarse bands read finer ones"),
            (run.cfg.num_scales == 1, "this run has one band: nothing is coarser or finer")):
        if wrong:
            raise UserError(problem)


def check(run: Run, args: argparse.Namespace) -> None:
    config.check_sampling_flags(args, least=1)
    check_run(run, causal=args.command != "upsample")
    for wrong, problem in (
            (not 1 <= args.bands < run.cfg.num_scales,
             f"--bands must be at least 1 and below {run.cfg.num_scales}, not {args.bands}"),
            (args.command != "preview" and args.num > args.batch,
             f"these images are drawn in one batch: at most --batch {args.batch}, not {args.num}"),
            (not all(0 <= n < 10**7 for n in args.numbers), "images are numbered from 0 to 9,999,999"),
            (args.command == "vary" and len(args.numbers) > 1, "vary takes the --number of one image")):
        if wrong:
            raise UserError(problem)


def draw(args: argparse.Namespace) -> None:
    args.num = len(args.numbers) if args.command == "refine" else args.num
    args.numbers = args.numbers if "numbers" in args else list(range(args.num))
    run = load.load_run(args.run, args.raw, args.device, args.vae, args.noise_scale)
    check(run, args)
    settings = solver.solver_settings(run.cfg, args)
    check_guidance(run.condition, run.cfg.label_drop, settings["cfg_scale"])
    settings = graphs.speed_up(run, settings, args.graphs, args.compile)
    y = choose(run.condition, max(args.numbers) + 1, args.labels, args.vectors)
    y = None if y is None else y[args.numbers * args.num if args.command == "vary" else args.numbers]
    out = gallery.folder_of(run, args)
    show, name, _ = COMMANDS[args.command]
    log.check_record(out / f"{name}.png")                   # makes the directory
    with torch.no_grad():
        images, picture, text = show(run, args, y, settings)
    np.savez_compressed(out / f"{name}.npz", images=images, **gallery.arrays_of(y, len(images)))
    pictures.draw_images(out / f"{name}.png", *picture)
    print(f"{text}\nwrote      {out}/{name}.png, {name}.npz")


def main() -> None:
    parser = config.parser(__doc__, "python -m extras.causal preview|refine|vary|upsample [RUN] [options]")
    commands = parser.add_subparsers(dest="command", required=True, prog="python -m extras.causal")
    for command, (_, _, num) in COMMANDS.items():
        flags = commands.add_parser(command, usage=f"python -m extras.causal {command} [RUN] [options]",
                                    allow_abbrev=False)
        flags.add_argument("run", nargs="?", help="run directory, export, or OWNER/NAME on the hub [newest in out/]")
        if command in ("refine", "vary"):
            flags.add_argument("--numbers" if command == "refine" else "--number", dest="numbers", type=image_numbers,
                               required=True, metavar="I,J,..", help="which images of the seed")
        if command == "upsample":
            flags.add_argument("--image", required=True, metavar="FILE", help="the small picture")
        if num:
            flags.add_argument("-n", "--num", type=int, default=num, help=f"number of images [{num}]")
        flags.add_argument("--bands", type=int, default=1, help="number of coarse bands, previewed or given [1]")
        flags.add_argument("--out", help="directory to write [RUN/samples]")
        config.add_sampling_flags(flags)
    draw(parser.parse_args())


if __name__ == "__main__":
    config.run(main)
