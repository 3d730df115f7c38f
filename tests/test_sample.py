import sys

import numpy as np
import pytest
import torch

from baselines import lapflow
from config import Config, UserError
from conftest import ROOT, random_model
from data import fashion
from data.batches import ImageRandom, digits
from data.conditions import Labels
from pyramid import decompose, reconstruct
from run import checkpoint, gallery, pictures
from run.load import Run
from run.solver import share_steps
from sample import Guided, generate, solve
from schedule import PATHS, Schedule

# ---------------------------------------------------------------------------------------------------------------------
# Gaussian data x_1 ~ N(0, S): the optimal velocity is linear in the state and known in closed form, so is the flow.
# With the state z = A x_1 + B n of the active bands, v = A' x_1 + B' n and E[v | z] = Cov(v, z) Cov(z)^-1 z.

SIDE = 8


def pyramid_matrices(num_scales):
    """Row blocks P_i with band_i = P_i x for images of SIDE x SIDE pixels."""
    basis = torch.eye(SIDE**2, dtype=torch.float64).view(-1, 1, SIDE, SIDE)
    return [band.flatten(1).T.contiguous() for band in decompose(basis, num_scales)]


def smooth_covariance():
    """A stationary covariance that falls with the distance, with more power in coarse bands, as images have."""
    place = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), -1).view(-1, 2).double()
    return torch.exp(-torch.cdist(place, place) / 2)


class GaussianOracle:
    """E[v_i | bands it may read]: all active bands (mask="none") or bands 0..i (mask="causal")."""

    def __init__(self, schedule, covariance, mask):
        self.schedule, self.covariance, self.mask = schedule, covariance, mask
        self.matrices = pyramid_matrices(schedule.num_scales)

    def __call__(self, bands, t):
        rows = []
        for i, p in enumerate(self.matrices[: len(bands)]):
            alpha, sigma, d_alpha, d_sigma = (c.item() for c in self.schedule.coefficients(i, t.double()))
            rows.append((alpha * p, sigma * p, d_alpha * p, d_sigma * p))
        z, out = [band.flatten(1) for band in bands], []
        for i, (_, _, d_data, d_noise) in enumerate(rows):
            read = i + 1 if self.mask == "causal" else len(bands)
            data, noise = (torch.cat([row[c] for row in rows[:read]]) for c in (0, 1))
            cov_vz = d_data @ self.covariance @ data.T + d_noise @ noise.T
            cov_zz = data @ self.covariance @ data.T + noise @ noise.T
            gain = cov_vz @ torch.linalg.pinv(cov_zz, rtol=1e-10, hermitian=True)   # fine bands have lower rank
            out.append((torch.cat(z[:read], dim=1) @ gain.T).view_as(bands[i]))
        return out


def flow_matrix(schedule, mask, covariance=None, **solver):
    """The flow is linear, x_1 = M n: solving it for the basis vectors of n gives M, and M M^T is the covariance."""
    basis = torch.eye(SIDE**2, dtype=torch.float64).view(-1, 1, SIDE, SIDE)
    oracle = GaussianOracle(schedule, smooth_covariance() if covariance is None else covariance, mask)
    bands, nfe = solve(oracle, decompose(basis, schedule.num_scales), schedule, **solver)
    assert nfe > 0
    return [band.flatten(1).T for band in bands], reconstruct(bands).flatten(1).T


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("starts", [(0.0,), (0.0, 0.5), (0.0, 0.33, 0.67)])
def test_unmasked_oracle_reproduces_the_data_covariance(starts, path):
    _, flow = flow_matrix(Schedule(starts, path), "none", rtol=1e-6, atol=1e-6)
    covariance = smooth_covariance()
    assert (flow @ flow.T - covariance).norm() / covariance.norm() < 1e-3


@pytest.mark.parametrize("starts", [(0.0, 0.5), (0.0, 0.33, 0.67)])
def test_causal_oracle_reproduces_the_coarsest_band(starts):
    schedule, covariance = Schedule(starts), smooth_covariance()
    bands, flow = flow_matrix(schedule, "causal", rtol=1e-6, atol=1e-6)
    p = pyramid_matrices(schedule.num_scales)[0]
    coarse = p @ covariance @ p.T
    assert (bands[0] @ bands[0].T - coarse).norm() / coarse.norm() < 1e-3
    # the finer bands are not exact: that is what the mask costs (a few per cent)
    assert 1e-3 < (flow @ flow.T - covariance).norm() / covariance.norm() < 0.1


@pytest.mark.parametrize("start", ["0.1", "0.5", "0.9"])
@pytest.mark.parametrize("data", ["digits", "correlation 0.9 per pixel"])
def test_the_mask_costs_what_the_results_say(data, start):
    """docs/results.md, What the mask costs: the error of the covariance of both bands."""
    place = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), -1).view(-1, 2).double()
    pixels = torch.from_numpy(digits().pixels.reshape(-1, SIDE**2) / 127.5)
    covariance = pixels.T.cov() if data == "digits" else 0.25 * 0.9 ** torch.cdist(place, place)
    bands, _ = flow_matrix(Schedule((0.0, float(start))), "causal", covariance, rtol=1e-6, atol=1e-6)
    flow, p = torch.cat(bands), torch.cat(pyramid_matrices(2))
    target = p @ covariance @ p.T
    recorded = [row for row in checkpoint.read_lines([ROOT / "results" / "mask_cost.jsonl"]) if row["data"] == data]
    assert [row["causal"] for row in recorded] == [True, False]
    assert (flow @ flow.T - target).norm() / target.norm() == pytest.approx(recorded[0]["errors"][start], rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not fashion.DEBIAN.exists(), reason="needs dataset-fashion-mnist of Debian")
def test_the_mask_costs_the_variety_of_garments_what_the_results_say(monkeypatch):
    """docs/results.md, Where variety is lost: for Gaussians with the mean covariance inside a class, 32 x 32."""
    monkeypatch.setattr(sys.modules[__name__], "SIDE", 32)
    pixels, labels, _ = fashion.read("")
    x, labels = torch.from_numpy(pixels.reshape(-1, SIDE**2) / 127.5), torch.from_numpy(labels)
    covariance = sum(x[labels == label].T.cov() for label in range(10)) / 10
    costs = []
    for starts in ((0.0, 0.5, 0.8), (0.0, 0.2, 0.4)):
        bands, _ = flow_matrix(Schedule(starts), "causal", covariance, rtol=1e-4, atol=1e-4)
        coarse, *kept = [(band**2).sum() / (p @ covariance @ p.T).trace()
                         for band, p in zip(bands, pyramid_matrices(3), strict=True)]
        assert coarse == pytest.approx(1, abs=0.002)
        costs.append(100 * (1 - sum(kept).item() / 2))
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    said = "it costs {:.0f}% of the variance of these bands, and {:.0f}% with starts at 0.2 and 0.4"
    assert said.format(*costs) in text


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk2", 2), ("rk4", 4)])
def test_fixed_step_solvers_have_their_order(solver, order):
    """Halving the step divides the error by 2^order: dx/dt = t - x has the solution t - 1 + (x_0 + 1) exp(-t)."""
    noise, schedule = [torch.ones(1, 1, 2, 2, dtype=torch.float64)], Schedule((0.0,))
    exact, errors = 2 / np.e, []
    for steps in (8, 16):
        bands, nfe = solve(lambda bands, t: [t - bands[0]], noise, schedule, solver, steps=steps)
        errors.append(abs(bands[0].mean().item() - exact))
        assert nfe == steps * {"euler": 1, "midpoint": 2, "heun": 2, "rk2": 2, "rk4": 4}[solver]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


def test_dopri5_meets_its_tolerance_and_counts_its_calls():
    calls, noise = [], [torch.ones(1, 1, 2, 2, dtype=torch.float64)]

    def velocity(bands, t):
        calls.append(t.item())
        return [torch.cos(3 * t) * bands[0]]

    bands, nfe = solve(velocity, noise, Schedule((0.0,)))
    assert bands[0].mean().item() == pytest.approx(np.exp(np.sin(3) / 3), abs=1e-5)
    assert nfe == len(calls) > 10


@pytest.mark.parametrize("solver", [dict(), dict(solver="euler", steps=9), dict(solver="rk4", steps=9)])
def test_solver_stays_inside_the_segments_and_bands_enter_at_their_law(solver):
    schedule, seen = Schedule((0.0, 0.33, 0.67)), []
    noise = [torch.randn(2, 1, s, s) for s in (2, 4, 8)]

    def velocity(bands, t):
        seen.append((len(bands), t.item(), [b.clone() for b in bands]))
        return [torch.zeros_like(b) for b in bands]

    bands, nfe = solve(velocity, noise, schedule, **solver)
    for count, t, _ in seen:
        start, end = schedule.segments[count - 1]
        assert start - 1e-6 <= t <= end + 1e-6
    assert nfe == len(seen) and {count for count, _, _ in seen} == {1, 2, 3}
    for i, start in enumerate(schedule.starts):                                 # nothing moved: sigma(T_i) x_0
        assert torch.allclose(bands[i], (1 - start) * noise[i])


def test_steps_are_shared_out_by_length():
    assert share_steps(20, Schedule((0.0, 0.5)).segments) == [10, 10]
    assert share_steps(10, Schedule((0.0, 0.33, 0.67)).segments) == [3, 4, 3]
    assert share_steps(10, Schedule((0.0, 0.2)).segments) == [2, 8]
    assert share_steps(1, Schedule((0.0, 0.33, 0.67)).segments) == [1, 1, 1]


def test_state_and_time_stay_float32_when_the_network_answers_in_bfloat16():
    def velocity(bands, t):
        assert t.dtype == torch.float32 and bands[0].dtype == torch.float32
        return [(-b).bfloat16() for b in bands]

    for solver in (dict(rtol=1e-2, atol=1e-2), dict(solver="heun", steps=4)):
        noise = [torch.ones(1, 1, 2, 2).bfloat16(), torch.ones(1, 1, 4, 4).bfloat16()]
        bands, _ = solve(velocity, noise, Schedule((0.0, 0.3337)), **solver)
        assert bands[0].dtype == bands[1].dtype == torch.float32
    bands, _ = solve(lambda bands, t: [0 * b for b in bands], noise, Schedule((0.0, 0.3337)))
    assert bands[1].mean().item() == pytest.approx(1 - 0.3337, abs=1e-6)        # sigma(T_1), not rounded to bfloat16


def test_sample_norm_holds_the_tolerance_for_the_worst_image():
    """One fast and 63 idle images: under the mean over the batch the fast one is allowed a larger error."""
    speed = torch.zeros(64, 1, 1, 1, dtype=torch.float64)
    speed[0] = 40.0
    noise = [torch.ones(64, 1, 2, 2, dtype=torch.float64)]

    def velocity(bands, t):
        return [speed * torch.cos(speed * t) * torch.ones_like(bands[0])]

    exact, error, nfe = 1 + np.sin(40.0), {}, {}
    for norm in ("batch", "sample"):
        bands, nfe[norm] = solve(velocity, noise, Schedule((0.0,)), norm=norm, rtol=1e-4, atol=1e-4)
        error[norm] = abs(bands[0][0, 0, 0, 0].item() - exact)
    alone, nfe_alone = solve(lambda bands, t: [speed[:1] * torch.cos(speed[:1] * t) * torch.ones_like(bands[0])],
                             [noise[0][:1]], Schedule((0.0,)), rtol=1e-4, atol=1e-4)
    assert nfe["sample"] == nfe_alone > nfe["batch"]
    assert error["sample"] < error["batch"]


@pytest.mark.parametrize("arguments, words", [
    (dict(solver="dopri5", steps=10), "--steps"), (dict(solver="euler"), "--steps"),
    (dict(solver="heun", steps=0), "--steps"), (dict(solver="heun", steps=-5), "cannot take -5 steps"),
    (dict(solver="magic"), "unknown solver")])
def test_arguments_that_do_not_fit_are_errors(arguments, words):
    with pytest.raises(UserError, match=words):
        solve(lambda bands, t: bands, [torch.zeros(1, 1, 2, 2)], Schedule((0.0,)), **arguments)


def test_a_tolerance_that_cannot_be_met_is_an_error():
    noise = [torch.ones(1, 1, 2, 2)]
    with pytest.raises(UserError, match="cannot meet rtol 1e-20.*larger tolerances"):
        solve(lambda bands, t: [torch.sin(50 * bands[0] + t)], noise, Schedule((0.0,)), rtol=1e-20, atol=1e-20)


@pytest.mark.parametrize("solver", [dict(), dict(solver="euler", steps=10)])
def test_a_velocity_that_is_not_finite_is_named(solver):
    def velocity(bands, t):
        return [b / (0.0 if t > 0.6 else 1.0) * 0 for b in bands]

    noise = [torch.ones(1, 1, 2, 2), torch.ones(1, 1, 4, 4)]
    with pytest.raises(UserError, match=r"not finite at t = 0\.\d+, in segment 1"):
        solve(velocity, noise, Schedule((0.0, 0.5)), **solver)


# ---------------------------------------------------------------------------------------------------------------------
# guidance


def test_guidance_zero_is_unconditional_one_is_conditional_and_two_extrapolates():
    model = random_model()
    bands = [torch.randn(2, 2, s, s) for s in (4, 8, 16)]
    t, y = torch.tensor([0.7, 0.9]), torch.tensor([0, 3])
    with torch.no_grad():
        null, conditional = model(bands, t, torch.tensor([5, 5])), model(bands, t, y)
    for scale in (0.0, 1.0, 2.0, 1.5):
        guided = Guided(model, scale)(bands, t, y)
        for v, v_null, v_cond in zip(guided, null, conditional, strict=True):   # all bands
            for channel in range(2):                                            # and all channels
                expected = v_null[:, channel] + scale * (v_cond[:, channel] - v_null[:, channel])
                assert torch.allclose(v[:, channel], expected, atol=1e-5)


def test_guidance_does_not_double_the_batch_for_nothing():
    sizes = []

    class Model(torch.nn.Module):
        condition = Labels("abcde", 4)

        def forward(self, bands, t, y):
            sizes.append(len(t))
            return bands

    bands, t, y = [torch.ones(2, 1, 4, 4)], torch.ones(2), torch.zeros(2, dtype=torch.long)
    for scale, labels in ((1.0, y), (3.0, None), (3.0, y)):
        Guided(Model(), scale)(bands, t, labels)
    for time in (0.49, 0.5, 1.0):                           # the start of an interval belongs to it, and 1
        Guided(Model(), 3.0, (0.5, 1.0))(bands, torch.full((2,), time), y)
    assert sizes == [2, 2, 4, 2, 4, 4]


# ---------------------------------------------------------------------------------------------------------------------
# images of a run


def run_of(model, tmp_path, classes=("a", "b", "c", "d", "e"), **settings):
    cfg = Config(res=16, num_scales=3, **settings)
    return Run(cfg, model, {"classes": list(classes)}, tmp_path, 7, "ema")


@pytest.mark.parametrize("noise", ["pyramid", "independent"])
def test_an_image_depends_on_its_seed_and_number_only(noise):
    """Fixed steps: the same up to rounding in any batch. The drawn noise: the same bit for bit."""
    model, schedule = random_model(), Schedule((0.0, 0.33, 0.67), noise=noise)
    y = torch.arange(6) % 5

    def draw(numbers, **solver):
        numbers = list(numbers)
        return lapflow.sample(Guided(model), ImageRandom(3, numbers), y[numbers], schedule, (2, 16, 16), solve,
                              **solver)

    whole = draw(range(6), solver="heun", steps=9)
    assert whole.abs().max() > 0.1
    for numbers in (range(2), [5], [4, 1]):
        assert (draw(numbers, solver="heun", steps=9) - whole[list(numbers)]).abs().max() < 1e-5
    one, many, other = (schedule.draw_noise(ImageRandom(seed, numbers), (2, 16, 16))
                        for seed, numbers in ((3, [4]), (3, range(6)), (2, [4])))
    assert all(torch.equal(a[0], b[4]) for a, b in zip(one, many, strict=True))
    assert not torch.equal(other[2], one[2])
    adaptive = draw(range(6)), draw([4])                                        # dopri5: within the tolerance
    assert (adaptive[0][4] - adaptive[1][0]).abs().max() < 1e-3


def test_generate_reports_what_it_did(tmp_path):
    run = run_of(random_model(), tmp_path)
    y = torch.arange(7) % 5
    images, report = generate(run, 7, y, seed=2, batch=3, cfg_scale=2.0, progress=False, solver="heun", steps=6)
    assert images.shape == (7, 16, 16, 2) and images.dtype == np.uint8
    assert report["nfe_segments"] == [4, 4, 4] and report["nfe"] == 12 and report["forwards"] == 24
    text = gallery.describe(report)
    assert "4 + 4 + 4 = 12" in text and "24 network passes" in text and "ema at step 7" in text
    again, _ = generate(run, 7, y, seed=2, batch=7, cfg_scale=2.0, progress=False, solver="heun", steps=6)
    assert np.abs(images.astype(int) - again).max() <= 1                        # rounding to 8 bits may differ


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.2, 0.5), (0.5, 1.0), (0.5, 0.8), (0.1, 0.4)])
@pytest.mark.parametrize("solver", [dict(), dict(solver="euler", steps=20), dict(solver="heun", steps=20),
                                    dict(solver="heun", steps=30), dict(solver="rk4", steps=30)])
def test_guidance_lasts_as_long_as_its_interval(interval, solver):
    """The velocity is 1, and with guidance 3; the interval ends where steps end, or where a band enters."""
    def model(bands, t, y):
        return [torch.ones_like(band) * (y == 1).view(-1, 1, 1, 1) for band in bands]

    model.condition, y = Labels(["a", "b"], 4), torch.ones(2, dtype=torch.long)
    guided = Guided(model, 3.0, interval)
    bands, _ = solve(lambda bands, t: guided(bands, t.expand(2), y), [torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 4, 4)],
                     Schedule((0.0, 0.5)), jumps=guided.jumps(y), **solver)
    low, high = interval
    for band, start in zip(bands, (0.0, 0.5), strict=True):
        expected = (1 - start) + 2 * max(0.0, high - max(low, start))
        assert torch.allclose(band, torch.tensor(expected), atol=1e-4), (band.mean(), expected)


def test_names_of_classes_are_drawn_as_they_are(tmp_path):
    name = "from $5_ to $10"                                # no formula
    pictures.draw_images(tmp_path / "x.png", [[np.zeros((8, 8, 1), np.uint8), name]], [[name, name]], [name], [name])
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_the_captions_of_a_grid_are_those_of_its_images(tmp_path, monkeypatch):
    drawn, images = [], np.arange(25, dtype=np.uint8).reshape(25, 1, 1, 1)
    monkeypatch.setattr(pictures, "draw_images", lambda path, rows, labels: drawn.append((rows, labels)))
    pictures.draw_grid(tmp_path / "grid.png", images, torch.arange(25), Labels([f"{i}" for i in range(25)], 4))
    ((rows, labels),) = drawn
    assert labels == [[f"{image.item()}" for image in row] for row in rows]
    assert [len(row) for row in rows] == [10, 10, 5]


def test_guidance_without_a_condition_or_without_a_null_is_an_error(tmp_path):
    run = run_of(random_model(num_classes=0), tmp_path, classes=())
    with pytest.raises(UserError, match="guidance needs a condition"):
        generate(run, 2, None, cfg_scale=2.0, solver="euler", steps=3)
    with pytest.raises(UserError, match="guidance needs a null condition"):
        undropped = run_of(random_model(), tmp_path, label_drop=0.0)
        generate(undropped, 2, torch.zeros(2, dtype=torch.long), cfg_scale=2.0, solver="euler", steps=3)
    images, _ = generate(run, 2, None, progress=False, solver="euler", steps=3)
    assert images.shape == (2, 16, 16, 2)
