"""docs/figures.py: the pictures that are cheap, of a run of two steps, and what they claim."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import train
from config import UserError
from conftest import ROOT, random_model, run_here, tiny
from docs import figures, hero, steps
from run import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    cfg = tiny(tmp_path_factory.mktemp("figures"), steps=2, save_every=2, log_every=1)
    train.train(cfg, device="cpu")
    return load.load_run(cfg.out, device="cpu")


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw("hero", run=DIR): the files that python -m docs.figures draws."""
    def call(*names, **given):
        flags = {"compare": tmp_path, "out": tmp_path, **given}
        monkeypatch.setattr(sys, "argv", ["figures", *(["--only", *names] if names else []),
                                          *(str(word) for name in flags for word in (f"--{name}", flags[name]))])
        figures.main()
        return [tmp_path / f"{name}.png" for name in names]

    return call


def check(path, most=150_000):
    """It opens, is wide enough, is neither empty nor large, and has an opaque white border: for dark pages."""
    image = Image.open(path)
    assert image.mode in ("RGB", "RGBA", "P") and path.stat().st_size < most
    pixels = np.asarray(image.convert("RGBA"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all() and pixels.shape[1] > 700 and 20 < pixels[..., :3].std() < 120


def test_every_name_has_a_function_and_every_picture_of_the_readme_a_name():
    assert sorted([*figures.PLAIN, *figures.OF_DIGITS, *figures.OF_GARMENTS, *figures.SIDE_BY_SIDE]) == sorted(
        figures.NAMES)
    pages = "".join((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))
    pictures = re.findall(r"\]\((?:docs/)?([\w-]+)\.(?:png|gif)\)", pages)
    assert len(set(pictures)) > 10 and set(pictures) <= {*figures.NAMES, "demo"}     # of docs.demo_pictures


def test_pictures_without_a_run(draw):
    for path in draw("step1-pyramid", "step2-schedule", "step3-mask", "mask_cost", "study", "systems-flops",
                     "sampling-cost", "garments-flops"):
        check(path)


def test_pictures_of_a_run(draw, run):
    for path in draw("hero", "step4-training", "step5-sampling", "loss", "trajectory", run=run.folder):
        check(path)


def test_the_animation(tmp_path, run):
    hero.generation(tmp_path / "generation.gif", run, count=3, steps=6)
    with Image.open(tmp_path / "generation.gif") as image:
        assert image.n_frames == 7 and image.info["loop"] == 0 and image.width > 800
        pauses, last = [], []
        for frame in range(7):
            image.seek(frame)
            pauses.append(image.info["duration"])
            last.append(np.asarray(image.convert("RGB")))
    assert pauses[-1] > 2000 and max(pauses[1:-1]) < 200
    assert all((a != b).any() for a, b in zip(last, last[1:], strict=False))


def test_pictures_of_generated_images(draw, run, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "command", lambda _, module, *words: run_here(monkeypatch, tmp_path, module, *words))
    for path in draw("samples", "previews", "refined", "variations", "upsampled", run=run.folder):
        assert np.asarray(Image.open(path).convert("L")).std() > 5


def test_the_mask_is_the_codes():
    reads = steps.readers([3, 4, 16], 2)
    expected = np.zeros((23, 23), bool)
    for begin, end in ((0, 3), (3, 7), (7, 23)):
        expected[begin:end, :end] = True
    assert (reads == expected).all()


def test_the_steps_of_dopri5_are_recognised():
    """Against the steps that torchdiffeq reports as accepted, with some that it refused."""
    from torchdiffeq import odeint

    class Field(torch.nn.Module):
        times, accepted, refused = [], [], 0

        def forward(self, t, x):
            self.times.append(t.item())
            return torch.cos(60 * t.square()) * 40 - x

        def callback_accept_step(self, t0, x, dt):
            self.accepted.append((t0 + dt).item())

        def callback_reject_step(self, t0, x, dt):
            self.refused += 1

    field = Field()
    odeint(field, torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=1e-4,
           atol=1e-4, method="dopri5", options={"step_t": torch.tensor([1.0], dtype=torch.float64)})
    steps_of = steps.accepted(field.times, 1.0)
    assert field.refused and np.allclose([t for t, _ in steps_of], field.accepted)
    assert steps_of[-1][1] == len(field.times)


def test_errors(tmp_path, draw, run, capsys, monkeypatch):
    with pytest.raises(UserError, match="systems.png stays as it is"):
        draw("systems")
    monkeypatch.setattr(figures, "NAMES", ("systems", "step3-mask"))
    draw()                                                  # the others are drawn
    assert "systems.png stays as it is" in capsys.readouterr().out and (tmp_path / "step3-mask.png").exists()
    monkeypatch.setattr(figures, "NAMES", ("hero", "loss", "step3-mask"))
    with pytest.raises(UserError, match="no run directory"):
        draw("hero", run=tmp_path / "nowhere")
    other = load.Run(tiny(tmp_path, num_scales=1), random_model(), run.facts, run.folder, 1, "raw")
    monkeypatch.setattr(load, "load_run", lambda *_, **__: other)
    with pytest.raises(UserError, match="two bands"):
        draw("loss", run=run.folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        draw("step3-mask", out=tmp_path / "file")
