"""Previews, refinement, variations and upsampling, exact for a random network; samples on disk, whoever draws them."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import pyramid
import sample
from config import Config, UserError
from conftest import random_model, randomize, read_samples, tiny
from data.conditions import Vectors
from extras import causal
from pyramid import decompose, reconstruct
from run import gallery
from run.load import Run, build_model, export
from run.ranks import Ranks
from schedule import Schedule

HEUN = dict(solver="heun", steps=9)
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def run(tmp_path) -> Run:
    """Three bands, five classes, random weights everywhere, so that every band depends on all that it may read."""
    cfg = Config(res=16, num_scales=3)
    return Run(cfg, random_model(), {"classes": list("abcde")}, tmp_path, 7, "ema")


def on_vectors(tmp_path) -> Run:
    """The same on vectors of three numbers."""
    examples = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    model = random_model(num_classes=0, condition=partial(Vectors, 3, examples=examples))
    return Run(Config(res=16, num_scales=3, condition="vectors"), model, {"classes": [], "vectors": [6, 3]}, tmp_path,
               7, "ema")


def whole(run, numbers, y, **settings) -> list:
    return causal.draw_bands(run, causal.noise_of(run, 0, numbers), y, **settings)[0]


@pytest.mark.parametrize("condition", ["labels", "vectors"])
@pytest.mark.parametrize("bands", [1, 2])
@pytest.mark.parametrize("noise", ["pyramid", "independent"])
def test_previews_are_the_coarse_bands_of_the_images_that_come_later(run, tmp_path, bands, noise, condition):
    """Drawn in other batches, with guidance: to float rounding."""
    run = run if condition == "labels" else on_vectors(tmp_path)
    run.cfg = replace(run.cfg, noise=noise)
    y = torch.tensor([0, 3, 1, 4]) if condition == "labels" else run.condition.draw(4)
    x1, nfe = causal.preview(run, range(4), y, bands=bands, cfg_scale=1.7, **HEUN)
    assert x1.shape == (4, 2, 4 * bands, 4 * bands) and nfe == 18
    for i in range(4):
        later = whole(run, [i], y[i : i + 1], cfg_scale=1.7, **HEUN)
        assert torch.allclose(reconstruct(later[:bands]), x1[i : i + 1], atol=1e-5)
    torch.nn.init.normal_(run.model.patch_out[2].linear.weight, std=5)          # the finest band changes,
    changed = whole(run, range(4), y, cfg_scale=1.7, **HEUN)                    # the preview does not
    assert torch.allclose(reconstruct(changed[:bands]), x1, atol=1e-5)


def test_an_adaptive_solver_agrees_to_its_tolerance(run):
    y = torch.tensor([0, 3])
    x1, _ = causal.preview(run, range(2), y, rtol=1e-6, atol=1e-6, solver="dopri5")
    later = whole(run, range(2), y, rtol=1e-6, atol=1e-6, solver="dopri5")
    assert torch.allclose(later[0], x1, atol=1e-4)


def test_a_preview_costs_the_tokens_of_its_bands_only(run, monkeypatch):
    seen = Counter()
    forward = type(run.model).forward
    monkeypatch.setattr(type(run.model), "forward", lambda model, bands, t, y=None: (
        seen.update([len(bands)]), forward(model, bands, t, y))[1])
    causal.preview(run, range(2), torch.tensor([0, 1]), **HEUN)
    assert seen == {1: 18}
    assert run.model.num_tokens == [4, 16, 64]              # 4 of 84


def test_an_unmasked_model_does_not_have_this_property(run, tmp_path):
    other = Run(Config(res=16, num_scales=3, mask="none"), random_model(mask="none"), run.facts, tmp_path, 7, "ema")
    x1, _ = causal.preview(other, range(2), torch.tensor([0, 1]), **HEUN)
    assert (whole(other, range(2), torch.tensor([0, 1]), **HEUN)[0] - x1).abs().max() > 1e-2


def test_variations_share_the_coarse_bands_and_nothing_else(run):
    original = whole(run, [17], torch.tensor([2]), **HEUN)
    for bands in (1, 2):
        x1, _ = causal.vary(run, 17, 5, torch.full((5,), 2), bands=bands, **HEUN)
        again, _ = causal.draw_bands(run, [causal.noise_of(run, 0, [17])[i].expand(5, -1, -1, -1) if i < bands else n
                                           for i, n in enumerate(causal.noise_of(run, 1, range(5)))],
                                     torch.full((5,), 2), **HEUN)
        for i in range(bands):
            assert torch.allclose(again[i], original[i].expand(5, -1, -1, -1), atol=1e-5)
        assert torch.allclose(reconstruct(again), x1)
        assert again[2].std(dim=0).mean() > 0.1 and (again[1].std(dim=0).mean() > 0.1) == (bands == 1)


@pytest.mark.parametrize("noise", ["pyramid", "independent"])
def test_variations_need_independent_bands(run, monkeypatch, noise):
    """Bilinear enlarging correlates the bands of one white image; with independent noise any pyramid will do."""
    bilinear = partial(F.interpolate, scale_factor=2, mode="bilinear")
    monkeypatch.setitem(pyramid.PYRAMIDS, "bilinear", (pyramid.down, bilinear))
    run.schedule = Schedule(run.cfg.starts, pyramid="bilinear", noise=noise)
    y = torch.full((5,), 2)
    if noise == "independent":
        assert causal.vary(run, 17, 5, y, **HEUN)[0].shape == (5, 2, 16, 16)
        return
    with pytest.raises(UserError, match="the bands of white noise are independent for the Haar pyramid only"):
        causal.vary(run, 17, 5, y, **HEUN)
    x1, _ = causal.preview(run, range(5), y, bands=2, **HEUN)                   # previews do not need them
    later = whole(run, range(5), y, **HEUN)
    assert torch.allclose(reconstruct(later[:2], "bilinear"), x1, atol=1e-5)


def test_the_noise_of_a_variation_is_white_again(run):
    """Coarse bands of one white image and fine bands of another: together as white as either."""
    one, other = causal.noise_of(run, 0, range(4000)), causal.noise_of(run, 1, range(4000))
    mixed = reconstruct([one[0], *other[1:]]).flatten(1)
    covariance = mixed.T @ mixed / len(mixed)
    assert (covariance - torch.eye(len(covariance))).abs().max() < 0.12
    assert (covariance - torch.eye(len(covariance))).abs().mean() < 0.02


@pytest.mark.parametrize("known", [1, 2])
@pytest.mark.parametrize("scale", [(), (3.0, 0.9, 0.7)])
def test_upsampling_imposes_the_coarse_bands_where_training_saw_them(run, known, scale):
    """The network reads alpha x_1 + sigma x_0 in the known bands at every time, and the result contains them. A noise
    scale is that of the bands that are drawn."""
    run.cfg = replace(run.cfg, noise_scale=scale)
    schedule, small, seen = Schedule(run.cfg.starts), torch.rand(2, 4 * known, 4 * known) * 2 - 1, []
    forward = run.model.forward

    def spy(bands, t, y=None):
        seen.append((t[0].item(), [band.clone() for band in bands]))
        return forward(bands, t, y)

    run.model.forward = spy
    x1, nfe = causal.upsample(run, small, 3, torch.tensor([0, 1, 2]), **HEUN)
    assert x1.shape == (3, 2, 16, 16) and len(seen) == nfe
    bands, noise = decompose(small.expand(3, -1, -1, -1), known), causal.noise_of(run, 0, range(3))
    for t, state in seen:
        assert t >= run.cfg.starts[known] - 1e-6
        for i in range(known):
            alpha, sigma, _, _ = schedule.coefficients(i, t)
            assert torch.allclose(state[i], float(alpha) * bands[i] + float(sigma) * noise[i], atol=1e-5)
    start = [state for t, state in seen if len(state) == known + 1][0]
    entering = (scale or (1, 1, 1))[known] * noise[known]
    assert torch.allclose(start[known], (1 - run.cfg.starts[known]) * entering, atol=1e-5)
    with pytest.raises(UserError, match="are 4 or 8 pixels wide, not"):
        causal.upsample(run, torch.zeros(2, 5, 5), 1, torch.tensor([0]), **HEUN)


def test_upsampling_gaussian_data_gives_the_conditional_distribution(tmp_path):
    """Closed form: smooth Gaussian images of 4 x 4, the unmasked optimal field; the fine bands given the coarse ones
    have the conditional mean and covariance, up to what the coarse path's noise hides (T is late)."""
    torch.manual_seed(0)
    side, start = 4, 0.9
    place = torch.arange(side, dtype=torch.float64)
    line = 0.8 ** (place[:, None] - place).abs()
    cov = torch.kron(line, line)                                                    # of the pixels
    basis = torch.cat([b.flatten(1) for b in decompose(torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4), 2)], 1).T
    data, white = basis @ cov @ basis.T, basis @ basis.T                            # of the bands, 4 + 16 numbers
    schedule = Schedule((0.0, start))

    def field(bands, t, y):
        t = t[0].double()
        x = torch.cat([band.flatten(1) for band in bands], dim=1).double()
        sizes = [4, 16][: len(bands)]
        a, s, da, ds = (torch.cat([torch.full((n,), float(schedule.coefficients(i, t)[k]))
                                   for i, n in enumerate(sizes)]) for k in range(4))
        m = len(a)
        state = a[:, None] * data[:m, :m] * a + s[:, None] * white[:m, :m] * s
        cross = da[:, None] * data[:m, :m] * a + ds[:, None] * white[:m, :m] * s
        v = x @ (cross @ torch.linalg.pinv(state, rtol=1e-9, hermitian=True)).T
        return [part.reshape(band.shape).float() for part, band in zip(v.split(sizes, dim=1), bands, strict=True)]

    class Model:
        condition, in_channels, resolution = None, 1, 4

        def parameters(self):
            yield torch.zeros(1)

        def __call__(self, bands, t, y):
            return field(bands, t, y)

    run = Run(Config(res=4, starts=(0.0, start), size="32,2,2,1"), Model(), {"classes": []}, tmp_path, 1, "raw")
    small = torch.tensor([[[1.0, -0.5], [0.3, 0.8]]])
    x1, _ = causal.upsample(run, small, 4000, None, solver="heun", steps=250)
    fine = decompose(x1, 2)[1].flatten(1).double()
    gain = data[4:, :4] @ torch.linalg.inv(data[:4, :4])
    mean, rest = gain @ small.flatten().double(), data[4:, 4:] - gain @ data[:4, 4:]
    assert (fine.mean(0) - mean).abs().max() < 0.06
    assert torch.linalg.norm(torch.cov(fine.T) - rest) < 0.1 * torch.linalg.norm(rest)


# ---------------------------------------------------------------------------------------------------------------------
# the command line


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command("preview", RUN, "-n", "4"): what it prints."""
    def start(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["causal", *map(str, arguments), "--out", "drawn", "--device", "cpu"])
        causal.main()
        return capsys.readouterr().out

    return start


def drawn(tmp_path, name):
    with np.load(tmp_path / "drawn" / f"{name}.npz") as file:
        return dict(file)


def on_digits(tmp_path, condition: str = "labels") -> str:
    """A random network for the digits: images of one channel, which the commands draw and read."""
    cfg = tiny(tmp_path, condition=condition)
    facts = {"channels": 1, "side": 8, "classes": list("0123456789") if condition == "labels" else [],
             "vectors": None if condition == "labels" else [6, 3], "count": 9, "fingerprint": "", "latent": None}
    examples = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    export(Run(cfg, randomize(build_model(cfg, facts, examples)), facts, tmp_path, 7, "ema"), tmp_path / "export")
    return str(tmp_path / "export")


@pytest.mark.parametrize("condition", ["labels", "vectors"])
def test_the_four_commands(command, tmp_path, condition):
    run, fixed = on_digits(tmp_path, condition), ["--solver", "heun", "--steps", "6"]
    text = command("preview", run, "-n", "12", *fixed, "--batch", "5")
    assert "12 thumbnails of 4 x 4, 12 calls" in text and "previews.png" in text
    previews = drawn(tmp_path, "previews")
    assert previews["images"].shape == (12, 4, 4, 1)
    if condition == "labels":
        assert previews["labels"].tolist() == [i % 10 for i in range(12)]
    else:
        assert previews["vectors"].shape == (12, 3)
    text = command("refine", run, "--numbers", "3,11", *fixed)
    refined, key = drawn(tmp_path, "refined"), "labels" if condition == "labels" else "vectors"
    assert refined["images"].shape == (2, 8, 8, 1) and "image 3, image 11: 12 calls" in text
    assert np.array_equal(refined[key], previews[key][[3, 11]])
    assert float(re.search(r"differ from the previews by (\S+)", text)[1]) < 1e-5
    text = command("vary", run, "--number", "11", "-n", "4", *fixed)
    assert "4 of image 11" in text and drawn(tmp_path, "variations")["images"].shape == (4, 8, 8, 1)
    assert np.array_equal(drawn(tmp_path, "variations")[key], previews[key][[11] * 4])
    std, std_coarse = map(float, re.search(r"between them (\S+), of their averages over coarse pixels (\S+)\n",
                                           text).groups())
    assert 5 * std_coarse < std                             # they differ in the fine bands
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "small.png")
    text = command("upsample", run, "--image", "small.png", "-n", "3", *fixed)
    assert "4 -> 8 pixels, 3 images, 6 calls" in text and drawn(tmp_path, "upsampled")["images"].shape == (3, 8, 8, 1)
    assert float(re.search(r"off by (\S+) of 255", text)[1]) > 0
    assert {f"{name}.png" for name in ("previews", "refined", "variations", "upsampled")} <= {
        path.name for path in (tmp_path / "drawn").iterdir()}


def test_a_command_reports_what_it_cannot_do(give_up, tmp_path):
    run = on_digits(tmp_path)
    for arguments, words in (
            (["preview", run, "--bands", "2"], "--bands must be at least 1 and below 2, not 2"),
            (["refine", run, "--numbers", "x"], "--numbers: invalid image_numbers value: 'x'"),
            (["refine", run], "the following arguments are required: --numbers"),
            (["refine", run, "--numbers", "-3"], "numbered from 0"),
            (["refine", run, "--numbers", "1,-3"], "numbered from 0"),
            (["vary", run, "--number", "3,4"], "--number of one image"),
            (["vary", run, "--number", "1", "-n", "9", "--batch", "4"], "at most --batch 4, not 9"),
            (["vary", run, "--number", "99999999999"], "numbered from 0"),
            (["upsample", run, "--image", "nowhere.png"], "cannot read the image 'nowhere.png'"),
            (["preview", run, "-n", "0"], "--num must be at least 1"),
            (["preview", run, "--labels", "10"], "no label '10'"),
            (["preview", run, "--vectors", "x.npy"], "trained on labels"),
            (["preview", run, "--solver", "dopri5", "--steps", "4"], "leave out --steps"),
            (["preview", run, "--cfg-interval", "0.5"], "two increasing times"),
            (["preview", "nowhere"], "no run directory 'nowhere'"),
            (["preview", run, "--out", run + "/config.json"], "config.json"),
            ([], "required: command"), (["paint"], "invalid choice: 'paint'")):
        text = give_up("extras.causal", *arguments)
        assert words in text and len(text.splitlines()) <= 2, text


@pytest.mark.parametrize("settings, words", [
    (dict(mask="none"), "--mask none: its coarse bands read finer ones"),
    (dict(method="separate"), "--method separate"), (dict(num_scales=1, starts=(0.0,)), "one band")])
def test_runs_that_have_no_previews(run, settings, words):
    class Args:
        command, bands, num, seed, batch, numbers = "preview", 1, 2, 0, 10, [0, 1]

    causal.check(run, Args)
    run.cfg = replace(run.cfg, **{"starts": (), **settings})
    with pytest.raises(UserError, match=words):
        causal.check(run, Args)
    if "mask" in settings:                                  # given coarse bands are read, not generated
        Args.command = "upsample"
        causal.check(run, Args)


# ---------------------------------------------------------------------------------------------------------------------
# samples on disk


def fill(run, out, format, stop=None, num=10, **settings) -> gallery.Gallery:
    """Draws `num` images into a gallery, as sample.py does; stops after some batches."""
    job = {"num": num, **settings}
    samples = gallery.Gallery(out, job, format, ALONE)
    todo = samples.prepare(sample.chunks_of(num, 3))
    y = torch.arange(num) % 5
    for numbers, images, note in sample.draw_batches(run, todo[:stop], y, 0, solver="euler", steps=3):
        samples.write(numbers, images[..., :1].repeat(3, axis=3), y[numbers.start : numbers.stop], note)
    return samples


@pytest.mark.parametrize("format", ["npz", "shards"])
def test_samples_continue_after_a_stop_and_every_format_holds_the_same(run, tmp_path, format):
    expected = sample.generate(run, 10, torch.arange(10) % 5, batch=3, progress=False, solver="euler", steps=3)[0]
    fill(run, tmp_path / "out", format, stop=2)
    with open(tmp_path / "out" / "notes-0.jsonl", "a") as file:
        file.write('\n{"first": 6, "cou')                   # a kill cut this line off
    samples = fill(run, tmp_path / "out", format)
    assert [note["first"] for note in samples.notes()] == [0, 3, 6, 9]
    report = gallery.report_of(run, samples.notes(), 0, 3, {})
    assert report["num"] == 10 and report["nfe"] == 3
    samples.finish(report, torch.arange(10) % 5, run.condition)
    images, labels = read_samples(tmp_path / "out", 4)
    assert np.array_equal(images, expected[..., :1].repeat(3, axis=3))
    assert labels.tolist() == [i % 5 for i in range(10)]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["nfe"] == 3
    assert (tmp_path / "out" / "grid.png").exists()


def test_a_kill_while_finishing_costs_nothing(run, tmp_path, monkeypatch):
    """At any file that is removed at the end: the same command ends with the same single file."""
    y = torch.arange(10) % 5
    whole = fill(run, tmp_path / "whole", "npz")
    whole.finish(gallery.report_of(run, whole.notes(), 0, 3, {}), y, run.condition)
    unlink = type(tmp_path).unlink
    for survived in range(6):
        out, left = tmp_path / str(survived), [survived]

        def interrupted(path, missing_ok=False, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            unlink(path, missing_ok)

        samples = fill(run, out, "npz")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(tmp_path), "unlink", interrupted)
            samples.finish(gallery.report_of(run, samples.notes(), 0, 3, {}), y, run.condition)
        with pytest.raises(UserError, match="are not complete"):
            gallery.open_samples(out)
        again = fill(run, out, "npz")
        again.finish(gallery.report_of(run, again.notes(), 0, 3, {}), y, run.condition)
        with np.load(out / "samples.npz") as one, np.load(tmp_path / "whole" / "samples.npz") as other:
            assert np.array_equal(one["images"], other["images"]) and len(one["images"]) == 10
        assert sorted(p.name for p in out.iterdir()) == ["grid.png", "report.json", "samples.npz"]


def test_missing_files_are_drawn_again_and_other_files_are_left_alone(run, tmp_path):
    fill(run, tmp_path / "out", "shards")
    (tmp_path / "out" / "shard-00000003.npz").unlink()
    with pytest.raises(UserError, match="samples are missing"):
        samples = gallery.Gallery(tmp_path / "out", {"num": 10}, "shards", ALONE)
        samples.finish({"num": 10}, None, run.condition)
    fill(run, tmp_path / "out", "shards")
    assert len(list((tmp_path / "out").glob("shard-*.npz"))) == 4
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "shard-holiday.npz").write_text("dear")
    with pytest.raises(UserError, match="holds other samples"):
        fill(run, tmp_path / "others", "npz")
    assert (tmp_path / "others" / "shard-holiday.npz").exists()


def test_an_interrupted_directory_is_not_scored(run, tmp_path):
    fill(run, tmp_path / "out", "shards", stop=2)
    with pytest.raises(UserError, match="are not complete"):
        gallery.open_samples(tmp_path / "out")


def test_other_samples_are_not_mixed_in(run, tmp_path):
    fill(run, tmp_path / "out", "shards", stop=2)
    with pytest.raises(UserError, match="holds other samples"):
        fill(run, tmp_path / "out", "shards", cfg_scale=2)
    fill(run, tmp_path / "one", "npz", stop=2)
    assert len(fill(run, tmp_path / "one", "npz", cfg_scale=2).notes()) == 4        # a single file is simply made anew


def test_samples_of_a_run_that_was_trained_anew_are_not_mixed_in(run, tmp_path):
    """The same directory, step and flags, but other weights."""
    args = SimpleNamespace(num=10, seed=0, batch=3, labels="balanced", vectors=None)

    def missing(model):
        job = gallery.job_of(replace(run, model=model.requires_grad_(False)), args, {})
        samples = gallery.Gallery(tmp_path / "out", job, "shards", ALONE)
        return samples, samples.prepare(sample.chunks_of(10, 3))

    samples, (first, *rest) = missing(run.model)
    samples.write(first, np.zeros((3, 16, 16, 3), np.uint8), None, {"first": 0, "count": 3})
    assert missing(run.model)[1] == rest
    with pytest.raises(UserError, match="holds other samples"):
        missing(random_model(seed=1))


@pytest.mark.parametrize("changed", [dict(num=9), dict(seed=1), dict(batch=4), dict(labels="b"), dict(vectors="a.npy")])
def test_samples_of_another_command_are_not_mixed_in(run, changed):
    """Whatever decides what is drawn is part of the job."""
    args = dict(num=10, seed=0, batch=3, labels="balanced", vectors=None)
    run.model.requires_grad_(False)
    first, again, other = (gallery.job_of(run, SimpleNamespace(**given), {"steps": 3})
                           for given in (args, args, args | changed))
    assert first == again and first != other and first != gallery.job_of(run, SimpleNamespace(**args), {"steps": 4})


def test_samples_at_another_noise_scale_are_not_mixed_in(run):
    args = SimpleNamespace(num=10, seed=0, batch=3, labels="balanced", vectors=None)
    run.model.requires_grad_(False)
    scaled = replace(run, cfg=replace(run.cfg, noise_scale=(1.0, 0.85, 0.85)))
    plain, other = (gallery.job_of(of, args, {}) for of in (run, scaled))
    assert plain != other and plain == {**other, "noise_scale": ()}


def test_the_report_counts_seconds_for_each_image(run):
    notes = [{"nfe": [4], "count": count, "forwards": 4, "seconds": 3.0} for count in (8, 4)]
    assert gallery.report_of(run, notes, 0, 8, {})["seconds_per_image"] == 0.5


def test_guidance_in_an_interval_of_times_only(run):
    """Outside the interval it is the conditional model at the price of one pass; NFE do not change."""
    y = torch.arange(3)
    plain, part, never = (sample.generate(run, 3, y, progress=False, cfg_scale=w, interval=interval, **HEUN)
                          for w, interval in ((3.0, (0.0, 1.0)), (3.0, (0.4, 0.8)), (1.0, (0.0, 1.0))))
    assert plain[1]["nfe"] == part[1]["nfe"] == never[1]["nfe"] == 18
    assert plain[1]["forwards"] == 36 and never[1]["forwards"] == 18 and 18 < part[1]["forwards"] < 36
    assert not np.array_equal(plain[0], part[0]) and not np.array_equal(part[0], never[0])
    assert "between t = 0.4 and 0.8" in gallery.describe(part[1])


def test_a_network_in_bfloat16_keeps_the_state_in_float32(run, monkeypatch):
    states, guided = set(), sample.Guided.__call__
    monkeypatch.setattr(sample.Guided, "__call__", lambda model, bands, t, y: (
        states.update(band.dtype for band in bands), guided(model, bands, t, y))[1])
    images, report = sample.generate(run, 3, torch.arange(3), progress=False, precision="bfloat16", **HEUN)
    exact, _ = sample.generate(run, 3, torch.arange(3), progress=False, **HEUN)
    assert states == {torch.float32}
    assert report["network_precision"] == "bfloat16" and not np.array_equal(images, exact)
    assert np.abs(images.astype(int) - exact).mean() < 8
