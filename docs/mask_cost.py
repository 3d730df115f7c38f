"""What the causal mask costs in exactness, computed and not trained: docs/mask_cost.png.

For Gaussian data both velocity fields are linear and known in closed form. The optimal joint field is
E[v_i | all bands]; with the mask band i can only be given E[v_i | bands 0..i]. Each field moves the noise to t = 1; the
figure shows how far the covariance of the result is from that of the data, against the start time T of the fine band
(K = 2).

    python docs/mask_cost.py [--record results/mask_cost.jsonl]
    python docs/figures.py --only mask_cost                         drawn again from the lines recorded
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fid  # noqa: E402
from config import Config  # noqa: E402
from data import load  # noqa: E402
from pictures import pyplot  # noqa: E402
from pyramid import decompose  # noqa: E402
from schedule import Schedule  # noqa: E402


def pyramid_matrix(side: int) -> tuple[np.ndarray, list[int]]:
    """The linear map from an image to its two bands, stacked, and their sizes."""
    bands = decompose(torch.eye(side * side, dtype=torch.float64).view(-1, 1, side, side), 2)
    return torch.cat([band.flatten(1) for band in bands], dim=1).T.numpy(), [band[0].numel() for band in bands]


def result_covariance(data: np.ndarray, noise: np.ndarray, sizes: list[int], schedule: Schedule, causal: bool,
                      steps: int = 150) -> np.ndarray:
    """Covariance of the bands at t = 1 when the field moves the noise there (Runge-Kutta 4 on the flow map).

    data, noise: covariances of all bands (M, M). The bands of a pyramid are linearly dependent: a pseudo-inverse.
    """
    ends = np.cumsum(sizes)

    def field(t, active):
        size = ends[active - 1]
        alpha, sigma, d_alpha, d_sigma = (np.concatenate([np.full(n, float(c[k])) for n, c in zip(
            sizes[:active], (schedule.coefficients(i, t) for i in range(active)), strict=True)]) for k in range(4))
        s, n = data[:size, :size], noise[:size, :size]
        state = alpha[:, None] * s * alpha + sigma[:, None] * n * sigma             # Cov(x_t, x_t)
        cross = d_alpha[:, None] * s * alpha + d_sigma[:, None] * n * sigma         # Cov(v, x_t)
        if not causal:
            return cross @ np.linalg.pinv(state, rcond=1e-10, hermitian=True)
        result = np.zeros_like(state)
        for i in range(active):
            rows, seen = slice(ends[i] - sizes[i], ends[i]), slice(0, ends[i])
            result[rows, seen] = cross[rows, seen] @ np.linalg.pinv(state[seen, seen], rcond=1e-10, hermitian=True)
        return result

    flow = np.zeros((0, 0))
    for j, (start, end) in enumerate(schedule.segments):
        grown = np.zeros((ends[j], ends[j]))                # band j enters as sigma(T_j) x_0, independent of nothing
        grown[: len(flow), : len(flow)] = flow
        grown[len(flow) :, len(flow) :] = np.eye(sizes[j]) * float(schedule.coefficients(j, start)[1])
        flow, h = grown, (end - start) / steps
        for step in range(steps):
            t = start + step * h
            last = min(t + h, 1 - 1e-9)                     # at t = 1 the state has no noise left
            a, b, c = field(t, j + 1), field(t + h / 2, j + 1), field(last, j + 1)
            k1 = a @ flow
            k2 = b @ (flow + h / 2 * k1)
            k3 = b @ (flow + h / 2 * k2)
            flow = flow + h / 6 * (k1 + 2 * k2 + 2 * k3 + c @ (flow + h * k3))
    return flow @ noise @ flow.T


def draw(path: Path, rows: list[dict]) -> None:
    """The errors against T. rows: {"data": name, "causal": bool, "errors": {T: error}}."""
    figure, axis = pyplot().subplots(figsize=(7, 4), layout="constrained")
    names = list(dict.fromkeys(row["data"] for row in rows))
    for row in rows:
        axis.plot([float(t) for t in row["errors"]], [100 * error for error in row["errors"].values()],
                  color=f"C{names.index(row['data'])}", linestyle="-" if row["causal"] else ":", marker=".",
                  label=f"{row['data']}, {'causal mask' if row['causal'] else 'no mask'}")
    axis.set(xlabel="start time T of the fine band", ylabel="error of the covariance, %", ylim=(0, None))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws docs/mask_cost.png and prints its numbers.")
    parser.add_argument("--record", help="append the numbers and how they were made to a .jsonl file")
    args, side = parser.parse_args(), 8
    transform, sizes = pyramid_matrix(side)
    digits = load(Config()).pixels.reshape(-1, side * side) / 127.5 - 1
    row, column = np.divmod(np.arange(side * side), side)
    distance = np.hypot(row[:, None] - row, column[:, None] - column)
    photos = load(Config(dataset="photos", res=side))
    crops = [photos.reference(4096, seed)[0].mean(dim=1).flatten(1).numpy() for seed in range(4)]
    sets = {"digits": np.cov(digits, rowvar=False), "crops of photographs": np.cov(np.concatenate(crops), rowvar=False),
            "correlation 0.9 per pixel": 0.25 * 0.9**distance}
    noise = transform @ transform.T                         # the pyramid of one white image
    times, rows = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]), []
    for name, cov in sets.items():
        target = transform @ cov @ transform.T
        for causal in (True, False):
            errors = []
            for start in times:
                got = result_covariance(target, noise, sizes, Schedule((0.0, float(start))), causal)
                errors.append(np.linalg.norm(got - target) / np.linalg.norm(target))
            print(f"{name}, {'causal' if causal else 'unmasked'}: "
                  + "  ".join(f"T={t:.2g} {100 * e:.3f}%" for t, e in zip(times, errors, strict=True)))
            rows.append({"data": name, "causal": causal, "errors": dict(zip(map(str, times), errors, strict=True))})
            if args.record:
                fid.record(Path(args.record), Config(), torch.device("cpu"), rows[-1])
    draw(ROOT / "docs" / "mask_cost.png", rows)


if __name__ == "__main__":
    main()
