"""The five small steps of the idea, one picture each: pyramid, schedule, mask, training, sampling.

Every pixel and every number in them is computed by the files of the method when the picture is drawn.
"""

from pathlib import Path

import numpy as np
import torch

import sample
from data import batches
from data.conditions import choose
from docs.hero import GAIN, crops
from docs.sheet import SMALL, TEXT, TITLE, WIDTH, arrow, box, plot, save, say, sheet, tile
from extras import causal
from model import MoTDiT, attention
from pyramid import decompose, down, reconstruct
from run.load import Run
from run.pictures import COARSE, FAINT, FINE, INK, QUIET, band_colour, band_name, plain_ticks
from schedule import Schedule, loss

CONDITION = "#9a9a9a"                                       # time and label: no band


def step1(path: Path) -> None:
    """An image averaged down, the bands, and their sums: the same levels again. All at their true relative sizes."""
    x, zoom, centres, colors = crops(128)[-1:], 1.25, (240, 450, 730), [band_colour(i, 3) for i in range(3)]
    bands, levels = decompose(x, 3), [down(down(x)), down(x), x]
    sums = [reconstruct(bands[: i + 1]) for i in range(3)]
    figure, axis = sheet(622)
    rows = ((104, levels, "averages", "D: the mean\nof 2 × 2 pixels"),
            (292, bands, "bands", "what the next\ncoarser level\ncannot show"),
            (514, sums, "sums", "U: each pixel\nbecomes 2 × 2"))
    for middle, images, name, meaning in rows:
        say(axis, 24, middle - 26, name, size=TITLE, ha="left", weight="bold")
        say(axis, 24, middle - 12, meaning, size=SMALL, color=QUIET, ha="left", va="top", linespacing=1.4)
        for i, image in enumerate(images):
            side = image.shape[-1] * zoom
            tile(axis, centres[i] - side / 2, middle - side / 2, side, image[0], colors[i] if images is bands else None,
                 GAIN if images is bands and i else 1)
    half = [level.shape[-1] * zoom / 2 + 8 for level in levels]
    for i in (1, 2):
        ends = (centres[i - 1] + half[i - 1], centres[i] - half[i])
        for middle, (begin, end), text in ((104, ends[::-1], "D"), (514, ends, f"U, + band {i}")):
            arrow(axis, (begin, middle), (end, middle))
            say(axis, sum(ends) / 2, middle - 12, text, size=SMALL, color=QUIET)
    formulas = ("band 0 = D D x", "band 1 = D x − U D D x", "band 2 = x − U D x")
    for i, band in enumerate(bands):
        facts = f"{band.shape[-1]} × {band.shape[-2]}, std {band.std():.2f}"
        say(axis, centres[i], 304 + half[i], f"{formulas[i]}\n{facts}", color=colors[i], linespacing=1.4)
    for i, (got, level) in enumerate(zip(sums, levels, strict=True)):
        say(axis, centres[i], 520 + half[i], f"largest error {(got - level).abs().max():.1g}", size=SMALL, color=QUIET)
    say(axis, 730, 12, f"x: a real crop, {x.shape[-1]} × {x.shape[-2]}", size=SMALL, color=QUIET)
    save(figure, path)


def coefficients(figure, x: float, num_scales: int) -> None:
    """alpha of each band and the shared sigma against t, labelled where they are."""
    schedule = Schedule(tuple(i / num_scales for i in range(num_scales)))
    axis = plot(figure, x, 34, 340, 170, xlim=(0, 1), ylim=(0, 1.04), xticks=(*schedule.starts, 1), yticks=(0, 0.5, 1),
                xticklabels=["0", *(f"$T_{i}$ = {schedule.starts[i]:.2g}" for i in range(1, num_scales)), "1"])
    axis.set_title(f"K = {num_scales}, linear path", fontsize=TEXT, pad=8)
    axis.text(1.025, 0, "t", va="center")
    for i, start in enumerate(schedule.starts):
        t = np.linspace(start, 1, 101)
        color = band_colour(i, num_scales)
        axis.plot(t, schedule.coefficients(i, t)[0], color=color, linewidth=2)
        axis.axvline(start, color=color, linewidth=0.8, linestyle=":")
        axis.text(start + 0.24 * (1 - start), 0.19, f"$\\alpha_{i}$", color=color, va="top", fontsize=11)
    t = np.linspace(0, 1, 101)
    axis.plot(t, schedule.coefficients(0, t)[1], color=INK, linewidth=1.6, linestyle="--")
    axis.text(0.1, 0.95, r"$\sigma$, shared", color=INK, fontsize=10)


def step2(path: Path) -> None:
    """The schedule of two and of three bands; below, the bands of one image at a few times."""
    figure, axis = sheet(700)
    coefficients(figure, 60, 2)
    coefficients(figure, 480, 3)
    schedule, x = Schedule((0.0, 1 / 3, 2 / 3)), crops(64)[-1:]
    x1, x0 = decompose(x, 3), schedule.draw_noise(batches.ImageRandom(0, [0]), x.shape[1:])
    side, pitch, top = 94, 106, 268
    for column, t in enumerate(torch.arange(7, dtype=torch.float64) / 6):
        active = sum(start <= t + 1e-9 for start in schedule.starts)
        xt, _ = schedule.interpolate(x1[:active], x0[:active], t[None])
        left = 108 + column * pitch
        say(axis, left + side / 2, top - 14, f"t = {t:.2f}")
        for i in range(4):
            image = reconstruct(xt) if i == 3 else xt[i] if i < active else None
            y = top + i * pitch
            tile(axis, left, y, side, None if image is None else image[0].float(), band_colour(i, 3) if i < 3 else None,
                 GAIN if i in (1, 2) else 1)
    for i in range(3):
        middle = top + i * pitch + side / 2
        say(axis, 96, middle - 8, band_name(i, 3), color=band_colour(i, 3), ha="right", weight="bold")
        say(axis, 96, middle + 9, f"from t = {schedule.starts[i]:.2g}", SMALL, band_colour(i, 3), ha="right")
    say(axis, 96, top + 3 * pitch + side / 2, "sum", ha="right", weight="bold")
    save(figure, path)


def readers(sizes: list[int], num_cond: int) -> np.ndarray:
    """Which token reads which, (tokens, tokens): attention weights of random queries and keys, got from the code by
    handing it the identity as values. sizes: tokens of each band, condition tokens in band 0."""
    random, total = torch.Generator().manual_seed(0), sum(sizes)
    q, k = ([torch.randn(1, 1, n, 8, generator=random) for n in sizes] for _ in "qk")
    v = list(torch.eye(total)[None, None].split(sizes, dim=2))
    return torch.cat(attention(q, k, v, "causal", num_cond), dim=2)[0, 0].numpy() > 0


def step3(path: Path) -> None:
    """Who reads whom as a mask, and as the calls that do it without one."""
    model = MoTDiT((32, 1, 1, 2), in_channels=1, resolution=8, num_scales=3, num_classes=10)
    sizes = [model.num_cond + model.num_tokens[0], *model.num_tokens[1:]]
    reads, total, cell, top, left = readers(sizes, model.num_cond), sum(sizes), 11.5, 66, 112
    kinds = [CONDITION] * model.num_cond + sum(([band_colour(i, 3)] * n for i, n in enumerate(model.num_tokens)), [])
    figure, axis = sheet(372)
    for row in range(total):
        for column in range(total):
            box(axis, left + column * cell, top + row * cell, cell - 1.5, cell - 1.5,
                fill=kinds[column] if reads[row, column] else "#f1f1f1")
    groups, begin = [], 0
    for name, count, color in (("condition", model.num_cond, CONDITION), *((band_name(i, 3), n, band_colour(i, 3))
                                                                            for i, n in enumerate(model.num_tokens))):
        groups.append((name, begin, begin + count, color))
        begin += count
    for name, begin, end, color in groups:
        box(axis, left + begin * cell, top - 9, (end - begin) * cell - 1.5, 4, fill=color)
        box(axis, left - 9, top + begin * cell, 4, (end - begin) * cell - 1.5, fill=color)
        middle = top + (begin + end) * cell / 2 - 1
        say(axis, left - 16, middle, name, color=color if color != CONDITION else QUIET, ha="right", size=SMALL)
    say(axis, left + total * cell / 2, 44, "keys", size=SMALL, color=QUIET)
    say(axis, left - 16, 44, "queries", size=SMALL, color=QUIET, ha="right")
    say(axis, 22, 20, "who reads whom: a row reads the filled columns", size=TITLE, ha="left")
    calls(axis, 414, sizes, kinds, reads)
    say(axis, 414, 342, f"{reads.sum()} pairs of query and key are computed; without the mask there are {total**2}.",
        size=SMALL, color=QUIET, ha="left")
    save(figure, path)


def calls(axis, left: float, sizes: list[int], kinds: list[str], reads: np.ndarray) -> None:
    """One attention call for each band: its queries against a prefix of all keys."""
    say(axis, left, 20, "the same without a mask: one call for each band", size=TITLE, ha="left")
    end, cell = 0, 13.2
    for i, size in enumerate(sizes):
        begin, end = end, end + size
        assert reads[begin:end, :end].all() and not reads[begin:end, end:].any()
        y = 66 + i * 92
        title = f"band {i}: {size} queries read {end} keys" + (", condition included" if i == 0 else "")
        say(axis, left, y, title, color=band_colour(i, 3), ha="left", weight="bold")
        for token in range(len(kinds)):
            box(axis, left + token * cell, y + 14, cell - 2, cell - 2, fill=kinds[token] if token < end else "white",
                edge=kinds[token] if token < end else "#d8d8d8", line=0.8)
        call = f"scaled_dot_product_attention(q[{i}], cat(k[:{i + 1}]), cat(v[:{i + 1}]))"
        say(axis, left, y + 42, call, size=SMALL, ha="left", family="DejaVu Sans Mono")


def watched_loss(run: Run, step: int) -> tuple[list, list]:
    """One training step of the finished run, as train.py does it: the batch goes through schedule.loss.
    Returns for each stage (x1 bands, xt, t, v, v_pred), and the pairs (t, error) of each band."""
    dataset, rows, stages = batches.load(run.cfg), [slice(0, run.cfg.batch)], []
    (raw, y), = batches.read_step(dataset, run.cfg, step, rows)

    class Watched(Schedule):
        def interpolate(self, x1, x0, t):
            xt, v = super().interpolate(x1, x0, t)
            stages.append([x1, xt, t, v])
            return xt, v

    def model(xt, t, y):
        v_pred = run.model(xt, t, y)
        stages[-1].append(v_pred)
        return v_pred

    with torch.no_grad():
        rng = batches.BatchRandom(run.cfg.seed, step, run.cfg.batch)
        schedule = Watched(run.cfg.starts, run.cfg.path, stages="stratified", full_range=run.cfg.full_range)
        _, pairs = loss(model, dataset.x1(raw), y, schedule, rng)
    return stages, pairs


def step4(path: Path, run: Run) -> None:
    """One step of training: for each stage an example with state, target, answer and error; then the whole batch."""
    stages, pairs = watched_loss(run, run.step)
    figure, axis = sheet(640)
    side, columns, gains = 84, (250, 358, 466, 574, 682), (1, 1, 0.4, 0.4)          # velocities exceed [-1, 1]
    for x, text in zip(columns, ("data", "state", "target v", "network's v", "squared error"), strict=True):
        say(axis, x + side / 2, 22, text)
    y = 40
    for s, (x1, xt, t, v, v_pred) in enumerate(stages):
        start, pick = run.cfg.starts[s], int((t - (0.35 + 0.4 * s)).abs().argmin())
        say(axis, 24, y + 12, f"stage {s}", size=TITLE, ha="left", weight="bold")
        say(axis, 24, y + 34, f"t drawn in [{start:g}, 1]", size=SMALL, color=QUIET, ha="left")
        box(axis, 24, y + 50, 130, 6, fill=FAINT)
        box(axis, 24 + 130 * start, y + 50, 130 * (1 - start), 6, fill=QUIET)
        box(axis, 24 + 130 * t[pick] - 1.5, y + 45, 3, 16, fill=INK)
        say(axis, 24 + 130 * t[pick], y + 72, f"t = {t[pick]:.2f}")
        for i in range(len(xt)):
            color, name = band_colour(i, len(stages)), band_name(i, len(stages))
            say(axis, 238, y + side / 2, name, color=color, ha="right", weight="bold")
            error = (v_pred[i][pick] - v[i][pick]).square()
            for x, bands, gain in zip(columns[:4], (x1, xt, v, v_pred), gains, strict=True):
                tile(axis, x, y, side, bands[i][pick], color, gain)
            tile(axis, columns[4], y, side, heat(error), color)
            say(axis, columns[4] + side + 12, y + side / 2, f"mean\n{error.mean():.2f}", ha="left", linespacing=1.4)
            y += side + 14
        y += 14
    scatter(figure, pairs, y + 34, 640 - y - 80)
    say(axis, WIDTH / 2, y + 12, f"every example of this batch of {run.cfg.batch}", size=TITLE)
    save(figure, path)


def heat(error: torch.Tensor, most: float = 2.0) -> np.ndarray:
    """Squared errors (1, H, W) as uint8 colours, white for none."""
    from matplotlib import colormaps

    return (255 * colormaps["Greys"](np.clip(error[0].numpy() / most, 0, 1) * 0.9)[..., :3]).astype(np.uint8)


def scatter(figure, pairs: list, y: float, height: float) -> None:
    axis = plot(figure, 70, y, 560, height, xlim=(0, 1), yscale="log", xlabel="t", ylabel="mean squared error of v")
    for i, (t, error) in enumerate(pairs):
        axis.plot(t, error, ".", color=band_colour(i, len(pairs)), markersize=5,
                  label=f"{band_name(i, len(pairs))}: {len(t)} examples,\nmean {error.mean():.2f}")
    axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1), labelspacing=0.8)
    axis.grid(alpha=0.4)
    plain_ticks(axis)


def watched_solve(run: Run, count: int, tolerance: float) -> tuple[list, list]:
    """dopri5 on `count` digits. Returns the times of the velocity calls of each segment, the state as each begins, and
    the bands at the end."""
    y, noise = choose(run.condition, count), causal.noise_of(run, 0, range(count))
    times, begun = [], []

    def velocity(bands, t):
        if len(bands) > len(times):
            times.append([])
            begun.append(bands)
        times[-1].append(t.item())
        return run.model(bands, t.expand(count), y)

    with torch.no_grad():
        bands, _ = sample.solve(velocity, noise, run.schedule, rtol=tolerance, atol=tolerance)
    return times, [*begun, bands]


def accepted(times: list[float], end: float) -> list[tuple[float, int]]:
    """(t, calls so far) at the end of each step that dopri5 kept. A segment makes two calls to choose its first step; a
    step is six more, at t0 + h (1/5, 3/10, 4/5, 8/9, 1, 1): kept when the next one begins where it ended."""
    steps = [times[first : first + 6] for first in range(2, len(times), 6)]
    begins = [a[4] - (a[4] - a[0]) * 5 / 4 for a in steps] + [end]
    return [(a[4], 2 + 6 * (k + 1)) for k, a in enumerate(steps) if abs(begins[k + 1] - a[4]) < 1e-6]


def step5(path: Path, run: Run, count: int = 12) -> None:
    """Velocity calls of dopri5 over t at two tolerances; below, the state of three digits as each segment ends."""
    figure, axis = sheet(624)
    loose = run.cfg.rtol
    curves = {tolerance: watched_solve(run, count, tolerance) for tolerance in (loose, 1e-5)}
    below = plot(figure, 62, 34, 560, 206, xlim=(0, 1.0), xlabel="t", ylabel="velocity calls so far")
    for (tolerance, (times, _)), style in zip(curves.items(), ("-", ":"), strict=True):
        calls_before = 0
        for j, ((begin, end), calls_at) in enumerate(zip(run.schedule.segments, times, strict=True)):
            points = [(begin, 0), (begin, 2), *accepted(calls_at, end)]
            below.plot([t for t, _ in points], [calls_before + n for _, n in points], color=(COARSE, FINE)[j],
                       linestyle=style, marker="o", markersize=3.5, markevery=slice(2, None), clip_on=False)
            calls_before += len(calls_at)
        title = f"tolerance {tolerance:g}:\n".replace("e-0", "e-")
        title += f"{' + '.join(str(len(calls_at)) for calls_at in times)} = {calls_before} calls"
        below.text(1.02, calls_before, title, va="center", fontsize=TEXT)
    below.set_ylim(0, None)
    below.text(0.03, 0.93, "a dot: a step that was kept", transform=below.transAxes, fontsize=SMALL, color=QUIET)
    below.grid(alpha=0.4)
    states(axis, curves[loose][1], run.cfg.starts[1])
    save(figure, path)


def states(axis, moments: list, start: float, chosen: tuple = (3, 5, 8)) -> None:
    """Tiles: the noise of the coarse band, the state at T_1 before and after the fine band enters, and the end."""
    first, second, last = moments
    side, top, pitch = 84, 322, 98
    columns = ((40, first[0], COARSE), (230, second[0], COARSE), (326, second[1], FINE), (516, last[0], COARSE),
               (612, last[1], FINE), (736, reconstruct(last), None))
    for x, images, color in columns:
        for row, number in enumerate(chosen):
            tile(axis, x, top + row * pitch, side, images[number], color)
    for x, text in ((82, "t = 0\nnoise"), (272, f"t = {start:g}\nsegment 0 ends"), (368, "enters\nas noise"),
                    (606, "t = 1\nsegment 1 ends"), (778, "sum\nthe image")):
        say(axis, x, top - 24, text, size=SMALL, linespacing=1.4)
    for row in range(len(chosen)):
        middle = top + row * pitch + side / 2
        arrow(axis, (136, middle), (218, middle), COARSE)
        arrow(axis, (422, middle), (504, middle), FINE)
        say(axis, 716, middle, "=", size=13, color=QUIET)
