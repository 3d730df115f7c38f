"""Labels and vectors: embedding, null, draw, captions, what the command line asks for, guidance, training, exports."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import config
import sample
import schedule
import train
from conftest import random_bands, random_model, same, state, tiny
from data import batches
from data.conditions import Labels, Vectors, choose
from run import load
from run.memory import forward_flops, meta_model, parameters

EXAMPLES = torch.tensor([[0.0, 10.0], [1.0, 30.0], [2.0, 20.0]])
TIMES = torch.tensor([0.7, 0.9])


def conditions() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"labels": Labels(["cat", "dog", "owl"], 8), "vectors": Vectors(2, 8, EXAMPLES)}


KINDS = pytest.mark.parametrize("kind", conditions())

# ---------------------------------------------------------------------------------------------------------------------
# the seam: what every condition offers


@KINDS
def test_an_embedding_for_each_row(kind):
    condition = conditions()[kind]
    y = condition.draw(5)
    assert len(y) == 5 and y.device.type == "cpu" and condition(y).shape == (5, 8)
    assert torch.equal(y[:2], y[3:])                        # three in turn
    assert torch.allclose(condition(y[1:2]), condition(y)[1:2], atol=1e-6)      # rows do not mix
    assert len({tuple(row) for row in condition(y)[:3].tolist()}) == 3


@KINDS
def test_the_null_is_one_more_condition_shaped_like_y(kind):
    condition = conditions()[kind]
    nn.init.normal_(getattr(condition, "absent", torch.empty(1)))
    y = condition.draw(3)
    null = condition.null(y)
    assert null.shape == y.shape and null.dtype == y.dtype
    embedding = condition(null)
    assert embedding.isfinite().all() and torch.equal(embedding[0], embedding[1])
    assert not any(torch.allclose(embedding[0], row) for row in condition(y))
    mixed = torch.where(torch.tensor([True, False, True]).view(-1, *[1] * (y.dim() - 1)), null, y)
    assert torch.allclose(condition(mixed)[1], condition(y)[1], atol=1e-6)
    assert torch.equal(condition(mixed)[0], embedding[0])


@KINDS
def test_captions(kind):
    condition = conditions()[kind]
    assert condition.describe(condition.draw(4)) == {"labels": ["cat", "dog", "owl", "cat"],
                                                     "vectors": ["0", "1", "2", "3"]}[kind]
    assert Vectors(1, 8, EXAMPLES[:, :1]).describe(EXAMPLES[:, :1]) == ["0.00", "1.00", "2.00"]


@KINDS
def test_gradients_are_finite_also_where_a_row_is_null(kind):
    condition = conditions()[kind]
    y = condition.draw(4)
    y[::2] = condition.null(y)[::2]
    condition(y).square().sum().backward()
    for name, parameter in condition.named_parameters():
        assert parameter.grad.isfinite().all(), name
    condition.zero_grad()
    condition(condition.null(y)).sum().backward()           # nothing but the null learns from null rows
    if kind == "labels":
        assert (condition.table.weight.grad.abs().sum(dim=1) > 0).tolist() == [False, False, False, True]
    else:
        assert {name for name, p in condition.named_parameters() if p.grad.abs().sum() > 0} == {"absent"}


def test_vectors_are_scaled_by_their_examples():
    """So that embeddings of any unit train at the same rates."""
    one, other = (Vectors(2, 8, EXAMPLES * scale + shift) for scale, shift in ((1, 0), (1000.0, -7.0)))
    other.load_state_dict({**one.state_dict(), "examples": other.examples})
    assert torch.allclose(one(EXAMPLES), other(EXAMPLES * 1000 - 7), atol=1e-4)
    assert "examples" in one.state_dict() and "examples" not in dict(one.named_parameters())


def test_a_number_that_is_the_same_in_all_examples_does_not_explode():
    """A rare attribute: zero in every example, one in an image that is not among them."""
    condition = Vectors(2, 8, torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]))
    condition(torch.tensor([[1.0, 1.0]])).square().sum().backward()
    assert condition.mlp[0].weight.grad.abs().max() < 1e3


# ---------------------------------------------------------------------------------------------------------------------
# what the command line asks for


def test_labels():
    condition = Labels(["cat", "dog", "owl"], 8)
    assert choose(condition, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert choose(condition, 2, "2").tolist() == [2, 2] == choose(condition, 2, "owl").tolist()
    assert choose(condition, 2).dtype == choose(condition, 2, "dog").dtype == torch.long
    assert choose(None, 3) is None
    for wrong in ("3", "-1", "cow", "1.5", "", "٣", 5000 * "9"):
        with pytest.raises(config.UserError, match="no label"):
            choose(condition, 2, wrong)
    with pytest.raises(config.UserError, match="this run was trained without classes: leave out the labels"):
        choose(None, 2, "1")
    numbered = Labels(["1", "9", "10"], 8)                  # "1" could be a name or a position
    assert choose(numbered, 1, "9").tolist() == [1] and choose(numbered, 1, "1").tolist() == [0]
    with pytest.raises(config.UserError, match="'1' to '10'"):
        choose(numbered, 1, "2")


def test_vectors_of_a_file(tmp_path):
    condition, file = Vectors(2, 8, EXAMPLES), str(tmp_path / "x.npy")
    assert torch.equal(choose(condition, 4), EXAMPLES[[0, 1, 2, 0]])
    for dtype in (np.float32, np.float64, np.float16, np.int64):
        np.save(file, np.array([[1, 2], [3, 4]], dtype))
        assert choose(condition, 3, vectors=file).tolist() == [[1, 2], [3, 4], [1, 2]]
        assert choose(condition, 3, vectors=file).dtype == torch.float32


@pytest.mark.parametrize("content", [
    np.zeros((3, 3)), np.zeros((0, 2)), np.zeros(2), np.zeros((1, 2, 2)), np.array(1.0), np.full((2, 2), np.nan),
    np.array([[1.0, np.inf]]), np.array([[1e300, 0.0]]), np.array([["a", "b"]]), np.array([[1, 2]], dtype=object),
    b"", b"hello", b"\x93NUMPY", b"PK\x03\x04 a broken archive", None])
def test_a_file_of_vectors_that_does_not_fit_is_one_sentence(tmp_path, content):
    file = tmp_path / "x.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content, allow_pickle=True)
    with pytest.raises(config.UserError, match="x.npy") as problem:
        choose(Vectors(2, 8, EXAMPLES), 4, vectors=str(file))
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("condition, asked, words", [
    (Labels(["a"], 8), dict(vectors="x.npy"), "this run was trained on labels: leave out the vectors"),
    (None, dict(vectors="x.npy"), "trained without classes"),
    (Vectors(2, 8, EXAMPLES), dict(labels="a"), "this run was trained on vectors: leave out the labels")])
def test_what_the_run_does_not_have(condition, asked, words):
    with pytest.raises(config.UserError, match=words):
        choose(condition, 2, **asked)


# ---------------------------------------------------------------------------------------------------------------------
# in a network


def network(kind: str, **settings):
    if kind == "labels":
        return random_model(**settings)
    return random_model(num_classes=0, condition=partial(Vectors, 2, examples=EXAMPLES), **settings)


@KINDS
def test_guidance_zero_is_unconditional_one_is_conditional_and_two_extrapolates(kind):
    model = network(kind)
    bands, y = random_bands(model), model.condition.draw(3)[1:]
    with torch.no_grad():
        null, conditional = model(bands, TIMES, model.condition.null(y)), model(bands, TIMES, y)
        unasked = model(bands, TIMES)
    for scale in (0.0, 1.0, 2.0, 1.5):
        for v, v_null, v_cond in zip(sample.Guided(model, scale)(bands, TIMES, y), null, conditional, strict=True):
            assert torch.allclose(v, v_null + scale * (v_cond - v_null), atol=1e-5)
            assert (v_cond - v_null).abs().max() > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(unasked, null, strict=True))   # no condition means the null


@KINDS
def test_the_condition_reaches_every_band_with_and_without_tokens(kind):
    for tokens in (True, False):
        model = network(kind, condition_tokens=tokens)
        assert model.num_cond == (2 if tokens else 0)
        bands, y = random_bands(model), model.condition.draw(3)
        for a, b in zip(model(bands, TIMES, y[:2]), model(bands, TIMES, y[1:]), strict=True):
            assert (a - b).abs().max() > 1e-3


@KINDS
def test_one_step_moves_every_weight_of_the_condition(kind):
    """Of a network that has left its initial zeros; half of the rows are null."""
    model = network(kind)
    y = model.condition.draw(8)
    y[::2] = model.condition.null(y)[::2]
    total, _ = schedule.loss(model, torch.randn(8, 2, 16, 16), y, schedule.Schedule((0.0, 0.3, 0.7)),
                             batches.BatchRandom(0, 0, 8))
    total.backward()
    for name, parameter in model.condition.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


# ---------------------------------------------------------------------------------------------------------------------
# in a run


def folder_of_digits(root: Path, count: int = 24) -> Path:
    """PNG files of digits, and vectors.npy: the mean brightness of each, in 0..1."""
    from sklearn.datasets import load_digits

    pixels = np.rint(load_digits().images[:count] * (255 / 16)).astype(np.uint8)
    root.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(root / f"{i:04d}.png")
    np.save(root / "vectors.npy", pixels.mean(axis=(1, 2), dtype=np.float64)[:, None] / 255)
    return root


@pytest.fixture
def on_vectors(tmp_path):
    return tiny(tmp_path, dataset="folder", data=str(folder_of_digits(tmp_path / "images")), condition="vectors",
                steps=4, log_every=2)


def test_a_run_on_labels_trains(tmp_path):
    cfg = tiny(tmp_path, steps=4)
    train.train(cfg, device="cpu")
    assert state(cfg)["data"]["vectors"] is None and state(cfg)["model"]["condition.table.weight"].shape == (11, 32)


def test_a_run_on_vectors_trains_continues_and_samples(on_vectors, give_up, monkeypatch, tmp_path, capsys):
    train.train(on_vectors, device="cpu")
    whole = state(on_vectors)
    assert whole["data"]["vectors"] == [24, 1] and whole["data"]["classes"] == []
    assert whole["model"]["condition.examples"].shape == (24, 1)
    assert whole["model"]["condition.absent"].abs().max() > 0                   # the null was trained
    parts = replace(on_vectors, out=str(tmp_path / "parts"), steps=2)
    train.train(parts, device="cpu")                        # stops in the middle
    train.train(replace(parts, steps=4), device="cpu")
    assert state(parts)["data"] == whole["data"]

    run = load.load_run(on_vectors.out, device="cpu")
    assert isinstance(run.condition, Vectors) and run.classes == []
    y = torch.linspace(0.1, 0.5, 6)[:, None]
    np.save(tmp_path / "asked.npy", y.numpy())
    monkeypatch.setattr(sys, "argv", ["sample.py", on_vectors.out, "-n", "9", "--vectors", str(tmp_path / "asked.npy"),
                                      "--cfg", "1.5", "--out", str(tmp_path / "drawn"), "--device", "cpu"])
    sample.main()
    with np.load(tmp_path / "drawn" / "samples.npz") as file:
        assert np.allclose(file["vectors"], y[torch.arange(9) % 6]) and file["images"].shape == (9, 8, 8, 3)
        assert file["labels"].tolist() == [-1] * 9
    assert (tmp_path / "drawn" / "grid.png").exists() and "guidance   1.5" in capsys.readouterr().out
    text = give_up("sample.py", on_vectors.out, "--labels", "3")
    assert "this run was trained on vectors: leave out the labels" in text and len(text.splitlines()) == 1

    load.export(run, tmp_path / "export")
    shared = load.load_run(str(tmp_path / "export"), device="cpu")
    assert same(shared.model.state_dict(), run.model.state_dict())
    images, _ = sample.generate(run, 3, y[:3], progress=False, solver="heun", steps=4)
    again, _ = sample.generate(shared, 3, y[:3], progress=False, solver="heun", steps=4)
    assert np.array_equal(images, again)


def test_fine_tuning_on_other_vectors_keeps_the_embedding_and_takes_their_examples(on_vectors, tmp_path, capsys):
    train.train(on_vectors, device="cpu")
    folder = folder_of_digits(tmp_path / "others")
    vectors = np.load(folder / "vectors.npy")
    np.save(folder / "vectors.npy", vectors + 50)
    cfg = replace(on_vectors, data=str(folder), out=str(tmp_path / "tuned"), init=on_vectors.out, lr=0.0, lr_end=0.0)
    train.train(cfg, device="cpu")
    tuned, old = state(cfg)["model"], state(on_vectors)["ema"]
    assert (tuned["condition.examples"] - old["condition.examples"]).mean() == pytest.approx(50)
    assert torch.equal(tuned["condition.mlp.0.weight"], old["condition.mlp.0.weight"])
    capsys.readouterr()
    train.train(replace(cfg, condition="labels", out=str(tmp_path / "labels")), device="cpu")
    assert "its condition (vectors of 1) differs from this run's" in capsys.readouterr().out


def test_a_run_remembers_its_kind_of_condition(on_vectors):
    train.train(on_vectors, device="cpu")
    with pytest.raises(config.UserError, match="condition was 'vectors' and is now 'labels'"):
        train.train(replace(on_vectors, condition="labels"), device="cpu")
    np.save(Path(on_vectors.data) / "vectors.npy", np.zeros((24, 1), np.float32))
    with pytest.raises(config.UserError, match="other images or classes|other images"):
        train.train(on_vectors, device="cpu")


def test_costs_of_a_network_on_vectors_are_counted(on_vectors):
    facts = {"channels": 3, "side": 8, "classes": [], "vectors": [256, 512], "count": 9, "fingerprint": "",
             "latent": None}
    model = meta_model(on_vectors, facts)
    without = meta_model(on_vectors, {**facts, "vectors": None})
    added = 512 * 32 + 32 * 32                              # of its two layers
    assert parameters(model) - parameters(without) == added + 3 * 32
    assert forward_flops(model)[0] - forward_flops(without)[0] > 2 * added      # and one token more in the sequence


@pytest.mark.slow
def test_brightness_asked_for_is_brightness_drawn(tmp_path):
    """Digits conditioned on their mean brightness alone."""
    folder = folder_of_digits(tmp_path / "images", 1797)
    cfg = config.Config(dataset="folder", data=str(folder), condition="vectors", flip=False, size="64,3,2,2", steps=400,
                        batch=64, lr=5e-3, warmup=50, ema=0.98, save_every=400, out=str(tmp_path / "run"))
    train.train(cfg, device="cpu")
    run, known = load.load_run(cfg.out, device="cpu"), np.load(folder / "vectors.npy")
    y = torch.linspace(*np.quantile(known, [0.02, 0.98]).tolist(), 200)[:, None]
    images, _ = sample.generate(run, 200, y, progress=False, solver="heun", steps=12)
    drawn = images.mean(axis=(1, 2, 3)) / 255
    correlation = np.corrcoef(drawn, y[:, 0])[0, 1]
    print(f"correlation {correlation:.3f}, mean error {np.abs(drawn - y[:, 0].numpy()).mean():.3f}")
    assert correlation > 0.9
    assert abs((drawn - y[:, 0].numpy()).mean()) < 0.02
