import math

import numpy as np
import pytest
import torch

from config import UserError
from conftest import random_model
from data.batches import BatchRandom
from pyramid import PYRAMIDS, decompose, reconstruct
from schedule import PATHS, Schedule, loss, rows_by_stage

STARTS = (0.0, 0.3, 0.7)

# ---------------------------------------------------------------------------------------------------------------------
# every path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_band_leaves_noise_at_its_start_and_arrives_at_data(path, i):
    schedule = Schedule(STARTS, path)
    ends = torch.tensor([STARTS[i], 1.0], dtype=torch.float64)
    alpha, sigma, _, _ = schedule.coefficients(i, ends)
    assert alpha.tolist() == pytest.approx([0.0, 1.0], abs=1e-9)
    assert sigma[0] > 0 and sigma[1].item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("path, sigma", [
    ("linear", lambda t: 1 - t), ("quadratic", lambda t: (1 - t) ** 2), ("cubic", lambda t: (1 - t) ** 3),
    ("gvp", lambda t: math.cos(math.pi / 2 * t))])
@pytest.mark.parametrize("i", [0, 1, 2])
def test_coefficients_half_way(path, sigma, i):
    t = (STARTS[i] + 1) / 2
    a, s, _, _ = Schedule(STARTS, path).coefficients(i, t)
    assert a.item() == pytest.approx(math.sin(math.pi / 4) if path == "gvp" else 0.5, abs=1e-12)
    assert s.item() == pytest.approx(sigma(t), abs=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_are_those_of_autograd(path):
    schedule = Schedule(STARTS, path)
    for i, start in enumerate(STARTS):
        t = torch.linspace(start, 1, 9, dtype=torch.float64)[1:-1].requires_grad_()
        alpha, sigma, d_alpha, d_sigma = schedule.coefficients(i, t)
        for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
            (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
            assert torch.allclose(derivative, expected, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_target_velocity_is_the_finite_difference_of_the_state(path):
    schedule, step = Schedule(STARTS, path), 1e-6
    x1, x0 = (schedule.split(torch.randn(5, 2, 8, 8, dtype=torch.float64)) for _ in range(2))
    t = torch.linspace(0.71, 0.99, 5, dtype=torch.float64)
    _, v = schedule.interpolate(x1, x0, t)
    later, _ = schedule.interpolate(x1, x0, t + step)
    earlier, _ = schedule.interpolate(x1, x0, t - step)
    for band in range(3):
        difference = (later[band] - earlier[band]) / (2 * step)
        assert torch.allclose(v[band], difference, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
def test_a_band_enters_as_the_state_that_training_sees_there(path):
    schedule = Schedule(STARTS, path)
    x1, x0 = (schedule.split(torch.randn(2, 1, 8, 8, dtype=torch.float64)) for _ in range(2))
    for j, start in enumerate(STARTS):
        at_start, _ = schedule.interpolate(x1[: j + 1], x0[: j + 1], torch.full((2,), start, dtype=torch.float64))
        state = schedule.enter(j, at_start[:j], x0[j])
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(state, at_start, strict=True))


def test_linear_velocity_has_the_closed_form():
    schedule = Schedule((0.0, 0.5), "linear")
    x1, x0 = (schedule.split(torch.randn(2, 1, 4, 4)) for _ in range(2))
    _, v = schedule.interpolate(x1, x0, torch.tensor([0.6, 0.9]))
    assert torch.allclose(v[1], x1[1] / (1 - 0.5) - x0[1], atol=1e-6)           # x_1 / (1 - T_i) - x_0


def test_linear_state_at_activation_is_scaled_noise_and_at_one_is_data():
    schedule = Schedule(STARTS, "linear")
    x1, x0 = (schedule.split(torch.randn(2, 1, 8, 8, dtype=torch.float64)) for _ in range(2))
    for i, start in enumerate(STARTS):
        xt, _ = schedule.interpolate(x1, x0, torch.full((2,), start, dtype=torch.float64))
        assert torch.allclose(xt[i], (1 - start) * x0[i])
    xt, _ = schedule.interpolate(x1, x0, torch.ones(2, dtype=torch.float64))
    assert all(torch.allclose(a, b) for a, b in zip(xt, x1, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# pyramid and noise


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_a_schedule_splits_and_sums_with_its_own_pyramid(pyramid):
    schedule, x = Schedule(STARTS, pyramid=pyramid), torch.randn(2, 3, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(schedule.split(x), decompose(x, 3, pyramid), strict=True))
    assert torch.allclose(schedule.image(schedule.split(x)), x, atol=1e-6)
    noise = schedule.draw_noise(BatchRandom(0, 0, 2), (3, 8, 8))                # of one white image
    assert all(torch.equal(a, b) for a, b in zip(
        noise, decompose(BatchRandom(0, 0, 2).randn(3, 8, 8), 3, pyramid), strict=True))


def test_resummed_noise_is_white_and_independent_noise_is_not():
    """The re-summed state of pyramid noise is sum_i alpha_i U..U x_1 + sigma(t) n: with x_1 = 0, white."""
    t, white = torch.full((20000,), 0.8), {}
    for kind in ("pyramid", "independent"):
        schedule = Schedule(STARTS, "linear", noise=kind)
        x0 = schedule.draw_noise(BatchRandom(0, 0, 20000), (1, 4, 4))
        xt, _ = schedule.interpolate([torch.zeros_like(b) for b in x0], x0, t)
        covariance = torch.cov(schedule.image(xt).flatten(1).T) / 0.2**2
        white[kind] = (covariance - torch.eye(16)).abs().max().item()
    assert white["pyramid"] < 0.05
    assert white["independent"] > 0.5


def test_independent_noise_is_unit_noise_in_each_band():
    bands = Schedule((0.0, 0.5, 0.8), noise="independent").draw_noise(BatchRandom(0, 0, 4000), (2, 8, 8))
    assert [tuple(band.shape[1:]) for band in bands] == [(2, 2, 2), (2, 4, 4), (2, 8, 8)]
    assert [band.std().item() for band in bands] == pytest.approx([1, 1, 1], rel=0.02)
    assert abs((reconstruct([bands[0], 0 * bands[1]]) * bands[1]).mean()) < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# segments and starts


def test_segments_cover_the_unit_interval():
    assert Schedule((0.0, 0.33, 0.67)).segments == [(0.0, 0.33), (0.33, 0.67), (0.67, 1.0)]
    assert Schedule((0.0,)).segments == [(0.0, 1.0)]
    assert Schedule(STARTS).shares == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("starts", [(), (0.1, 0.5), (0.0, 0.5, 0.5), (0.0, 0.6, 0.4), (0.0, 1.0), (0.0, -0.5)])
def test_starts_that_do_not_increase_are_an_error(starts):
    with pytest.raises(UserError, match="increase"):
        Schedule(starts)


def test_unknown_path_is_an_error():
    with pytest.raises(UserError, match="linear"):
        Schedule((0.0, 0.5), "zigzag")


# ---------------------------------------------------------------------------------------------------------------------
# the loss


class Recorder(torch.nn.Module):
    """Returns zeros and records its calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, bands, t, y):
        self.calls.append((len(bands), t, y))
        return [torch.zeros_like(b) for b in bands]


def test_loss_of_the_zero_model_is_the_size_of_the_velocity():
    """With x_1 = 0 and the linear path v = -x_0, so the loss of band i is the variance of its noise."""
    x1, schedule = torch.zeros(6000, 1, 8, 8), Schedule(STARTS, "linear", "haar", stages="stratified")
    total, errors = loss(Recorder(), x1, None, schedule, BatchRandom(0, 0, 6000))
    for (_, error), variance in zip(errors, (1 / 16, 3 / 16, 3 / 4), strict=True):
        assert error.mean().item() == pytest.approx(variance, rel=0.05)
    # stages 0, 1, 2 have a third of the rows each: band i is in 3, 2, 1 of them
    assert total.item() == pytest.approx((3 / 16 + 2 * 3 / 16 + 3 / 4) / 3, rel=0.05)


def test_one_stage_for_each_batch_as_in_algorithm_1():
    model, schedule = Recorder(), Schedule(STARTS, stages="batch")
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
    model, schedule = Recorder(), Schedule(STARTS, stages="stratified", full_range=False)
    loss(model, torch.randn(300, 1, 8, 8), None, schedule, BatchRandom(0, 0, 300))
    for (active, t, _), (start, end) in zip(model.calls, schedule.segments, strict=True):
        assert active and t.min() >= start and t.max() < end


def test_the_stage_of_a_row_is_its_number_in_the_global_batch_modulo_the_stages():
    schedule = Schedule(STARTS, stages="stratified")
    stage = schedule.stage_of_rows(BatchRandom(0, 7, 10))
    assert stage.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    for rows in (slice(0, 5), slice(5, 10), slice(3, 4)):
        assert schedule.stage_of_rows(BatchRandom(0, 7, 10, rows)).tolist() == stage[rows].tolist()
        drawn = Schedule(STARTS, stages="batch").stage_of_rows(BatchRandom(0, 7, 10, rows))     # one for all processes
        assert len(drawn) == rows.stop - rows.start and set(drawn.tolist()) == set(
            Schedule(STARTS, stages="batch").stage_of_rows(BatchRandom(0, 7, 10)).tolist())
    uneven = Schedule(STARTS, stages="stratified", stage_weights=(4, 4, 2))
    assert uneven.shares == [0.4, 0.4, 0.2]
    assert uneven.stage_of_rows(BatchRandom(0, 7, 15)).tolist() == [0, 1, 2, 0, 1] * 3
    drawn = [uneven.stage_of_rows(BatchRandom(0, step, 5)).tolist() for step in (0, 1)]
    assert drawn == [[0, 1, 2, 0, 1]] * 2
    rare = Schedule(STARTS, stages="batch", stage_weights=(6, 3, 1))
    counts = np.bincount([rare.stage_of_rows(BatchRandom(0, step, 2))[0] for step in range(1000)])
    assert np.allclose(counts / 1000, rare.shares, atol=0.05)
    assert [(s, rows.tolist()) for s, rows in rows_by_stage(np.array([2, 0, 2]), "cpu")] == [(0, [1]), (2, [0, 2])]
    assert rows_by_stage(np.array([1, 1]), "cpu") == [(1, slice(None))]            # nothing to copy


def test_stratified_stages_cover_every_row_once_whatever_the_part_of_this_process():
    x1, y, schedule = torch.randn(10, 1, 8, 8), torch.arange(10), Schedule(STARTS, stages="stratified")
    whole = Recorder()
    loss(whole, x1, y, schedule, BatchRandom(0, 7, 10))
    assert [rows.tolist() for _, _, rows in whole.calls] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    halves = Recorder()
    for rows in (slice(0, 5), slice(5, 10)):
        loss(halves, x1[rows], y[rows], schedule, BatchRandom(0, 7, 10, rows))
    for stage in range(3):
        parts = [halves.calls[stage], halves.calls[3 + stage]]
        assert torch.cat([rows for _, _, rows in parts]).tolist() == whole.calls[stage][2].tolist()
        assert torch.equal(torch.cat([t for _, t, _ in parts]), whole.calls[stage][1])


@pytest.mark.parametrize("stages, count", [("stratified", 10), ("stratified", 12), ("batch", 10)])
def test_the_losses_of_parts_average_to_that_of_the_batch(stages, count):
    """Weighted by their rows; also where the number of stages does not divide the batch or the parts."""
    model, schedule = random_model(in_channels=1, resolution=8, num_classes=0), Schedule(STARTS, stages=stages)
    x1 = torch.randn(count, 1, 8, 8)
    whole = loss(model, x1, None, schedule, BatchRandom(0, 5, count))[0]
    for parts in ((slice(0, 5), slice(5, count)), (slice(0, 3), slice(3, 6), slice(6, count))):
        losses = [(p.stop - p.start) / count * loss(model, x1[p], None, schedule, BatchRandom(0, 5, count, p))[0]
                  for p in parts]
        assert sum(losses).item() == pytest.approx(whole.item(), rel=1e-5)


def test_the_loss_is_the_mean_over_the_rows_summed_over_the_bands():
    schedule = Schedule(STARTS, stages="stratified")
    total, errors = loss(Recorder(), torch.randn(10, 1, 8, 8), None, schedule, BatchRandom(0, 5, 10))
    assert [len(error) for _, error in errors] == [10, 6, 3]
    assert total.item() == pytest.approx(sum(error.sum().item() for _, error in errors) / 10, rel=1e-5)


def test_stratified_and_batch_stages_have_the_same_expected_gradient():
    """For fixed weights: the means over many steps agree, and the gradient of a stratified step scatters less."""
    model = random_model(in_channels=1, resolution=8, num_classes=0)
    x1, weights = torch.randn(48, 1, 8, 8), list(model.parameters())

    def gradients(stages, count):
        rows = []
        for step in range(count):
            model.zero_grad()
            shuffled = x1[torch.randperm(48, generator=torch.Generator().manual_seed(step))]
            loss(model, shuffled, None, Schedule(STARTS, stages=stages), BatchRandom(2, step, 48))[0].backward()
            rows.append(torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights]))
        return torch.stack(rows)

    drawn, strata = gradients("batch", 45), gradients("stratified", 15)
    scatter = {name: (g - g.mean(0)).norm(dim=1).square().mean().item() for name, g in (("d", drawn), ("s", strata))}
    gap = (drawn.mean(0) - strata.mean(0)).norm().item()
    assert gap < 2 * (scatter["d"] / 45 + scatter["s"] / 15) ** 0.5            # within the scatter of the two means
    assert gap < 0.3 * strata.mean(0).norm().item()
    assert scatter["s"] < 0.5 * scatter["d"]


@pytest.mark.parametrize("option", [dict(noise="Pyramid"), dict(times="Uniform"), dict(stages="Batch"),
                                    dict(path="cubik"), dict(pyramid="Haar")])
def test_misspelt_options_are_refused(option):
    with pytest.raises(UserError, match=f"^unknown {next(iter(option))} .*; choose one of "):
        Schedule(**option)
