import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import sample
import train
from config import UserError
from conftest import read_samples, tiny
from data.batches import Images, digits, to_images
from data.conditions import Labels, Vectors
from fid import frechet_distance, precision, recall
from run import gallery, load
from run.ranks import Ranks
from scores import features
from scores.classes import class_scores, class_variance

rng = np.random.default_rng(0)


def test_frechet_distance_of_shifted_statistics_is_the_shift():
    root = rng.standard_normal((20, 20))
    covariance, shift = root @ root.T, rng.standard_normal(20)
    assert frechet_distance(np.zeros(20), covariance, shift, covariance) == pytest.approx((shift**2).sum(), rel=1e-9)
    assert frechet_distance(shift, covariance, shift, covariance) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_commuting_covariances():
    """Diagonal covariances: sum of (sqrt a - sqrt b)^2."""
    a, b = rng.random(30), rng.random(30)
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(np.zeros(30), np.diag(a), np.zeros(30), np.diag(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_equals_the_matrix_square_root():
    from scipy.linalg import sqrtm

    x, y = rng.standard_normal((200, 12)), rng.standard_normal((150, 12)) @ rng.standard_normal((12, 12)) + 0.3
    first, second = fid.statistics(x), fid.statistics(y)
    root = np.asarray(sqrtm(first[1] @ second[1])).real
    expected = ((first[0] - second[0]) ** 2).sum() + np.trace(first[1] + second[1] - 2 * root)
    assert frechet_distance(*first, *second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(*second, *first) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_singular_covariances_is_finite_and_symmetric():
    first, second = (fid.statistics(rng.standard_normal((8, 40))) for _ in range(2))
    distance = frechet_distance(*first, *second)
    assert np.isfinite(distance) and distance > 0
    assert distance == pytest.approx(frechet_distance(*second, *first), rel=1e-6)


def coverage_by_loops(points, centres, k):
    inside = 0
    for p in points:
        for i, c in enumerate(centres):
            others = sorted(np.linalg.norm(c - centres[j]) for j in range(len(centres)) if j != i)
            if np.linalg.norm(p - c) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_their_definition(k):
    real, fake = rng.standard_normal((40, 3)), 0.7 * rng.standard_normal((30, 3)) + 0.5
    assert precision(real=real, fake=fake, k=k) == pytest.approx(coverage_by_loops(fake, real, k))
    assert recall(real=real, fake=fake, k=k) == pytest.approx(coverage_by_loops(real, fake, k))


def test_a_collapsed_generator_has_precision_and_no_recall():
    real = rng.standard_normal((500, 8))
    fake = real[:1] + 1e-3 * rng.standard_normal((500, 8))
    assert precision(real=real, fake=fake) > 0.99
    assert recall(real=real, fake=fake) < 0.01
    # one point repeated exactly: its own neighbours are at distance zero
    fake = np.repeat(real[:1], 500, axis=0)
    assert precision(real=real, fake=fake) == 1 and recall(real=real, fake=fake) == 1 / 500


def test_the_same_images_have_full_precision_and_recall():
    real = rng.standard_normal((1200, 5))                                       # more than one chunk
    assert precision(real=real, fake=real) == 1 and recall(real=real, fake=real) == 1
    far = real + 100
    assert precision(real=real, fake=far) == 0 and recall(real=real, fake=far) == 0


def test_precision_needs_more_images_than_neighbours():
    with pytest.raises(UserError, match="more than 3"):
        precision(real=np.zeros((3, 2)), fake=np.zeros((10, 2)))


def test_scores_that_mean_nothing_are_left_out():
    same = np.repeat(rng.integers(0, 256, (1, 8, 8, 1)), 20, axis=0).astype(np.uint8)
    scores = fid.score(same, np.zeros(20, int), same, np.zeros(20, int))
    assert "novelty" not in scores and "class_variance" not in scores and abs(scores["frechet_pixel"]) < 1e-12
    assert fid.table(scores)


def test_class_variance_is_that_of_the_generated_images_over_that_of_the_real_ones():
    labels = np.arange(40) % 2
    real = rng.standard_normal((40, 3)) + 10 * labels[:, None]                  # how far classes are apart is no matter
    assert class_variance(real, labels, real / 2, labels)["class_variance"] == pytest.approx(1 / 4)


def test_scores_tell_real_digits_from_wrong_ones():
    dataset = digits()
    images, labels = dataset.reference(1797)
    images = to_images(images)
    half = np.arange(1797) % 2 == 0
    good = fid.score(images[half], labels[half], images[~half], labels[~half])
    assert good["frechet_pixel"] == pytest.approx(0.06, abs=0.03)               # the two halves of the real data
    assert good["label_agreement"] > 0.97 and good["class_variance"] == pytest.approx(1, abs=0.05)
    assert good["novelty"] == pytest.approx(1, abs=0.05) and good["precision"] > 0.85 and good["recall"] > 0.85
    copies = fid.score(images[half], labels[half], images[half][:400], labels[half][:400])
    assert copies["novelty"] == 0
    wrong = fid.score(images[half], labels[half], images[~half], (labels[~half] + 1) % 10)
    assert wrong["label_agreement"] < 0.03
    noise = fid.score(images[half], labels[half], rng.integers(0, 256, images[~half].shape).astype(np.uint8))
    assert noise["frechet_pixel"] > 2 and noise["precision"] < 0.05 and "label_agreement" not in noise
    text = fid.table(good)
    assert "898 generated images against 899" in text and "label_agreement" in text


def test_real_images_are_scored_beside_the_generated_ones():
    dataset = digits()
    images, labels = dataset.reference(500, seed=4)
    images = to_images(images)
    scores = fid.evaluate(dataset, images, labels, to_images)
    assert scores["n"] == scores["real"]["n"] == 500 and scores["real"]["n_reference"] == 1297
    assert scores["novelty"] == 0 and scores["real"]["novelty"] == pytest.approx(1, abs=0.1)
    assert scores["real"]["label_agreement"] > 0.97
    sevens = labels == 7
    scores = fid.evaluate(dataset, images[sevens], labels[sevens], to_images)
    assert scores["n_reference"] == (dataset.labels == 7).sum()


def test_the_table_has_the_kernel_distance_in_thousandths():
    scores = {"n": 9, "n_reference": 9, "name": "FID-9", "kid": 0.0123, "recall": 0.5, "real": {"kid": 0.002}}
    rows = {row.split()[0]: row.split()[1:3] for row in fid.table(scores).splitlines()}
    assert rows["kid"] == ["12.3000", "2.0000"] and rows["recall"][0] == "0.5000"


def test_a_classifier_of_the_real_images_judges_the_generated_ones():
    """Of a collapsed generator: one image of each class, many times. A classifier of those would know little."""
    images, labels = digits().reference(1000)
    known, asked = fid.pixel_features(to_images(images)), np.arange(200) % 10
    fake = known[[np.flatnonzero(labels == c)[0] for c in range(10)]][asked]
    assert class_scores(known, labels, fake, asked)["label_agreement"] == 1


def test_a_run_is_not_scored_on_other_classes(tmp_path, monkeypatch, call):
    train.train(tiny(tmp_path, "out/run", steps=1), device="cpu")
    other = Images(digits().pixels, digits().labels, list("abcdefghij"))
    monkeypatch.setattr(fid.batches, "load", lambda cfg: other)
    with pytest.raises(UserError, match="the data of .*run has changed: it was trained on the classes"):
        call(fid.main, "out/run", "--num", "10")


def test_files_are_scored_against_the_data_of_the_run_that_drew_them(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        for i in range(20):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (i if name == "first" else 200 + i,) * 3).save(tmp_path / name / f"{i}.png")
        train.train(tiny(tmp_path, f"out/{name}", steps=1, dataset="folder", data=name, res=8), device="cpu")
        if name == "first":
            program("sample.py", "out/first", "-n", "20", "--steps", "2", "--solver", "heun")
    out = program("fid.py", "out/first/samples/samples.npz")
    assert "samples    out/first/samples/samples.npz\n" in out and "against    the data of out/first\n" in out


def test_changed_images_are_a_warning(tmp_path, monkeypatch, call):
    train.train(tiny(tmp_path, "out/run", steps=1), device="cpu")
    other = digits()
    other.fingerprint = "other"
    monkeypatch.setattr(fid.batches, "load", lambda cfg: other)
    out = call(fid.main, str(tmp_path / "out" / "run"), "--num", "10", "--steps", "2", "--solver", "heun")
    assert "was trained on other images than its data are now" in out


def test_one_image_is_no_statistics_even_by_force():
    with pytest.raises(UserError, match="1 images are too few for 64 features"):
        fid.check_enough(1, 64, force=True)


def test_scores_do_not_depend_on_the_order():
    images, labels = digits().reference(400)
    images = to_images(images)
    shuffle = np.random.default_rng(1).permutation(200)
    scores = fid.score(images[:200], labels[:200], images[200:], labels[200:])
    again = fid.score(images[:200], labels[:200], images[200:][shuffle], labels[200:][shuffle])
    assert all(scores[name] == pytest.approx(again[name]) for name in scores)


def test_copies_of_any_training_image_are_found():
    """Also where there are more of them than the scores look at otherwise."""
    pixels = rng.integers(0, 256, (12_500, 1, 8, 8)).astype(np.uint8)
    test = Images(pixels[:60], np.zeros(60, int), ["a"])
    for held_out in (None, lambda: test):
        dataset = Images(pixels[60:], np.zeros(12_440, int), ["a"], False, held_out=held_out)
        copies = pixels[-300:].transpose(0, 2, 3, 1)
        scores = fid.evaluate(dataset, copies, np.zeros(300, int), to_images)
        assert scores["novelty"] < 1e-6 and scores["n_train"] == 12_440
        assert scores["real"]["novelty"] == pytest.approx(1, abs=0.1)


def test_training_images_are_read_once():
    """By the scores of --eval-every, too; and not all of a set of millions."""
    pixels, seen = rng.integers(0, 256, (360, 1, 8, 8)).astype(np.uint8), []
    test = Images(pixels[300:], np.arange(60) % 2)
    dataset = Images(pixels[:300], np.arange(300) % 2, ["a", "b"], held_out=lambda: test)
    plain = dataset.plain
    dataset.plain = lambda index: seen.append(len(index)) or plain(index)
    scores = [fid.evaluate(dataset, pixels[:40].transpose(0, 2, 3, 1), np.arange(40) % 2, to_images) for _ in range(2)]
    assert scores[0] == scores[1] and scores[0]["n_train"] == sum(seen) == 300
    large = Images(np.zeros((60_400, 1, 1, 1), np.uint8), np.zeros(60_400, int))
    assert [len(fid.originals(large, count, to_images)) for count in (2000, 60_300)] == [60_000, 60_300]
    large.originals, large.latent = None, {"sha256": ""}
    assert len(fid.originals(large, 2000, to_images)) == 2000


def test_a_rare_class_is_compared_with_all_its_images_and_none_are_floats_together():
    """Two images in a thousand show it: not by chance none among the two thousand that are read."""
    pixels, labels = rng.integers(0, 256, (6000, 1, 8, 8)).astype(np.uint8), np.zeros(6000, int)
    labels[100:112], labels[200:203] = 1, 2
    dataset, seen = Images(pixels, labels, ["a", "b", "c"]), []
    plain, fake = dataset.plain, pixels[:40].transpose(0, 2, 3, 1)
    dataset.plain = lambda index: seen.append(len(index)) or plain(index)
    assert fid.evaluate(dataset, fake, np.ones(40, int), to_images)["n_reference"] == 12
    assert fid.evaluate(dataset, fake, np.arange(40) % 2, to_images)["n_reference"] == 24
    assert fid.evaluate(dataset, fake, (np.arange(40) < 1).astype(int), to_images)["n_reference"] == 2000
    assert max(seen) == 256
    with pytest.raises(UserError, match="^the data show 3 images of these classes: scores need at least 5$"):
        fid.evaluate(dataset, fake, np.full(40, 2), to_images)


def test_the_scores_of_a_model_from_the_hub_are_written_here(tmp_path, monkeypatch, program, give_up):
    cfg = tiny(tmp_path, steps=1)
    train.train(cfg, device="cpu")
    monkeypatch.chdir(tmp_path)
    run = load.load_run(cfg.out, device="cpu")
    monkeypatch.setattr(fid.load, "load_run", lambda *given: run)
    program("fid.py", "OWNER/NAME", "--num", "10", "--solver", "euler", "--steps", "2")
    assert (tmp_path / "scores.json").exists() and not (Path(cfg.out) / "scores.json").exists()
    (tmp_path / "scores.json").unlink()
    (tmp_path / "scores.json").mkdir()
    error = give_up("fid.py", "OWNER/NAME", "--num", "10", "--solver", "euler", "--steps", "2")
    assert error.startswith("error: the scores cannot be written to .: ")


def test_the_variance_inside_small_classes_is_not_smaller():
    """Three images of each class against thirty of the same law: 1 on average."""
    real, fake = rng.standard_normal((9000, 20)), rng.standard_normal((900, 20))
    scores = class_variance(real, np.arange(9000) % 300, fake, np.arange(900) % 300)
    assert scores["class_variance"] == pytest.approx(1, abs=0.05)


def test_folders_of_images_have_the_classes_of_the_run(tmp_path):
    for name in ("3", "7"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    _, ((_, read),) = gallery.open_samples(tmp_path, classes=[str(i) for i in range(10)])
    assert read()[1].tolist() == [3, 7]
    _, ((_, read),) = gallery.open_samples(tmp_path)
    assert read()[1].tolist() == [0, 1]
    with pytest.raises(UserError, match="there is no label '3'"):
        gallery.open_samples(tmp_path, classes=["a", "b"])


def test_pixel_features_average_to_8_by_8():
    image = rng.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    features = fid.pixel_features(image)
    assert features.shape == (2, 192)
    assert features[1].reshape(3, 8, 8)[2, 0, 1] == pytest.approx(image[1, :4, 4:8, 2].mean() / 255)


def test_classes_in_turn_are_compared_with_as_many_real_images_of_each():
    """A perfect generator of nine images of one class for one of the other is not far from the data."""
    labels = (np.arange(3000) % 10 == 0).astype(int)
    pixels = (rng.integers(0, 60, (3000, 1, 8, 8)) + 150 * labels[:, None, None, None]).astype(np.uint8)
    dataset = Images(pixels, labels, ["a", "b"])
    y = np.arange(200) % 2                                  # drawn in turn
    fake = (rng.integers(0, 60, (200, 8, 8, 1)) + 150 * y[:, None, None, None]).astype(np.uint8)
    scores = fid.evaluate(dataset, fake, y, to_images)
    assert scores["n_reference"] == 600 and scores["frechet_pixel"] < 2 * scores["real"]["frechet_pixel"]
    drawn = (np.arange(200) % 10 == 0).astype(int)          # in the data's proportions: all of them
    assert fid.evaluate(dataset, fake, drawn, to_images)["n_reference"] == 2000
    nearly = np.repeat([0, 1], (600, 500))
    assert len(fid.rows_of_classes(nearly, y)) == 1100 and len(fid.rows_of_classes(np.zeros(30, int), y)) == 30


# ---------------------------------------------------------------------------------------------------------------------
# test splits, vectors, and the features of a network


def halves() -> tuple[Images, Images]:
    """The digits as a training set and a test split."""
    whole = digits()
    test = Images(whole.pixels[:900], whole.labels[:900], whole.classes)
    return Images(whole.pixels[900:], whole.labels[900:], whole.classes, held_out=lambda: test), test


def test_real_images_come_from_the_test_split():
    train, test = halves()
    images, labels = train.reference(400)                   # copies of the training images
    scores = fid.evaluate(train, to_images(images), labels, to_images)
    assert scores["split"] == "test" and scores["n_reference"] == 900 and scores["real"]["n_reference"] == 500
    assert scores["novelty"] == 0 and scores["real"]["novelty"] == pytest.approx(1, abs=0.1)
    assert "against 900 of the test set; real: 400" in fid.table(scores)
    images, labels = test.reference(900)                    # a generator that is as good as the test split
    scores = fid.evaluate(train, to_images(images), labels, to_images)
    assert scores["frechet_pixel"] == pytest.approx(0, abs=1e-6) and scores["novelty"] == pytest.approx(1, abs=0.05)


def test_vectors_have_no_labels_to_agree_with():
    dataset = digits()
    dataset.use_vectors(dataset.pixels.mean(axis=(2, 3)).astype(np.float32))
    images, vectors = dataset.reference(300)
    assert vectors.shape == (300, 1)
    for y in (torch.from_numpy(vectors), None):
        scores = fid.evaluate(dataset, to_images(images), y, to_images)
        assert "label_agreement" not in scores and "class_variance" not in scores and scores["n_reference"] == 1797
        scores = fid.evaluate(dataset, to_images(images), y, to_images, features.Pixels())
        assert "class_variance" not in scores["real"] and scores["real"]["n"] == 300


class Reader:
    """Pixels, classified by the nearest of the digits: a classifier without errors."""

    name, identity = "classifier", "classifier x"

    def __init__(self):
        images, self.labels = digits().reference(1797)
        self.known = torch.from_numpy(features.pixel_features(to_images(images)))

    def __call__(self, images):
        return features.pixel_features(images).astype(np.float32)

    def classify(self, values):
        return self.labels[torch.cdist(torch.from_numpy(values).double(), self.known).argmin(dim=1)]


def test_features_are_compared_with_equal_n_on_all_sides():
    dataset = digits()
    images, labels = dataset.reference(1000, seed=4)
    images = to_images(images)
    scores = fid.evaluate(dataset, images, labels, to_images, Reader())
    assert [scores[name] for name in ("n", "n_reference", "name")] == [898, 898, "FRECHET-898"]     # half of 1797
    assert [scores["real"][name] for name in ("n", "n_reference")] == [898, 898] and scores["label_agreement"] == 1
    assert scores == fid.evaluate(dataset, images, labels, to_images, Reader())     # a fixed choice
    assert scores["class_variance"] == pytest.approx(1, abs=0.05) == scores["class_variance_pixel"]
    assert scores["real"]["frechet"] == pytest.approx(0.06, abs=0.03) and abs(scores["real"]["kid"]) < 1e-3
    wrong = fid.evaluate(dataset, images, (labels + 1) % 10, to_images, Reader())
    assert wrong["label_agreement"] == 0 and wrong["frechet"] == scores["frechet"]
    text = fid.table(scores)
    assert "898 generated images against 898" in text and "FRECHET-898" in text and "classifier x" in text
    with pytest.raises(UserError, match="60 images are too few for 64 features"):
        fid.evaluate(dataset, images[:60], labels[:60], to_images, Reader())
    assert fid.evaluate(dataset, images[:60], labels[:60], to_images, Reader(), force=True)["n"] == 60


# ---------------------------------------------------------------------------------------------------------------------
# the program, and sample files


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(fid.main, "run", "--num", "20"): what a program prints, run in this process."""
    def run(main, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("format", ["npz", "shards"])
def test_labels_of_sample_files_are_right_in_batches_of_any_size(format, tmp_path, call):
    train.train(tiny(tmp_path, "out/run", steps=1, ema=0.0), device="cpu")
    call(sample.main, "out/run", "-n", "23", "--batch", "7", "--format", format, "--out", "images")     # of ten classes
    images, labels = read_samples(tmp_path / "images")
    assert np.array_equal(labels, np.arange(23) % 10) and images.shape == (23, 8, 8, 1)
    call(sample.main, "out/run", "-n", "23", "--batch", "23", "--out", "whole")
    whole, labels = gallery.read_npz(tmp_path / "whole" / "samples.npz")
    assert np.array_equal(labels, np.arange(23) % 10) and abs(whole.astype(int) - images).max() <= 1
    out = call(fid.main, "images", "--record", "line.jsonl")
    assert "samples    images\nweights    raw at step 1" in out and "23 generated images" in out
    line = json.loads((tmp_path / "line.jsonl").read_text())
    assert line["samples"] == "images" and "label_agreement" in line and (tmp_path / "images" / "scores.json").exists()
    call(fid.main, "out/run", "--num", "23", "--batch", "7", "--precision", "bfloat16", "--record", "rounded.jsonl")
    rounded = json.loads((tmp_path / "rounded.jsonl").read_text())
    assert rounded["network_precision"] == "bfloat16" and 0 <= rounded["precision"] <= 1        # the network's, a score
    call(fid.main, "out/run", "--num", "23", "--batch", "7", "--record", "line.jsonl")
    direct = json.loads((tmp_path / "line.jsonl").read_text().splitlines()[1])
    for name in ("frechet_pixel", "precision", "label_agreement"):
        assert line[name] == pytest.approx(direct[name], rel=1e-9)


@pytest.mark.parametrize("condition, kind", [
    (Labels(["cat", "dog", "owl"], 8), "labels"), (Vectors(2, 8, torch.rand(5, 2)), "vectors"), (None, "none")])
def test_conditions_are_stored_and_read_back(condition, kind, tmp_path):
    images = rng.integers(0, 256, (11, 8, 8, 3)).astype(np.uint8)
    y = None if condition is None else condition.draw(11)
    samples = gallery.Gallery(tmp_path / "out", {"num": 11}, "npz", Ranks(0, 1, torch.device("cpu")))
    for chunk in samples.prepare(sample.chunks_of(11, 4)):
        samples.write(chunk, images[chunk.start : chunk.stop], None if y is None else y[chunk.start : chunk.stop],
                      {"first": chunk.start, "count": len(chunk)})
    samples.finish({"num": 11}, y, condition)
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert set(arrays) == {"images", "labels"} | ({"vectors"} if kind == "vectors" else set())
        assert np.array_equal(arrays["labels"], np.arange(11) % 3 if kind == "labels" else np.full(11, -1))
    again, read = gallery.read_npz(tmp_path / "out" / "samples.npz")
    assert np.array_equal(again, images) and np.array_equal(read, np.full(11, -1) if y is None else y.numpy())
    assert Image.open(tmp_path / "out" / "grid.png").size[0] > 100
    np.savez(tmp_path / "odd.npz", images=images, vectors=np.zeros((10, 2)))
    with pytest.raises(UserError, match=r"its vectors have the shape \(10, 2\)"):
        gallery.read_npz(tmp_path / "odd.npz")
