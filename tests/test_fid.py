import numpy as np
import pytest
import torch

import fid
from config import UserError
from data import digits, to_images
from fid import frechet_distance, precision, recall, sliced_wasserstein

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
    one, two = fid.statistics(x), fid.statistics(y)
    root = np.asarray(sqrtm(one[1] @ two[1])).real
    expected = ((one[0] - two[0]) ** 2).sum() + np.trace(one[1] + two[1] - 2 * root)
    assert frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(*two, *one) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_singular_covariances_is_finite_and_symmetric():
    one, two = (fid.statistics(rng.standard_normal((8, 40))) for _ in range(2))
    there, back = frechet_distance(*one, *two), frechet_distance(*two, *one)
    assert np.isfinite(there) and there > 0 and there == pytest.approx(back, rel=1e-6)


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


def textures(count, seed, sparse=False, side=64):
    """Random smooth images with fine detail of one variance: everywhere a little, or in a few pixels a lot."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, side // 8, side // 8, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")
    fine = torch.randn(count, 3, side, side, generator=generator)
    if sparse:
        fine = fine * 10 * (torch.rand(count, 1, side, side, generator=generator) < 0.01)
    return (127.5 + 40 * x + 5 * fine).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def test_sliced_wasserstein_finds_the_level_that_differs():
    real = textures(96, 0)
    same, other = sliced_wasserstein(real, textures(96, 1)), sliced_wasserstein(real, textures(96, 1, sparse=True))
    assert list(same) == [16, 32, 64]
    assert sliced_wasserstein(real, real)[64] < 2 * same[64]                    # patches are drawn independently
    assert other[64] > 2 * same[64] and other[16] < 2 * same[16]
    assert sliced_wasserstein(real[:, :8, :8], real[:, :8, :8]) == {}


def test_sliced_wasserstein_is_blind_to_brightness_and_contrast():
    """Each set is normalised per channel, as by Karras et al.: what differs is only the choice of patches."""
    real = textures(96, 0) // 2
    brighter = real + 60
    floor, moved = sliced_wasserstein(real, textures(96, 3) // 2), sliced_wasserstein(real, brighter)
    assert all(moved[side] < 1.5 * floor[side] for side in floor)


def test_scores_that_mean_nothing_are_left_out():
    same = np.repeat(rng.integers(0, 256, (1, 8, 8, 1)), 20, axis=0).astype(np.uint8)
    scores = fid.score(same, np.zeros(20, int), same, np.zeros(20, int))
    assert "novelty" not in scores and "class_variance" not in scores and abs(scores["frechet_pixel"]) < 1e-12
    assert fid.table(scores)


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


def test_scores_do_not_depend_on_the_order():
    images, labels = digits().reference(400)
    images = to_images(images)
    shuffle = np.random.default_rng(1).permutation(200)
    one = fid.score(images[:200], labels[:200], images[200:], labels[200:])
    two = fid.score(images[:200], labels[:200], images[200:][shuffle], labels[200:][shuffle])
    assert all(one[name] == pytest.approx(two[name]) for name in one)


def test_pixel_features_average_to_8_by_8():
    image = rng.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    features = fid.pixel_features(image)
    assert features.shape == (2, 192)
    assert features[1].reshape(3, 8, 8)[2, 0, 1] == pytest.approx(image[1, :4, 4:8, 2].mean() / 255)
