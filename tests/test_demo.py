"""What is behind the page of extras/demo.py, without a browser: work that can be stopped, images, controls, uploads."""

import base64
import io
import re
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_causal import on_vectors
from test_graphs import Rerun
from test_latents import encode, images, run_of, vae  # noqa: F401  (fixtures)

import sample
import train
from config import Config, UserError
from conftest import random_model, tiny
from data import sources
from extras import demo, studio
from pyramid import decompose
from run import graphs, load
from run.load import Run
from schedule import Schedule

HEUN = ("heun", 9)


@pytest.fixture
def run(tmp_path) -> Run:
    """Three bands of colour images, five classes, random weights."""
    cfg = Config(res=16, num_scales=3)
    return Run(cfg, random_model(in_channels=3), {"classes": list("01234")}, tmp_path, 7, "ema")


def result(run, work):
    """Of work that is followed to its end."""
    progress = studio.follow(run, work, "work", "status")
    try:
        while True:
            assert list(next(progress)) == ["status"]
    except StopIteration as end:
        return end.value[0]


def wish_of(run, classes=(), vectors="", num=6, seed=0, guidance=1.0, solver=HEUN):
    return studio.read_wish(run, classes, vectors, num, seed, guidance, *solver)


def pictures_of(html: str) -> list[np.ndarray]:
    """The images inside HTML, pixel by pixel."""
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            for data in re.findall(r"data:image/png;base64,([\w+/=]+)", html)]


# ---------------------------------------------------------------------------------------------------------------------
# images


@pytest.fixture(params=["pixel", "latent", "export"])
def trained(request, tmp_path, monkeypatch) -> Run:
    """A short run, as the page opens it."""
    monkeypatch.setattr(train, "finish", lambda job: {})
    if request.param == "latent":
        folder, autoencoder = (request.getfixturevalue(name) for name in ("images", "vae"))
        encode(tmp_path / "cache", folder, autoencoder)
        cfg = run_of(tmp_path / "run", tmp_path / "cache", autoencoder, steps=3)
    else:
        cfg = tiny(tmp_path, steps=3)
    train.train(cfg, device="cpu")
    name = cfg.out
    if request.param == "export":
        load.export(load.load_run(name, device="cpu"), tmp_path / "export")
        name = str(tmp_path / "export")
    shared = demo.Shared(device="cpu")
    shared.open(name)
    return shared.run


def test_recordings_are_made_once_and_cancelled_between_calls(tmp_path, monkeypatch):
    """python -m extras.demo --graphs --precision bfloat16; a recording is one call of the network that is watched."""
    monkeypatch.setattr(train, "finish", lambda job: {})
    cfg = tiny(tmp_path, steps=3)
    train.train(cfg, device="cpu")
    monkeypatch.setattr(demo.graphs, "speed_up", partial(graphs.speed_up, record=Rerun))
    shared = demo.Shared(device="cpu", precision="bfloat16", graphs=True)
    shared.open(cfg.out)
    recorded, pages = shared.run.model.forward, []
    assert recorded.bfloat16 and recorded.captures == 0
    for _ in range(2):
        wish = wish_of(shared.run)
        pages.append(result(shared.run, lambda run, wish=wish: studio.preview(run, wish))[0])
        assert recorded.captures == 1                       # the coarse band of six images
    assert np.array_equal(*pages)
    assert result(shared.run, lambda run: studio.finish(run, wish, 2))[2] < 0.05 and recorded.captures == 3

    watched, calls = studio.Watched(shared.run.model), []
    def work(bands, t):
        calls.append(t)
        watched.stopped = len(calls) == 3
        return watched(bands, t.expand(6), wish.y)
    with pytest.raises(studio.Stopped):
        sample.solve(work, [torch.zeros(6, 1, 4, 4)], Schedule((0.0,)), "euler", steps=9)
    assert len(calls) == 3


def test_a_pixel_run_a_latent_run_and_an_export_do_everything(trained, tmp_path):
    wish, side = wish_of(trained), trained.cfg.res
    thumbnails, nfe = result(trained, lambda run: studio.preview(run, wish))
    small = side >> (trained.cfg.num_scales - 1)
    assert thumbnails.shape == (6, small, small, trained.image_shape[2]) and nfe == 18
    (thumbnail, image), _, gap = result(trained, lambda run: studio.finish(run, wish, 4))
    assert image.shape == trained.image_shape and gap < 1e-5 and np.array_equal(thumbnail, thumbnails[4])
    varied, _ = result(trained, lambda run: studio.vary(run, wish, 4))
    assert varied.shape == (studio.VARIATIONS, *trained.image_shape)
    if trained.facts["latent"] is None:                     # averages of decoded latents are no decoded averages
        for one in (image, *varied):                        # 8-bit pixels are rounded and cut off at black and white
            inside = (one > 0) & (one < 255)
            blocks = inside.reshape(small, side // small, small, side // small).all(axis=(1, 3))
            average = one.reshape(small, side // small, small, side // small).mean(axis=(1, 3))
            assert blocks.sum() > 3 and np.abs(average - thumbnail[..., 0])[blocks].max() <= 1
    film = pictures_of(result(trained, lambda run: studio.film(run, wish, 4)))
    assert len(film) == trained.cfg.num_scales + 1          # its frames stand one above the other
    assert film[-1].shape[:2] == ((studio.FILM_STEPS + 1) * side, side)
    assert np.abs(film[-1][-side:].reshape(image.shape) - image.astype(float)).mean() < 8       # Euler is not Heun


def test_the_thumbnails_follow_seed_class_and_guidance(run):
    drawn = [result(run, lambda run, wish=wish: studio.preview(run, wish))[0] for wish in (
        wish_of(run), wish_of(run), wish_of(run, seed=1), wish_of(run, ["1"]), wish_of(run, guidance=3.0))]
    assert np.array_equal(drawn[0], drawn[1])
    for other in drawn[2:]:
        assert not np.array_equal(drawn[0], other)
    assert np.array_equal(drawn[0][1], drawn[3][1]) and not np.array_equal(drawn[0][2], drawn[3][2])   # number 1 is a 1


def test_the_film_shows_a_band_from_its_start(run):
    html = result(run, lambda run: studio.film(run, wish_of(run, num=1), 0))
    times = [float(t) for t in re.search(r'data-times="(.*?)"', html)[1].split()]
    assert len(times) == studio.FILM_STEPS + 1 and times[0] == 0 and times[-1] == 1 and times == sorted(times)
    *bands, total = pictures_of(html)
    for i, strip in enumerate(bands):
        frames = strip.reshape(len(times), 4 << i, 4 << i, 3)
        grey = [(frame == 235).all() for frame in frames]
        assert grey == [t < i / 3 - 0.01 for t in times]
    assert total.shape == (16 * len(times), 16, 3) and total[:16].std() > 0     # enlarged, until all are there
    assert [f"from t = {t}" in html for t in ("0<", "0.33<", "0.67<")] == [True] * 3


# ---------------------------------------------------------------------------------------------------------------------
# work in progress


def test_to_close_the_generator_is_to_stop_the_network(run, monkeypatch):
    calls = []
    forward = type(run.model).forward
    monkeypatch.setattr(type(run.model), "forward", lambda model, *given: (
        time.sleep(0.01), calls.append(time.time()), forward(model, *given))[2])
    progress = studio.follow(run, lambda run: studio.preview(run, wish_of(run, solver=("euler", 1000))), "work", "it")
    texts = [next(progress)["it"] for _ in range(4)]
    assert "work: t = 0" in texts[-1] and texts[-1] != texts[1] and calls
    shares = [float(re.search(r'value="(.*?)"', text)[1]) for text in texts]
    assert shares == sorted(shares) and 0 < shares[-1] < 1
    progress.close()
    time.sleep(0.1)                                         # for the call it is in
    count = len(calls)
    time.sleep(0.4)
    assert len(calls) == count < 300
    assert result(run, lambda run: studio.preview(run, wish_of(run)))[1] == 18  # the run itself goes on


def test_a_film_that_is_decoded_stops_too(run):
    watched = studio.Watched(run.model)
    watched.stopped = True
    run.model = watched
    with pytest.raises(studio.Stopped):
        watched.go_on()
    with pytest.raises(studio.Stopped):
        studio.film(run, wish_of(run, num=1), 0)


def test_errors_of_the_work_come_out(run):
    with pytest.raises(UserError, match="needs a number of steps"):
        result(run, lambda run: studio.preview(run, wish_of(run, solver=("heun", None))))
    with pytest.raises(ZeroDivisionError):
        result(run, lambda run: 1 / 0)


# ---------------------------------------------------------------------------------------------------------------------
# controls and uploads


def test_classes_come_in_turn(run):
    assert wish_of(run).y.tolist() == [0, 1, 2, 3, 4, 0]
    assert wish_of(run, ["4", "0"]).y.tolist() == [4, 0, 4, 0, 4, 0]
    assert wish_of(run).of(3, 2).tolist() == [3, 3]
    assert wish_of(run, seed=None).seed == 0 and "steps" in wish_of(run, solver=("dopri5", 9)).settings


@pytest.mark.parametrize("text", ["1 2", "1 2 3 4", "1 2 3; 4", "a b c", "1 2 nan", "1 2 1e99", ";"])
def test_vectors_are_numbers_of_the_right_length(tmp_path, text):
    run = on_vectors(tmp_path)
    assert torch.equal(wish_of(run).y, run.condition.examples)
    assert wish_of(run, vectors="1, 2, 3; 4 5 6").y[:3].tolist() == [[1, 2, 3], [4, 5, 6], [1, 2, 3]]
    with pytest.raises(UserError, match="a vector of this run is 3 numbers"):
        wish_of(run, vectors=text)


def test_what_the_run_cannot_do_is_one_sentence(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--seed at least 0"):
        wish_of(run, seed=-1)
    run.cfg = Config(res=16, num_scales=3, label_drop=0.0)
    with pytest.raises(UserError, match="guidance needs a null condition"):
        wish_of(run, guidance=2.0)
    monkeypatch.setattr(load, "load_run", lambda name, **options: Run(
        Config(method="lfm", num_scales=1), run.model, run.facts, tmp_path, 7, "ema"))
    shared = demo.Shared()
    with pytest.raises(UserError, match="trained with --method lfm, not lapflow"):
        shared.open("it")
    assert shared.run is None


def test_without_gradio_the_page_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"the page needs gradio: .*pip install -e '.\[demo\]'"):
        demo.import_gradio()


def test_it_listens_on_this_machine_and_opens_the_newest_run(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "import_gradio", lambda: None)
    monkeypatch.setattr(demo, "launch", lambda shared, host, port: (
        calls.append((shared.run and shared.run.step, host, port)),
        SimpleNamespace(local_url="URL", block_thread=lambda: None))[1])
    monkeypatch.setattr(sys, "argv", ["demo"])
    demo.main()
    assert calls == [(None, "127.0.0.1", None)] and "no trained run yet" in capsys.readouterr().out
    monkeypatch.setattr(train, "finish", lambda job: {})
    train.train(tiny(tmp_path / "out", steps=2), device="cpu")
    monkeypatch.setattr(sys, "argv", ["demo", "--host", "0.0.0.0", "--port", "80"])
    demo.main()
    assert calls[1:] == [(2, "0.0.0.0", 80)] and "open       URL" in capsys.readouterr().out


@pytest.mark.parametrize("name, content", [
    ("a.png", b""), ("a.png", b"#!/bin/sh"), ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")])
def test_uploads_are_read_by_the_one_decoder(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for read in (lambda file: studio.read_upload(file, 8), lambda file: studio.split(file, 3)):
        with pytest.raises(UserError) as problem:
            read(str(tmp_path / name))
        text = str(problem.value).replace(str(tmp_path), "FOLDER")
        assert text.startswith(f"cannot read the image '{name}'") and "FOLDER" not in text and "\n" not in text
    with pytest.raises(UserError, match="choose a picture first"):
        studio.read_upload(None, 8)


@pytest.mark.parametrize("num_scales", [1, 3, 6])
def test_the_pyramid_of_a_photograph(tmp_path, num_scales):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 280, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    shown = pictures_of(studio.split(str(tmp_path / "noise.png"), num_scales))
    assert len(shown) == 2 * num_scales
    whole = sources.read_image(tmp_path / "noise.png", 256)
    assert np.array_equal(shown[-1], whole.transpose(1, 2, 0))                  # the sum of all bands is the photograph
    coarse = decompose(torch.tensor(whole)[None].float(), num_scales)[0][0].permute(1, 2, 0).numpy()
    assert np.abs(shown[0] - coarse).max() <= 0.51 and np.array_equal(shown[0], shown[num_scales])
    assert len(pictures_of(studio.split(None, num_scales))) == 2 * num_scales   # before anything is uploaded


def test_nothing_from_outside_becomes_html():
    grey = [np.zeros((2, 2, 1), np.uint8)]
    texts = (studio.figures(grey, ["<script>"]), studio.note("<script>"), studio.bar(0.5, "<script>"))
    assert all("<script>" not in text and "&lt;script&gt;" in text for text in texts)
