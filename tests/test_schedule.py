import math

import pytest
import torch

from config import UserError
from conftest import random_model
from data import BatchRandom
from pyramid import decompose, reconstruct
from schedule import PATHS, Schedule, loss, noise_bands

STARTS = (0.0, 0.3, 0.7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("i", [0, 1, 2])
def test_coefficients_at_start_middle_and_end(path, i):
    schedule, start = Schedule(STARTS, path), STARTS[i]
    sigma = {"linear": lambda t: 1 - t, "quadratic": lambda t: (1 - t) ** 2, "cubic": lambda t: (1 - t) ** 3,
             "gvp": lambda t: math.cos(math.pi / 2 * t)}[path]
    alpha = math.sin(math.pi / 4) if path == "gvp" else 0.5                     # half-way in local time
    for t, expected in ((start, 0.0), ((start + 1) / 2, alpha), (1.0, 1.0)):
        a, s, _, _ = schedule.coefficients(i, t)
        assert a.item() == pytest.approx(expected, abs=1e-12)
        assert s.item() == pytest.approx(sigma(t), abs=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_are_those_of_autograd(path):
    schedule = Schedule(STARTS, path)
    for i, start in enumerate(STARTS):
        t = torch.linspace(start, 1, 7, dtype=torch.float64).requires_grad_()
        alpha, sigma, d_alpha, d_sigma = schedule.coefficients(i, t)
        for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
            (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
            assert torch.allclose(derivative, expected, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_target_velocity_is_the_finite_difference_of_the_state(path):
    schedule, step = Schedule(STARTS, path), 1e-6
    x1, x0 = (decompose(torch.randn(5, 2, 8, 8, dtype=torch.float64), 3) for _ in range(2))
    t = torch.linspace(0.71, 0.99, 5, dtype=torch.float64)
    _, v = schedule.interpolate(x1, x0, t)
    later, _ = schedule.interpolate(x1, x0, t + step)
    earlier, _ = schedule.interpolate(x1, x0, t - step)
    for band in range(3):
        difference = (later[band] - earlier[band]) / (2 * step)
        assert torch.allclose(v[band], difference, atol=1e-7)


def test_linear_velocity_has_the_closed_form():
    schedule = Schedule((0.0, 0.5))
    x1, x0 = (decompose(torch.randn(2, 1, 4, 4), 2) for _ in range(2))
    _, v = schedule.interpolate(x1, x0, torch.tensor([0.6, 0.9]))
    assert torch.allclose(v[1], x1[1] / (1 - 0.5) - x0[1], atol=1e-6)           # x_1 / (1 - T_i) - x_0


def test_state_at_activation_is_scaled_noise_and_at_one_is_data():
    schedule = Schedule(STARTS)
    x1, x0 = (decompose(torch.randn(2, 1, 8, 8, dtype=torch.float64), 3) for _ in range(2))
    for i, start in enumerate(STARTS):
        xt, _ = schedule.interpolate(x1, x0, torch.full((2,), start, dtype=torch.float64))
        assert torch.allclose(xt[i], (1 - start) * x0[i])
    xt, _ = schedule.interpolate(x1, x0, torch.ones(2, dtype=torch.float64))
    assert all(torch.allclose(a, b) for a, b in zip(xt, x1, strict=True))


def test_resummed_noise_is_white_and_independent_noise_is_not():
    """The re-summed state of pyramid noise is sum_i alpha_i U..U x_1 + sigma(t) n: with x_1 = 0, white."""
    schedule, t = Schedule(STARTS), torch.full((20000,), 0.8)
    white = {}
    for kind in ("pyramid", "independent"):
        x0 = noise_bands(BatchRandom(0, 0, 20000), (1, 4, 4), 3, kind)
        xt, _ = schedule.interpolate([torch.zeros_like(b) for b in x0], x0, t)
        covariance = torch.cov(reconstruct(xt).flatten(1).T) / 0.2**2
        white[kind] = (covariance - torch.eye(16)).abs().max().item()
    assert white["pyramid"] < 0.05
    assert white["independent"] > 0.5


def test_segments_cover_the_unit_interval():
    assert Schedule((0.0, 0.33, 0.67)).segments == [(0.0, 0.33), (0.33, 0.67), (0.67, 1.0)]
    assert Schedule((0.0,)).segments == [(0.0, 1.0)]


@pytest.mark.parametrize("starts", [(), (0.1, 0.5), (0.0, 0.5, 0.5), (0.0, 0.6, 0.4), (0.0, 1.0), (0.0, -0.5)])
def test_starts_that_do_not_increase_are_an_error(starts):
    with pytest.raises(UserError, match="increase"):
        Schedule(starts)


def test_unknown_path_is_an_error():
    with pytest.raises(UserError, match="linear"):
        Schedule((0.0, 0.5), "cosine")


class Recorder(torch.nn.Module):
    """Returns zeros and remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, bands, t, y):
        self.calls.append((len(bands), t, y))
        return [torch.zeros_like(b) for b in bands]


def test_loss_of_the_zero_model_is_the_size_of_the_velocity():
    """With x_1 = 0 and the linear path v = -x_0, so the loss of band i is the variance of its noise."""
    x1 = torch.zeros(6000, 1, 8, 8)
    total, errors = loss(Recorder(), x1, None, Schedule(STARTS), BatchRandom(0, 0, 6000), stages="stratified")
    for (_, error), variance in zip(errors, (1 / 16, 3 / 16, 3 / 4), strict=True):
        assert error.mean().item() == pytest.approx(variance, rel=0.05)
    # stages 0, 1, 2 have a third of the rows each: band i is in 3, 2, 1 of them
    assert total.item() == pytest.approx((3 / 16 + 2 * 3 / 16 + 3 / 4) / 3, rel=0.05)


def test_one_stage_for_each_batch_as_in_algorithm_1():
    model, schedule = Recorder(), Schedule(STARTS)
    for step in range(300):
        total, errors = loss(model, torch.randn(4, 1, 8, 8), None, schedule, BatchRandom(0, step, 4))
        assert len(errors) == model.calls[-1][0]
        assert total.item() == pytest.approx(sum(error.mean().item() for _, error in errors), rel=1e-5)
    stages = [active - 1 for active, _, _ in model.calls]
    assert all(80 < stages.count(s) < 120 for s in range(3))
    for active, t, _ in model.calls:
        assert (t >= STARTS[active - 1]).all() and (t < 1).all()
    early = torch.cat([t for active, t, _ in model.calls if active == 1])
    assert early.min() < 0.02 and early.max() > 0.98                            # stage 0 trains on all of [0, 1]


def test_segment_range_option():
    model, schedule = Recorder(), Schedule(STARTS)
    loss(model, torch.randn(300, 1, 8, 8), None, schedule, BatchRandom(0, 0, 300), "pyramid", "stratified", False)
    for (active, t, _), (start, end) in zip(model.calls, schedule.segments, strict=True):
        assert active and t.min() >= start and t.max() < end


def test_stratified_stages_cover_every_row_once_whatever_the_share_of_this_process():
    x1, y = torch.randn(10, 1, 8, 8), torch.arange(10)
    whole = Recorder()
    loss(whole, x1, y, Schedule(STARTS), BatchRandom(0, 7, 10), stages="stratified")
    assert sorted(torch.cat([rows for _, _, rows in whole.calls]).tolist()) == list(range(10))
    assert sorted(len(rows) for _, _, rows in whole.calls) == [3, 3, 4]
    halves = Recorder()
    for rows in (slice(0, 5), slice(5, 10)):
        loss(halves, x1[rows], y[rows], Schedule(STARTS), BatchRandom(0, 7, 10, rows), stages="stratified")
    for stage in range(3):
        parts = [halves.calls[stage], halves.calls[3 + stage]]
        assert torch.cat([rows for _, _, rows in parts]).tolist() == whole.calls[stage][2].tolist()
        assert torch.equal(torch.cat([t for _, t, _ in parts]), whole.calls[stage][1])


@pytest.mark.parametrize("stages, count", [("stratified", 10), ("stratified", 12), ("batch", 10)])
def test_the_losses_of_shares_add_up_to_that_of_the_batch(stages, count):
    """Also where the number of stages does not divide the batch or the shares."""
    model, schedule = random_model(in_channels=1, resolution=8, num_classes=0), Schedule(STARTS)
    x1 = torch.randn(count, 1, 8, 8)
    whole = loss(model, x1, None, schedule, BatchRandom(0, 5, count), stages=stages)[0]
    for parts in ((slice(0, 5), slice(5, count)), (slice(0, 3), slice(3, 6), slice(6, count))):
        shares = [loss(model, x1[p], None, schedule, BatchRandom(0, 5, count, p), stages=stages)[0] for p in parts]
        assert sum(shares).item() == pytest.approx(whole.item(), rel=1e-5)


def test_stratified_stages_have_equal_weight_whatever_their_share():
    """10 rows for 3 stages: the loss is the mean over the stages of the mean over their rows."""
    x1 = torch.randn(10, 1, 8, 8)
    total, errors = loss(Recorder(), x1, None, Schedule(STARTS), BatchRandom(0, 5, 10), stages="stratified")
    sizes, expected = [4, 3, 3], 0.0
    for i, (_, error) in enumerate(errors):
        expected += sum(part.mean().item() for part in error.split(sizes[i:])) / 3
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_stratified_and_batch_stages_have_the_same_expected_gradient():
    """For fixed weights: the means over many steps agree, and the gradient of a stratified step scatters less."""
    model, schedule = random_model(in_channels=1, resolution=8, num_classes=0), Schedule(STARTS)
    x1, weights = torch.randn(48, 1, 8, 8), list(model.parameters())

    def gradients(stages, count):
        rows = []
        for step in range(count):
            model.zero_grad()
            shuffled = x1[torch.randperm(48, generator=torch.Generator().manual_seed(step))]
            loss(model, shuffled, None, schedule, BatchRandom(1, step, 48), stages=stages)[0].backward()
            rows.append(torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights]))
        return torch.stack(rows)

    drawn, strata = gradients("batch", 150), gradients("stratified", 50)
    scatter = {name: (g - g.mean(0)).norm(dim=1).square().mean().item() for name, g in (("d", drawn), ("s", strata))}
    gap = (drawn.mean(0) - strata.mean(0)).norm().item()
    assert gap < 2 * (scatter["d"] / 150 + scatter["s"] / 50) ** 0.5            # within the scatter of the two means
    assert gap < 0.3 * strata.mean(0).norm().item()
    assert scatter["s"] < 0.5 * scatter["d"]


def test_unknown_noise_and_stages_are_errors():
    rng = BatchRandom(0, 0, 4)
    with pytest.raises(UserError, match="unknown noise 'pink'"):
        noise_bands(rng, (1, 4, 4), 2, "pink")
    with pytest.raises(UserError, match="unknown stages 'all'"):
        loss(Recorder(), torch.zeros(4, 1, 8, 8), None, Schedule(STARTS), rng, stages="all")
