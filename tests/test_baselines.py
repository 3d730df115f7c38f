"""The systems of baselines/: the mathematics of each in closed form, then the interface that all share, then one run.

For Gaussian data x ~ N(0, S) every state is A x + B n with known matrices, the best velocity is linear and known, and
so is the flow F from the noise to the image: F F^T must be S. All jumps are exact in law, so each sampler must give S
as closely as the solver integrates. (LapFlow under its causal mask does not: tests/test_sample.py.)
"""

from functools import partial

import numpy as np
import pytest
import torch

import sample as sampling
import train
from baselines import SYSTEMS, dfm, lfm, pyramidal
from config import METHODS, Config, UserError
from conftest import random_model
from data.batches import BatchRandom, ImageRandom
from data.conditions import Labels, Vectors
from model import MoTDiT
from pyramid import decompose, down, reconstruct
from run import memory
from run.load import export, load_run
from run.paper import resolve
from schedule import Schedule, rows_by_stage

SIDE = 8
OURS = ("lapflow", "lfm", "pyramidal", "pyramidal-zero-overlap", "pixelflow", "edify", "edify-plain", "dfm", "separate")
OTHERS = [method for method in OURS if method not in ("lapflow", "separate")]   # a fork's system has its own maths
SHAPE = (1, SIDE, SIDE)


def config(method: str, num_scales: int = 3, **more) -> Config:
    settings = dict(method=method, num_scales=1 if method == "lfm" else num_scales, size="48,2,3,4", res=16)
    return Config(**{**settings, **more})


def network(cfg: Config, channels: int = 1, condition=None, side: int = 16, std: float = 0.08) -> torch.nn.Module:
    """A network of this configuration with random weights everywhere."""
    torch.manual_seed(0)
    model = SYSTEMS[cfg.method].network(cfg, channels, condition, side)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def conditions(kind: str, count: int) -> tuple:
    """A factory of conditions, and `count` of them; numbers 2 and 3 are the null condition."""
    if kind == "labels":
        return partial(Labels, list("abcde")), torch.arange(count).remainder(5).index_fill(0, torch.tensor([2, 3]), 5)
    vectors = torch.randn(count, 3, generator=torch.Generator().manual_seed(2))
    y = vectors.index_fill(0, torch.tensor([2, 3]), torch.nan)
    return (lambda hidden_size: Vectors(3, hidden_size, vectors)), y


def images(matrix: torch.Tensor, side: int) -> torch.Tensor:
    """Columns of a matrix as images (columns, 1, side, side)."""
    return matrix.T.reshape(-1, 1, side, side)


def matrix(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `images`."""
    return x.flatten(1).T


def covariance() -> torch.Tensor:
    place = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), -1).view(-1, 2).double()
    return torch.exp(-torch.cdist(place, place) / 2)


class Basis:
    """In place of Gaussians: each tensor asked for gets its own part of an identity matrix, so that what is computed
    from it is the matrix of the map from all noise to the result."""

    def __init__(self, total: int):
        self.total, self.used = total, 0

    def randn(self, *shape):
        count = torch.Size(shape).numel()
        block = torch.zeros(self.total, count, dtype=torch.float64)
        block[self.used : self.used + count] = torch.eye(count, dtype=torch.float64)
        self.used += count
        return block.view(self.total, *shape)


def state_matrices(schedule, stage: int, t: float):
    """A, B, dA, dB: state = A x + B n, target = dA x + dB n, from the schedule's own interpolate; t of DFM: clock."""
    num_scales, eye = schedule.num_scales, images(torch.eye(SIDE**2, dtype=torch.float64), SIDE)
    if isinstance(schedule, dfm.Decomposable):
        bands, (times, _) = schedule.split(eye)[: stage + 1], schedule.band_times(t, stage)
        data = torch.cat([matrix(band) for band in bands])
        scale = torch.cat([torch.full((len(matrix(b)), 1), float(at), dtype=torch.float64)
                           for b, at in zip(bands, times, strict=True)])
        one = torch.eye(len(data), dtype=torch.float64)
        return scale * data, (1 - scale) * one, data, -one
    side, x1 = SIDE >> (num_scales - 1 - stage), schedule.split(eye)[: stage + 1]
    noise = images(torch.eye(side**2, dtype=torch.float64), side)
    zeros = [torch.zeros(len(eye), 1, side, side, dtype=torch.float64)] * (stage + 1)
    (a,), (da,) = schedule.interpolate(x1, zeros, torch.full((len(eye),), t, dtype=torch.float64))
    x1 = [0 * x[: len(noise)] for x in x1]
    (b,), (db,) = schedule.interpolate(x1, [noise] * (stage + 1), torch.full((len(noise),), t, dtype=torch.float64))
    return tuple(matrix(x) for x in (a, b, da, db))


class Oracle:
    """E[target | state] of Gaussian data, as a network."""

    def __init__(self, schedule):
        self.schedule, self.covariance = schedule, covariance()

    def __call__(self, bands, t, y):
        schedule, num_scales = self.schedule, self.schedule.num_scales
        stage = [SIDE >> k for k in reversed(range(num_scales))].index(bands[-1].shape[-1])
        at = t.flatten()[0].item()
        if isinstance(schedule, dfm.Decomposable):          # from the coarsest band's time back to the clock
            (low, high), (start, end) = schedule.segments[stage], (
                schedule.band_times(edge, stage)[0][0] for edge in schedule.segments[stage])
            at = low + (high - low) * (at - start) / (end - start)
        a, b, da, db = state_matrices(schedule, stage, at)
        gain = (da @ self.covariance @ a.T + db @ b.T) @ torch.linalg.pinv(a @ self.covariance @ a.T + b @ b.T,
                                                                           rtol=1e-12, hermitian=True)
        v = torch.cat([band.flatten(1) for band in bands], dim=1) @ gain.T
        return sampling.unpack(v, [band.shape[1:] for band in bands])


@pytest.mark.parametrize("num_scales", [2, 3])
@pytest.mark.parametrize("method", OTHERS)
def test_every_sampler_reproduces_the_data_with_the_best_velocity(method, num_scales):
    cfg = config(method, num_scales)
    module, total = SYSTEMS[method], sum((SIDE >> k) ** 2 for k in range(cfg.num_scales))
    schedule = module.schedule(cfg)
    flow = matrix(module.sample(Oracle(schedule), Basis(total), None, schedule, SHAPE, sampling.solve, rtol=1e-6,
                                atol=1e-6))                 # (64, all noise)
    assert flow.shape == (SIDE**2, total)
    assert (flow @ flow.T - covariance()).norm() / covariance().norm() < 1e-3


@pytest.mark.parametrize("num_scales", [2, 3, 4])
@pytest.mark.parametrize("method", [m for m in OTHERS if m not in ("lfm", "dfm")])
def test_the_jump_reproduces_the_next_start_exactly(method, num_scales):
    """Mean (the map from the data) and covariance of the noise, in closed form, without any solver."""
    schedule = SYSTEMS[method].schedule(config(method, num_scales))
    for stage in range(1, num_scales):
        a, b, _, _ = state_matrices(schedule, stage - 1, schedule.segments[stage - 1][1])
        wanted_a, wanted_b, _, _ = state_matrices(schedule, stage, schedule.segments[stage][0])
        side = SIDE >> (num_scales - stage)
        none = torch.zeros(SIDE**2, 1, 2 * side, 2 * side, dtype=torch.float64)
        after_a = matrix(schedule.enter(stage, [images(a, side)], none)[0])
        fresh = images(torch.eye(4 * side**2, dtype=torch.float64), 2 * side)
        after_b = torch.cat([matrix(schedule.enter(stage, [images(b, side)], none[: side**2])[0]),
                             matrix(schedule.enter(stage, [0 * fresh[:, :, :side, :side]], fresh)[0])], dim=1)
        assert torch.allclose(after_a, wanted_a, atol=1e-12)
        assert torch.allclose(after_b @ after_b.T, wanted_b @ wanted_b.T, atol=1e-12)


@pytest.mark.parametrize("method", OTHERS)
def test_the_target_is_the_finite_difference_of_the_state(method):
    schedule, step = SYSTEMS[method].schedule(config(method)), 1e-6
    for stage in range(schedule.num_scales):
        start, end = schedule.segments[stage]
        at, rates = start + 0.4 * (end - start), None
        if isinstance(schedule, dfm.Decomposable):          # d state / d clock = rate of its time x target
            rates = schedule.band_times(at, stage)[1]
        elif isinstance(schedule, pyramidal.Pyramidal):
            rates = [1 / (end - start)]
        a, b, da, db = state_matrices(schedule, stage, at)
        (a0, b0, _, _), (a1, b1, _, _) = (state_matrices(schedule, stage, at + h) for h in (-step, step))
        if rates is not None:
            sizes = [(SIDE >> (schedule.num_scales - 1 - i)) ** 2 for i in range(stage + 1)][-len(rates) :]
            speed = torch.cat([torch.full((n, 1), r, dtype=torch.float64) for n, r in zip(sizes, rates, strict=True)])
            da, db = speed * da, speed * db
        assert torch.allclose((a1 - a0) / (2 * step), da, atol=1e-8)
        assert torch.allclose((b1 - b0) / (2 * step), db, atol=1e-8)
        assert a.abs().max() > 0 or at == 0


# ---------------------------------------------------------------------------------------------------------------------
# each against what its paper or its code says


def test_lfm_is_lapflow_with_one_band():
    model = random_model(num_scales=1)
    x1, y, one = torch.randn(6, 2, 16, 16), torch.arange(6) % 5, Schedule((0.0,))
    loss, ((t, error),) = lfm.loss(model, x1, y, one, BatchRandom(0, 3, 6))
    rng = BatchRandom(0, 3, 6)
    n, times = rng.randn(2, 16, 16), rng.rand()             # x_t = t x_1 + (1 - t) n, v = x_1 - n
    (v,) = model([times.view(-1, 1, 1, 1) * x1 + (1 - times).view(-1, 1, 1, 1) * n], times, y)
    expected = (v - (x1 - n)).square().mean(dim=(1, 2, 3))
    assert torch.equal(t, times) and torch.allclose(error, expected) and torch.allclose(loss, expected.mean())
    images = [SYSTEMS[method].sample(model, ImageRandom(0, range(3)), y[:3], one, (2, 16, 16), sampling.solve,
                                     solver="heun", steps=4) for method in ("lfm", "lapflow")]
    assert torch.equal(*images) and images[0].abs().max() > 0.1
    cfg = resolve({"method": "lfm"})
    shapes = [{name: x.shape for name, x in SYSTEMS[method].network(cfg, 1, None, 8).state_dict().items()}
              for method in ("lfm", "lapflow")]
    assert shapes[0] == shapes[1]


def test_pyramidal_flow_has_the_numbers_of_its_code():
    two, three = pyramidal.Pyramidal((0.0, 0.5)), pyramidal.Pyramidal((0.0, 1 / 3, 2 / 3))
    assert sum(two.windows, ()) == pytest.approx((0, 0.5, 1 / 3, 1))
    assert sum(three.windows, ()) == pytest.approx((0, 1 / 3, 0.2, 2 / 3, 0.5, 1))
    assert sum(two.segments, ()) == pytest.approx((0, 0.4286, 0.4286, 1), abs=1e-4)
    assert sum(three.segments, ()) == pytest.approx((0, 0.2564, 0.2564, 0.6154, 0.6154, 1), abs=1e-4)
    ones, z = torch.ones(1, 1, 2, 2), torch.randn(20000, 1, 4, 4)
    for schedule, stage, a, b in ((two, 1, 0.6667, 0.5774), (three, 1, 0.6, 0.6928), (three, 2, 0.75, 0.4330)):
        assert schedule.enter(stage, [ones], 0 * z[:1])[0].mean().item() == pytest.approx(a, abs=1e-4)
        noise = schedule.enter(stage, [0 * ones.expand(20000, 1, 2, 2)], z)[0]      # its corrective noise, gamma = -1/3
        block = noise[:, 0, :2, :2].flatten(1)
        expected = b**2 * (torch.eye(4) * 4 / 3 - torch.full((4, 4), 1 / 3))
        assert torch.allclose(torch.cov(block.T), expected, atol=0.02)


def test_zero_overlap_with_unit_noise_could_not_be_repaired():
    """The corrective covariance would have to be (1 - s)^2 (I - ones) in each block: not positive. Pooled noise is."""
    assert torch.linalg.eigvalsh(torch.eye(4) - torch.ones(4, 4)).min() == pytest.approx(-3)
    schedule = pyramidal.Pyramidal((0.0, 0.5), form="pyramidal-zero-overlap")
    assert schedule.windows == [(0.0, 0.5), (0.5, 1.0)] and schedule.noise_std(0) == 0.5


def test_pooled_noise_scaled_up_is_fresh_noise_in_law():
    """So one stage of PixelFlow trains on the same law as one stage of Pyramidal Flow."""
    pool = matrix(2 * down(images(torch.eye(SIDE**2, dtype=torch.float64), SIDE)))
    assert torch.allclose(pool @ pool.T, torch.eye(16, dtype=torch.float64))
    x1 = torch.randn(4000, 1, 8, 8)
    losses = [pyramidal.loss(lambda bands, t, y: [0 * bands[0]], x1, None,
                             pyramidal.Pyramidal((0.0, 0.5), stages="stratified", form=form),
                             BatchRandom(0, 0, 4000))[0].item() for form in ("pyramidal", "pixelflow")]
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0] != losses[1]


@pytest.mark.parametrize("method", ["pyramidal", "pyramidal-zero-overlap", "pixelflow", "edify", "edify-plain"])
def test_each_scale_is_trained_at_the_times_of_its_segment(method):
    """Where the sampler asks for it: the network sees the clock, not the time inside the stage."""
    schedule, seen = SYSTEMS[method].schedule(config(method, stages="stratified")), {}

    def model(bands, t, y):
        seen[bands[0].shape[-1]] = t
        return [0 * bands[0]]

    SYSTEMS[method].loss(model, torch.randn(900, *SHAPE), None, schedule, BatchRandom(0, 0, 900))
    for side, (start, end) in zip((2, 4, 8), schedule.segments, strict=True):
        assert start <= seen[side].min() < start + 0.02 and end - 0.02 < seen[side].max() <= end


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_lapflow_summed_up_is_the_plain_edify_process_with_the_same_noise(stage):
    starts, n = (0.0, 0.3, 0.6), torch.randn(4, 1, SIDE, SIDE, dtype=torch.float64)
    x1, t = decompose(torch.randn_like(n), 3)[: stage + 1], torch.linspace(0.65, 0.99, 4, dtype=torch.float64)
    xt, v = Schedule(starts).interpolate(x1, decompose(n, 3)[: stage + 1], t)
    for _ in range(2 - stage):
        n = down(n)
    plain, usual = (SYSTEMS[method].schedule(config(method, starts=starts)) for method in ("edify-plain", "edify"))
    noise = [None] * stage + [n / plain.noise_std(stage)]
    (state,), (target,) = plain.interpolate(x1, noise, t)
    assert torch.allclose(reconstruct(xt), state) and torch.allclose(reconstruct(v), target)
    (product,), _ = usual.interpolate(x1, noise, t)
    assert torch.allclose(product, state) == (stage == 0)   # the product form is another process from band 1 on


def test_separate_networks_train_on_the_schedule_of_lapflow_in_its_segments():
    same = dict(starts=(0.0, 0.3, 0.6), path="gvp", stages="batch")
    assert SYSTEMS["separate"].schedule(config("separate", **same)) == SYSTEMS["lapflow"].schedule(
        config("lapflow", full_range=False, **same))


@pytest.mark.parametrize("method", OURS)
def test_settings_that_all_share_reach_every_system(method):
    """What config.py does not refuse: the blocks, and which times and stages are trained."""
    for block in ("dit", "modern"):
        model = network(config(method, block=block, condition_tokens=block == "dit"))
        nets = [module for module in model.modules() if isinstance(module, MoTDiT)]
        assert {part.modern for net in nets for part in net.blocks} == {block == "modern"}
        assert {net.num_cond for net in nets} == {int(block == "dit")}
    given = dict(stages="batch", times="logit-normal", stage_weights=(4.0, 2.0, 1.0))
    if method in ("lfm", "dfm"):                            # has one stage, or weights and times of its own
        given = {"stages": "batch"} | ({"times": "logit-normal"} if method == "lfm" else {})
    schedule = SYSTEMS[method].schedule(config(method, **given))
    assert {name: getattr(schedule, name) for name in given} == given


def test_dfm_takes_the_steps_of_its_paper():
    """tau = 0.7 and 30 + 10 Euler steps: t_0 is 0, 0.0233 .. 0.7, 0.73 .. 1 and t_1 is 0, then 0.1 .. 1."""
    times, schedule = [], dfm.Decomposable((0.0, 0.7))

    def model(bands, t, y):
        times.append(t[0].tolist())
        return [torch.zeros_like(band) for band in bands]

    dfm.sample(model, ImageRandom(0, range(2)), None, schedule, SHAPE, sampling.solve, solver="euler", steps=40)
    assert [len(t) for t in times] == [1] * 30 + [2] * 10
    assert [t[0] for t in times[:30]] == pytest.approx([0.7 * i / 30 for i in range(30)])
    assert [t[0] for t in times[30:]] == pytest.approx([0.7 + 0.03 * i for i in range(10)], abs=1e-6)
    assert [t[1] for t in times[30:]] == pytest.approx([0.1 * i for i in range(10)], abs=1e-6)


def test_dfm_bands_that_are_not_active_get_no_gradient_and_are_not_read():
    model, schedule = network(config("dfm", 2), std=0.1), dfm.Decomposable(stages="batch", coarse_share=0.9)
    x1, lengths = torch.randn(4, 1, 16, 16), []
    for step in range(30):
        model.zero_grad()
        total, errors = dfm.loss(model, x1, None, schedule, BatchRandom(0, step, 4))
        total.backward()
        lengths.append(len(errors))
        for layer in (model.patch_out[1].linear.weight, model.patch_in[1].weight):
            assert (layer.grad is None) == (len(errors) == 1)
    assert 20 < lengths.count(1) < 30                       # nine in ten
    coarse = [torch.randn(2, 1, 8, 8)]
    with torch.no_grad():                                   # a band that is absent is zero at t = 0
        alone = model(coarse, torch.full((2, 1), 0.3))
        both = model([*coarse, torch.zeros(2, 1, 16, 16)], torch.tensor([[0.3, 0.0]]).expand(2, 2))
    assert torch.allclose(alone[0], both[0], atol=1e-6)


def test_dfm_trains_the_times_of_its_algorithm():
    t = [[], []]

    def model(bands, times, y):
        t[times.shape[1] - 1].append(times)
        return [torch.zeros_like(band) for band in bands]

    schedule = dfm.Decomposable(stages="stratified", coarse_share=0.9)
    _, errors = dfm.loss(model, torch.zeros(20000, 1, 8, 8), None, schedule, BatchRandom(0, 0, 20000))
    assert torch.equal(errors[1][0], t[1][0][:, 1])         # each error is noted at the time of its own band
    one, two = (torch.logit(part[0]) for part in t)
    assert len(one) == 18000 and len(two) == 2000
    assert one.mean().item() == pytest.approx(0, abs=0.03) and one.std().item() == pytest.approx(1, abs=0.03)
    assert two[:, 0].mean().item() == pytest.approx(1.5, abs=0.1)               # the coarser band is ahead
    assert two[:, 1].mean().item() == pytest.approx(0, abs=0.1)


def test_parameters_and_cost_are_those_of_the_papers():
    parameters, flops = {}, {}
    for method in ("lfm", "pyramidal", "dfm"):
        with torch.device("meta"):
            model = SYSTEMS[method].network(config(method, 2, condition_tokens=False, size="XL/2"), 16,
                                            partial(Labels, list(map(str, range(1000)))), 64)
        parameters[method] = memory.parameters(model)
        if method != "pyramidal":
            flops[method] = memory.forward_flops(model)[-1]
    assert parameters["pyramidal"] == parameters["lfm"]     # one set of weights for all resolutions
    assert (parameters["dfm"] - parameters["lfm"]) / 1e6 == pytest.approx(716.48 - 712.12, rel=0.02)
    assert flops["lfm"] / 2e9 == pytest.approx(524.6, rel=1e-3)                 # G multiply-adds, 1024 tokens
    assert flops["dfm"] / flops["lfm"] == pytest.approx(524.64 / 524.61, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# which rows train which stage


@pytest.mark.parametrize("method, batch, counts", [
    ("lapflow", 12, [4, 4, 4]), ("edify", 10, [4, 3, 3]), ("pyramidal", 11, [4, 4, 3]), ("separate", 3, [1, 1, 1]),
    ("lfm", 5, [5]), ("dfm", 20, [10, 5, 5]), ("dfm", 200, [100, 50, 50])])
def test_stratified_stages_divide_the_global_batch(method, batch, counts):
    schedule = SYSTEMS[method].schedule(config(method, batch=max(batch, 20), stages="stratified"))
    whole = schedule.stage_of_rows(BatchRandom(0, 7, batch))
    assert np.bincount(whole).tolist() == counts
    assert len(schedule.shares) == len(counts) and sum(schedule.shares) == pytest.approx(1)
    assert schedule.shares == pytest.approx(np.array(counts) / batch, abs=1 / batch)
    parts = [schedule.stage_of_rows(BatchRandom(0, step, batch, rows))          # the same at every step
             for step, rows in ((1, slice(0, 2)), (2, slice(2, batch)))]
    assert np.array_equal(np.concatenate(parts), whole)
    groups = rows_by_stage(whole, torch.device("cpu"))
    assert [(stage, len(torch.arange(batch)[rows])) for stage, rows in groups] == list(enumerate(counts))
    assert torch.cat([torch.arange(batch)[rows] for _, rows in groups]).sort().values.tolist() == list(range(batch))


def test_stratified_stages_of_dfm_are_spread_evenly():
    stage = dfm.Decomposable(stages="stratified", coarse_share=0.9).stage_of_rows(BatchRandom(0, 0, 100))
    assert np.flatnonzero(stage).tolist() == list(range(5, 100, 10))
    halves = dfm.Decomposable(stages="stratified", coarse_share=0.5)
    assert halves.shares == [0.5, 0.5] and halves.stage_of_rows(BatchRandom(0, 0, 6)).tolist() == [0, 1] * 3


@pytest.mark.parametrize("method", OURS)
def test_one_stage_for_each_batch_is_one_draw_for_all_processes(method):
    schedule = SYSTEMS[method].schedule(config(method, 2, batch=20, stages="batch"))
    draws = []
    for step in range(300):
        parts = [schedule.stage_of_rows(BatchRandom(0, step, 20, rows)) for rows in (slice(0, 5), slice(5, 20))]
        assert [len(part) for part in parts] == [5, 15] and len(set(np.concatenate(parts).tolist())) == 1
        draws.append(parts[0][0])
    counts = np.bincount(draws, minlength=schedule.num_scales) / 300
    assert counts == pytest.approx(schedule.shares, abs=0.1) and counts.min() > 0


@pytest.mark.parametrize("method", [m for m in OURS if m != "lfm"])
def test_the_loss_of_one_stage_is_the_sum_over_its_bands(method):
    cfg = config(method, 2, size="48,2,3,2", stages="batch")
    model, schedule, lengths = network(cfg), SYSTEMS[method].schedule(cfg), set()
    for step in range(40):
        total, errors = SYSTEMS[method].loss(model, torch.randn(4, 1, 16, 16), None, schedule, BatchRandom(0, step, 4))
        lengths.add(len(errors))
        assert total.item() == pytest.approx(sum(e.mean().item() for _, e in errors if len(e)), rel=1e-5)
    assert lengths == {1, 2}


@pytest.mark.parametrize("stages", ["stratified", "batch"])
@pytest.mark.parametrize("method", OURS)
def test_the_loss_of_a_batch_is_the_mean_of_its_micro_batches(method, stages):
    cfg = config(method, 2, batch=20, size="48,2,3,2", stages=stages)
    factory, y = conditions("labels", 20)
    model, schedule, x1 = network(cfg, 2, factory), SYSTEMS[method].schedule(cfg), torch.randn(20, 2, 16, 16)
    for step in range(4):
        whole, errors = SYSTEMS[method].loss(model, x1, y, schedule, BatchRandom(0, step, 20))
        parts = [SYSTEMS[method].loss(model, x1[rows], y[rows], schedule, BatchRandom(0, step, 20, rows))[0].item()
                 for rows in (slice(0, 5), slice(5, 10), slice(10, 15), slice(15, 20))]
        assert np.mean(parts) == pytest.approx(whole.item(), rel=1e-5)
        assert all(((t >= 0) & (t <= 1)).all() and len(t) == len(error) for t, error in errors)
        assert sum(error.sum().item() for _, error in errors) / 20 == pytest.approx(whole.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# the same interface


def test_every_system_has_the_four_names():
    assert set(SYSTEMS) == set(METHODS)
    for system in SYSTEMS.values():
        assert all(callable(getattr(system, name)) for name in ("network", "schedule", "loss", "sample"))


@pytest.mark.parametrize("kind", ["labels", "vectors"])
@pytest.mark.parametrize("method", OURS)
def test_every_weight_gets_a_gradient_and_a_step_lowers_the_loss(method, kind):
    cfg = config(method, 2, batch=20, size="48,2,3,2", stages="stratified")
    factory, y = conditions(kind, 20)
    model, schedule, x1 = network(cfg, 2, factory), SYSTEMS[method].schedule(cfg), torch.randn(20, 2, 16, 16)
    before, _ = SYSTEMS[method].loss(model, x1, y, schedule, BatchRandom(0, 1, 20))
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for p in model.condition.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
        after, _ = SYSTEMS[method].loss(model, x1, y, schedule, BatchRandom(0, 1, 20))
    assert after < before


@pytest.mark.parametrize("kind", ["labels", "vectors"])
@pytest.mark.parametrize("method", OURS)
def test_every_system_samples_with_guidance(method, kind):
    cfg = config(method, 2, batch=20, size="48,2,3,2")
    factory, y = conditions(kind, 20)
    model, schedule, y = network(cfg, 2, factory), SYSTEMS[method].schedule(cfg), y[4:7]
    draw = partial(SYSTEMS[method].sample, schedule=schedule, shape=(2, 16, 16), solve=sampling.solve, solver="heun",
                   steps=6)
    guided = sampling.Guided(model, 1.5)
    x = draw(guided, ImageRandom(0, range(3)), y)
    again = draw(sampling.Guided(model, 1.5), ImageRandom(0, [2]), y[2:])
    assert x.shape == (3, 2, 16, 16) and x.isfinite().all() and x.std() > 0.05
    assert torch.allclose(x[2], again[0], atol=1e-5)        # an image depends on its seed and number only
    assert sum(guided.calls.values()) == 12 and guided.passes == 24


@pytest.mark.parametrize("method", OURS)
def test_stage_inputs_are_what_a_pass_of_a_stage_takes(method):
    model = network(config(method, 2, size="48,2,3,2"), 2)
    tokens = []

    def count(block, inputs):
        tokens.append(sum(x.shape[1] for x in inputs[0]))

    for module in model.modules():                          # `separate` has several networks
        if isinstance(module, MoTDiT):
            module.blocks[0].register_forward_pre_hook(count)
    for stage in range(model.num_scales):
        bands, t = model.stage_inputs(stage, 3)
        velocities = model(bands, t)
        assert tokens[-1] == model.tokens(stage) + model.num_cond
        assert [v.shape for v in velocities] == [band.shape for band in bands] and len(t) == 3
        assert bands[-1].shape == (3, 2, *[16 >> (model.num_scales - 1 - stage)] * 2)
    flops = memory.forward_flops(model.to("meta"))
    assert len(flops) == model.num_scales and flops == sorted(flops)


@pytest.mark.parametrize("settings, words", [
    (dict(method="dfm", mask="none"), "mask belongs to LapFlow"),
    (dict(method="edify", noise="independent"), "noise belongs to LapFlow"),
    (dict(method="lfm", num_scales=2), "LFM has one scale"),
    (dict(method="dfm", num_scales=3, batch=3), "at least 4 images"),
    (dict(method="gan"), "unknown method 'gan'; choose one of lapflow, lfm")])
def test_settings_that_do_not_fit_a_method_are_reported(settings, words):
    with pytest.raises(UserError, match=words):
        Config(**settings)


@pytest.mark.parametrize("name, value", [
    ("experts", "none"), ("noise", "independent"), ("full_range", False), ("mask", "none"), ("path", "gvp")])
def test_what_a_system_would_ignore_is_refused(name, value):
    for method in OURS[1:]:
        if method == "separate" and name in ("mask", "path"):
            assert getattr(config(method, **{name: value}), name) == value
            continue
        with pytest.raises(UserError, match=f"{name} belongs to LapFlow: leave it out with --method {method}"):
            config(method, **{name: value})


@pytest.mark.parametrize("method", ["pyramidal", "edify"])
def test_scales_with_patches_of_their_own_are_told_apart(method):
    """Two scales of 16 tokens each: an image goes through the layers of its own size, and no others."""
    model = network(config(method, 3, size="48,2,3,2", patches=(1.0, 2.0, 2.0)))
    assert model.num_tokens[:2] == [16, 16] and len(model.patch_in) == len(model.patch_out) == 3
    for i, side in enumerate(model.sides):
        for layer in (*model.patch_in, *model.patch_out):
            layer.requires_grad_(False)
        used = [model.patch_in[i].weight.requires_grad_(), model.patch_out[i].linear.weight.requires_grad_()]
        (v,) = model([torch.randn(2, model.in_channels, side, side)], torch.rand(2))
        assert v.shape[-1] == side and all(g.abs().sum() > 0 for g in torch.autograd.grad(v.square().sum(), used))


def test_dfm_needs_a_patch_size_it_can_halve():
    with pytest.raises(UserError, match="divisible by 4, not 2"):
        network(config("dfm", 3, size="48,2,3,2"))


@pytest.mark.parametrize("method", ["dfm", *(pytest.param(method, marks=pytest.mark.slow) for method in (
    "lfm", "pyramidal", "edify", "separate", "pyramidal-zero-overlap", "pixelflow", "edify-plain"))])
def test_training_continues_and_its_run_is_loaded_and_exported(method, tmp_path, capsys):
    quick = dict(method=method, num_scales=1 if method == "lfm" else 2, size="32,2,2,2", batch=20, solver="midpoint",
                 solver_steps=4, out=str(tmp_path / "run"), num_samples=5)
    train.train(Config(**quick, steps=3), device="cpu")
    train.finish(train.train(Config(**quick, steps=5), device="cpu"))
    assert "continuing" in capsys.readouterr().out and (tmp_path / "run/trajectory.png").exists()
    run = load_run(str(tmp_path / "run"), device="cpu")
    draw = partial(sampling.generate, num=3, y=torch.arange(3), progress=False, solver="euler", steps=8, cfg_scale=1.5)
    images, report = draw(run)
    assert run.cfg.method == method and images.shape == (3, 8, 8, 1) and report["forwards"] == 16
    assert report["nfe_segments"] == {"lfm": [8], "dfm": [6, 2]}.get(method, report["nfe_segments"])
    export(run, tmp_path / "shared")
    assert np.array_equal(images, draw(load_run(str(tmp_path / "shared"), device="cpu"))[0])
