"""Where variety is lost: states that are real until T_j, and variance by band."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import Config
from pyramid import decompose, reconstruct
from schedule import Schedule
from studies import variety

STARTS = (0.0, 0.5, 0.8)


@pytest.mark.parametrize("scale", [(), (3.0, 0.8, 0.6)])
@pytest.mark.parametrize("j", [1, 2])
def test_real_until_hands_the_network_the_states_of_training(j, scale):
    """A velocity that ends at x1 from wherever it is: every image comes back, and the first state is the real one. A
    noise scale is that of the bands that enter later."""
    schedule, x1, seen = Schedule(STARTS, noise_scale=scale), torch.rand(4, 1, 16, 16, dtype=torch.float64), []
    bands = schedule.split(x1)

    def model(xt, t, y):
        seen.append((t[0].item(), xt, y))
        alpha, sigma, d_alpha, d_sigma = zip(*(schedule.coefficients(i, t[0]) for i in range(len(xt))), strict=True)
        return [d_alpha[i] * bands[i] + d_sigma[i] * (x - alpha[i] * bands[i]) / sigma[i] for i, x in enumerate(xt)]

    run = SimpleNamespace(schedule=schedule, device="cpu", shape=(1, 16, 16), model=model)
    images = variety.real_until(run, j, x1, torch.arange(4), solver="midpoint", steps=20)
    assert torch.allclose(images, x1, atol=1e-5)
    t, state, y = seen[0]
    assert t == pytest.approx(STARTS[j]) and len(state) == j + 1 and y.tolist() == [0, 1, 2, 3]
    alphas = [(t - start) / (1 - start) for start in STARTS[: j + 1]]
    noise = [(x - alpha * band) / (1 - t) for x, alpha, band in zip(state, alphas, bands, strict=False)]
    for i, x in enumerate(noise):                           # of one white image, averaged: 1/4, then details
        expected = (0.25, 0.43, 0.87)[i] * (scale[j] if scale and i == j else 1)
        assert x.std().item() == pytest.approx(expected, rel=0.2)


def test_images_are_compared_with_others_than_those_they_go_on_from(monkeypatch):
    x1, labels, started = torch.arange(8).view(8, 1, 1, 1), np.arange(8) % 3, []
    dataset = SimpleNamespace(classes=["a", "b", "c"],
                              held_out=lambda: SimpleNamespace(reference=lambda count: (x1, labels)))
    run = SimpleNamespace(cfg=Config(solver="euler", solver_steps=2), device="cpu", decode=lambda x: x.numpy())
    monkeypatch.setattr(variety.batches, "load", lambda cfg: dataset)
    monkeypatch.setattr(variety, "load_classifier", lambda *_: None)
    monkeypatch.setattr(variety.sample, "generate", lambda run, num, y, **_: (10 + y.numpy(), {}))
    monkeypatch.setattr(variety, "real_until", lambda run, j, x1, y, seed=0, **_: started.append(
        (j, y.tolist(), seed)) or x1)
    monkeypatch.setattr(variety, "scores", lambda real, images, labels, judge: [
        side.flatten().tolist() for side in (*real, images, labels)])
    others, own = [[4, 5, 6, 7], [1, 2, 0, 1]], [0, 1, 2, 0]
    assert list(variety.measured(run, 4, batch=2)) == [
        ("real images", [*others, [0, 1, 2, 3], own]), ("lapflow, starts 0.5", [*others, [10, 11, 12, 10], own]),
        ("... real until 0.5", [*others, [0, 1, 2, 3], own])]
    assert started == [(1, [0, 1], 0), (1, [2, 0], 2)]      # no noise twice


class Judge:
    name = identity = "classifier"

    def __call__(self, images):
        return images.reshape(len(images), 32, 32)[:, ::8, ::8].reshape(len(images), -1).astype(np.float64)

    def classify(self, features):
        return np.zeros(len(features), int)


def test_the_variance_is_that_of_the_principal_components():
    """Eight directions of which half is lost, in classes with means of their own; the noise around them stays."""
    generator, labels = np.random.default_rng(0), np.arange(1600) % 2
    wide = 8 * generator.standard_normal((1600, 8)) @ np.linalg.qr(generator.standard_normal((1024, 8)))[0].T * 4
    noise = 2 * generator.standard_normal((1600, 1024)) + 100 + 30 * labels[:, None]
    real, changed = ((noise + part).round().clip(0, 255).astype(np.uint8).reshape(-1, 32, 32, 1) for part in (
        wide, wide / 2))
    scores = variety.scores((real, labels), changed, labels, Judge())
    assert scores["component_variance"] == pytest.approx([0.25, 1, 1], abs=0.05)


def test_the_variance_is_that_of_each_band():
    generator, labels = np.random.default_rng(0), np.arange(400) % 2
    real = generator.integers(60, 190, (400, 32, 32, 1)).astype(np.uint8)
    bands = decompose(torch.from_numpy(real).permute(0, 3, 1, 2).float(), 3)
    changed = reconstruct([bands[0], bands[1], 0.5 * bands[2]]).permute(0, 2, 3, 1).round().byte().numpy()

    same, other = (variety.scores((real, labels), images, labels, Judge()) for images in (real, changed))
    assert same["frechet"] == pytest.approx(0, abs=1e-6) and same["band_variance"] == pytest.approx([1, 1, 1])
    assert same["label_agreement"] == 0.5 and same["class_variance"] == pytest.approx(1)
    assert other["band_variance"] == pytest.approx([1, 1, 0.25], abs=0.01) and other["frechet"] > 10


def test_the_table_shows_real_images_once():
    line = {"row": "real images", "frechet": 1.234, "label_agreement": 0.9, "recall": 0.8, "class_variance": 1.0,
            "band_variance": [0.9, 1.0, 1.1], "component_variance": [0.5, 1.0, 1.25], "num": 10,
            "hardware": "a box", "versions": "v", "commit": "c"}
    text = variety.table([line, {**line, "row": "lapflow"}, line])
    row = "| lapflow | 1.23 | 0.900 | 0.800 | 1.000 | 0.900, 1.000, 1.100 | 0.50, 1.00, 1.25 |"
    assert text.count("real images") == 1 and row in text
