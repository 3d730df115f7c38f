"""Extractors, statistics, references, and the scores against them, each against an independent reference."""

import json
import shlex
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import features
import fid
from config import UserError
from conftest import ROOT

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


def gathered(array, sizes=(3, 50, 1, 46)) -> features.Statistics:
    result = features.Statistics(dict(HOW))
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
    order = features.Statistics(dict(HOW))                  # added by several processes, in any order
    for first in (60, 0, 30):
        order.add(x[first : first + 30 + 10 * (first == 60)], first=first)
    assert np.array_equal(order.all_features(), x) and np.allclose(order.cov, statistics.cov)
    with pytest.raises(UserError, match=r"must have the shape \(images, features\), not"):
        statistics.add(np.zeros((2, 3, 1)))


def test_of_many_images_a_fixed_random_choice_keeps_its_features(monkeypatch):
    monkeypatch.setattr(features, "KEEP", 10)
    x, many = np.arange(100, dtype=np.float32)[:, None], {}
    for sizes in ((100,), (7, 60, 33)):
        many[sizes] = features.Statistics(dict(HOW), total=100)
        for first, part in zip(np.cumsum((0, *sizes)), np.split(x, np.cumsum(sizes)[:-1]), strict=False):
            many[sizes].add(part, first=int(first))
        assert many[sizes].count == 100 and np.allclose(many[sizes].mean, 49.5)
    one, other = (statistics.all_features().ravel() for statistics in many.values())
    assert len(one) == 10 and np.array_equal(one, other) and one.max() - one.min() > 50


def test_frechet_distance_is_that_of_scipy_s_matrix_root():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((400, 30)), 0.7 * random.standard_normal((300, 30)) + 0.2
    (m1, c1), (m2, c2) = fid.statistics(a), fid.statistics(b)
    published = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(scipy.linalg.sqrtm(c1 @ c2)))
    assert fid.frechet_distance(m1, c1, m2, c2) == pytest.approx(published, rel=1e-6)


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
    statistics = features.Statistics(dict(HOW))
    statistics.add(fake + 1e-4 * random.standard_normal(fake.shape))
    scores = fid.compare(statistics, features.Reference(*fid.statistics(real), real, {"n": 1000}))
    assert scores["precision"] == 1.0 and scores["recall"] < 0.01 and scores["name"] == "FID-1k"
    many = random.standard_normal((200, 600))                                   # the way of many features
    assert fid.precision(real=many, fake=many) == 1.0 and fid.recall(real=many, fake=many + 100) == 0.0


def test_too_few_images_are_refused_unless_forced():
    statistics, reference = gathered(np.random.default_rng(0).standard_normal((20, 50)), (20,)), features.Reference(
        np.zeros(50), np.eye(50), None, {})
    with pytest.raises(UserError, match="20 images are too few for 50 features.*--force"):
        fid.compare(statistics, reference)
    scores = fid.compare(statistics, reference, force=True)
    assert scores["name"] == "FID-20" and "precision" not in scores             # mean and covariance alone
    assert [fid.title(n) for n in (50_000, 5_000, 2_048)] == ["50k", "5k", "2048"]


# ---------------------------------------------------------------------------------------------------------------------
# extractors


def test_a_torchscript_file_goes_through_the_real_path(network, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not the Inception of published FIDs: its SHA-256 is .*--trust"):
        features.Inception(str(network))
    monkeypatch.setattr(features, "INCEPTION_SHA256", features.sha256(network))
    extractor, images = features.Inception(str(network)), pictures(5)
    found, probabilities = extractor(images)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert np.allclose(found[:, :3], x.mean(dim=(2, 3)), atol=1e-6) and found.dtype == np.float32
    assert probabilities.shape == (5, 4) and np.allclose(probabilities.sum(1), 1, atol=1e-6)
    assert features.Inception(str(network)).identity == f"inception {features.INCEPTION_SHA256}"
    assert np.array_equal(extractor(images[..., :1])[0], extractor(images[..., :1].repeat(3, axis=3))[0])   # grey
    with pytest.raises(UserError, match="there is no Inception file"):
        features.Inception(str(tmp_path / "missing.pt"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="is no TorchScript file"):
        features.Inception(str(tmp_path / "text.pt"), trust=True)


def test_a_download_is_checked_and_a_missing_network_is_said(network, tmp_path, monkeypatch):
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
    with pytest.raises(UserError, match="unknown extractor 'vgg'"):
        features.load_extractor("vgg")


def test_the_jpeg_codec_is_what_a_reader_of_the_files_sees(tmp_path):
    images = pictures(2, size=16)
    through = features.through_codec(images, "jpeg")
    Image.fromarray(images[1]).save(tmp_path / "x.jpg")
    assert np.array_equal(through[1], np.asarray(Image.open(tmp_path / "x.jpg")))
    assert not np.array_equal(through, images)
    assert features.through_codec(images, "none") is images


# ---------------------------------------------------------------------------------------------------------------------
# references


def test_references_are_read_back_and_mismatches_refused(tmp_path):
    statistics = gathered(np.random.default_rng(0).standard_normal((100, 7)))
    features.save_reference(tmp_path / "ref.npz", statistics)
    reference = features.load_reference(str(tmp_path / "ref.npz"))
    assert np.array_equal(reference.mean, statistics.mean) and np.array_equal(reference.cov, statistics.cov)
    assert reference.how == {**HOW, "n": 100} and reference.features.shape == (100, 7)
    features.check_comparable(reference, HOW, "ref.npz")
    for key, other in (("extractor", "inception y"), ("codec", "jpeg"), ("res", 16)):
        with pytest.raises(UserError, match=f"its {key} is .*, theirs is {other}"):
            features.check_comparable(reference, {**HOW, key: other}, "ref.npz")
    np.savez(tmp_path / "adm.npz", mu=np.zeros(5, np.float32), sigma=np.eye(5), mu_s=np.zeros(3))   # ADM, pytorch-fid
    reference = features.load_reference(str(tmp_path / "adm.npz"))
    assert reference.features is None and reference.how == {} and reference.mean.dtype == np.float64
    for name, content in (("text.npz", b"hello"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is no reference"):
            features.load_reference(str(tmp_path / name))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(5), sigma=np.eye(4))
    with pytest.raises(UserError, match="wrong shapes"):
        features.load_reference(str(tmp_path / "odd.npz"))
    with zipfile.ZipFile(tmp_path / "pickle.npz", "w") as archive:
        kind = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"     # objects would be unpickled
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00v\x00" + kind.ljust(118))
    with pytest.raises(UserError, match="is no reference"):
        features.load_reference(str(tmp_path / "pickle.npz"))


@pytest.fixture
def folders(tmp_path):
    """Real images and generated ones, brighter."""
    for name, seed, shift in (("real", 0, 0), ("fake", 1, 40)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(pictures(300, seed, 16)):
            brighter = np.clip(image.astype(int) + shift, 0, 255).astype(np.uint8)
            Image.fromarray(brighter).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.mark.slow
def test_reference_and_comparison_through_the_script_by_one_process_and_by_two(folders, run_script, network):
    out = run_script("fid.py", "ref", "--data", "real", "--res", 16, "--extractor", "pixels", "--out", "ref.npz").stdout
    assert "300 images of 16 pixels, pixels averaged to 8 x 8" in out
    out = run_script("fid.py", "fake", "--ref", "ref.npz", "--record", "one.jsonl").stdout
    assert "FRECHET-300" in out and "recall" in out and "kid" in out
    real, fake = (np.stack([np.asarray(Image.open(folders / name / f"{i}.png")) for i in range(300)])
                  for name in ("real", "fake"))
    direct = fid.frechet_distance(*fid.statistics(features.pixel_features(real)),
                                  *fid.statistics(features.pixel_features(fake)))
    one = json.loads((folders / "one.jsonl").read_text())
    assert one["frechet"] == pytest.approx(direct, rel=1e-5) and one["reference"]["n"] == 300
    assert one["sets"] == [{"samples": "fake"}] and one["config"] is None
    for command in ("ref --data real --res 16 --extractor pixels --out ref2.npz --batch 40",
                    "fake --ref ref2.npz --record two.jsonl --batch 40"):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                               str(ROOT / "fid.py"), *shlex.split(command)], cwd=folders, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    one_ref, two_ref = (features.load_reference(str(folders / name)) for name in ("ref.npz", "ref2.npz"))
    assert np.allclose(one_ref.mean, two_ref.mean, rtol=1e-12) and np.allclose(one_ref.cov, two_ref.cov, atol=1e-12)
    two = json.loads((folders / "two.jsonl").read_text())
    for key in ("frechet", "precision", "recall", "kid"):
        assert one[key] == pytest.approx(two[key], rel=1e-6)
    out = run_script("fid.py", "ref", "--data", "real", "--res", 16, "--extractor-file", network, "--trust",
                     "--codec", "jpeg", "--out", "toy.npz").stdout
    assert "codec jpeg" in out
    out = run_script("fid.py", "fake", "--ref", "toy.npz", "--extractor-file", network, "--trust", "--codec",
                     "jpeg").stdout
    assert "FID-300" in out and "inception_score" in out


def test_a_run_against_a_reference_with_spread_over_sets(folders, run_script, give_up):
    run_script("train.py", "--steps", "3", "--size", "32,2,2,2", "--batch", "16", "--solver", "euler", "--solver-steps",
               "4", "--num-samples", "6", "--out", "run")
    np.savez(folders / "digits.npz", mu=np.zeros(64), sigma=np.eye(64), how=json.dumps(
        {"extractor": features.Pixels.identity, "codec": "none", "res": 8, "n": 9}))
    out = run_script("fid.py", "run", "--ref", "digits.npz", "--num", "70", "--repeat", "3", "--record",
                     "r.jsonl").stdout
    line = json.loads((folders / "r.jsonl").read_text())
    assert "over 3 sets" in out and len(line["frechet_sets"]) == 3 and len(set(line["frechet_sets"])) == 3
    assert line["frechet"] == pytest.approx(np.mean(line["frechet_sets"]))
    assert [s["seed"] for s in line["sets"]] == [0, 1, 2] and line["sets"][0]["nfe"] == 4
    assert "FRECHET-70" in run_script("fid.py", "run", "--ref", "digits.npz", "--num", "70").stdout
    assert json.loads((folders / "results" / "fid.jsonl").read_text())["name"] == "FRECHET-70"
    for command, words in (("fid.py run --ref digits.npz --num 20", "too few for 64 features"),
                           ("fid.py fake --ref digits.npz", "its res is 8, theirs is 16"),
                           ("fid.py fake --ref digits.npz --codec jpeg", "its codec is none, theirs is jpeg"),
                           ("fid.py run --ref nowhere.npz", "is no reference"),
                           ("fid.py run --ref digits.npz --repeat 0", "--repeat"),
                           ("fid.py run --ref digits.npz --extractor dinov2", "was made with pixels"),
                           ("fid.py ref", "needs its images")):
        assert words in give_up(*shlex.split(command))
