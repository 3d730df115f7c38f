
import pytest
import torch

from pyramid import PYRAMIDS, decompose, down, reconstruct, up

# ---------------------------------------------------------------------------------------------------------------------
# every pyramid


@pytest.mark.parametrize("pyramid", PYRAMIDS)
@pytest.mark.parametrize("num_scales", [1, 2, 3, 4])
def test_reconstruction_is_exact(num_scales, pyramid):
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    bands = decompose(x, num_scales, pyramid)
    assert [tuple(b.shape) for b in bands] == [(2, 3, 16 >> k, 24 >> k) for k in reversed(range(num_scales))]
    assert (reconstruct(bands, pyramid) - x).abs().max() < 1e-14
    x = x.float()
    assert (reconstruct(decompose(x, num_scales, pyramid), pyramid) - x).abs().max() < 2e-6


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_a_prefix_reconstructs_the_smaller_image(pyramid):
    x, (shrink, _) = torch.randn(1, 1, 16, 16, dtype=torch.float64), PYRAMIDS[pyramid]
    bands = decompose(x, 4, pyramid)
    for count in (3, 2, 1):
        x = shrink(x)
        assert torch.allclose(reconstruct(bands[:count], pyramid), x, atol=1e-14)


def test_haar_is_the_default():
    x = torch.randn(1, 1, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(decompose(x, 3), decompose(x, 3, "haar"), strict=True))
    assert torch.equal(reconstruct(decompose(x, 3)), reconstruct(decompose(x, 3), "haar"))


@pytest.mark.parametrize("shape, num_scales", [((1, 1, 6, 8), 3), ((1, 1, 8, 6), 3), ((1, 1, 8, 8), 0)])
def test_a_size_that_does_not_divide_is_an_error(shape, num_scales):
    with pytest.raises(ValueError, match="divisible"):
        decompose(torch.zeros(shape), num_scales)


# ---------------------------------------------------------------------------------------------------------------------
# the Haar pyramid


def test_down_after_up_is_the_identity():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(down(up(x)), x)
    assert up(x).shape == (2, 3, 8, 12)


def test_down_and_up_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])[None, None]
    assert down(x).item() == 3.0
    assert up(x)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 6, 6], [3, 3, 6, 6]]


def test_fine_bands_have_zero_mean_in_each_block():
    for band in decompose(torch.randn(2, 3, 16, 16, dtype=torch.float64), 4, "haar")[1:]:
        assert down(band).abs().max() < 1e-15
        assert band.abs().max() > 0.1


def test_bands_of_white_noise_have_the_stated_std_and_are_uncorrelated():
    x = torch.randn(4, 4, 256, 256, generator=torch.Generator().manual_seed(0))
    for num_scales, stds in ((2, (0.5, 0.866)), (3, (0.25, 0.433, 0.866))):
        for band, std in zip(decompose(x, num_scales, "haar"), stds, strict=True):
            assert band.std().item() == pytest.approx(std, rel=0.01)
    coarse, fine = decompose(x, 2, "haar")
    assert abs(torch.corrcoef(torch.stack([up(coarse).flatten(), fine.flatten()]))[0, 1]) < 1e-3
