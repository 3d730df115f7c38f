"""What the causal mask costs in exactness, computed and not trained: docs/mask_cost.png.

For Gaussian data both velocity fields are linear and known in closed form. The optimal joint field is
E[v_i | all bands]; with the mask band i can only be given E[v_i | bands 0..i]. Each field moves the noise to t = 1; the
figure shows how far the covariance of the result is from that of the data, against the start time T of the fine band
(K = 2).

    python -m studies.mask_cost [--record results/mask_cost.jsonl]
    python -m docs.figures --only mask_cost                         drawn again from the recorded lines
"""

from pathlib import Path

import numpy as np
import torch

import config
from config import Config
from data.batches import load
from pyramid import decompose
from run import log
from schedule import Schedule
from studies.output import plot


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
    names = list(dict.fromkeys(row["data"] for row in rows))
    curves = [([float(t) for t in row["errors"]], [100 * error for error in row["errors"].values()],
               dict(label=f"{row['data']}, {'causal mask' if row['causal'] else 'no mask'}", marker=".",
                    color=f"C{names.index(row['data'])}", linestyle="-" if row["causal"] else ":")) for row in rows]
    plot(path, curves, (7, 4), xlabel="start time T of the fine band", ylabel="error of the covariance, %",
         ylim=(0, None))


def covariances(side: int) -> dict[str, np.ndarray]:
    """Of three kinds of images, by name, (side^2, side^2) each."""
    digits = load(Config()).pixels.reshape(-1, side * side) / 127.5 - 1
    photos = load(Config(dataset="photos", res=side))
    crops = [photos.reference(4096, seed)[0].mean(dim=1).flatten(1).numpy() for seed in range(4)]
    row, column = np.divmod(np.arange(side * side), side)
    distance = np.hypot(row[:, None] - row, column[:, None] - column)
    return {"digits": np.cov(digits, rowvar=False), "crops of photographs": np.cov(np.concatenate(crops), rowvar=False),
            "correlation 0.9 per pixel": 0.25 * 0.9**distance}


def main() -> None:
    parser = config.parser(__doc__, "python -m studies.mask_cost [--record FILE]")
    parser.add_argument("--record", metavar="FILE", help="append the numbers and how they were made to a .jsonl file")
    args, rows, side = parser.parse_args(), [], 8
    log.check_record(args.record)
    transform, sizes = pyramid_matrix(side)
    noise = transform @ transform.T                         # the pyramid of one white image
    for name, cov in covariances(side).items():
        target = transform @ cov @ transform.T
        for causal in (True, False):
            errors = {}
            for start in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
                result = result_covariance(target, noise, sizes, Schedule((0.0, start)), causal)
                errors[str(start)] = np.linalg.norm(result - target) / np.linalg.norm(target)
            print(f"{name}, {'causal' if causal else 'no mask'}: "
                  + "  ".join(f"T={start} {100 * error:.3f}%" for start, error in errors.items()), flush=True)
            rows.append({"data": name, "causal": causal, "errors": errors})
            if args.record:
                log.record(args.record, Config(), torch.device("cpu"), rows[-1])
    draw(Path(__file__).resolve().parent.parent / "docs" / "mask_cost.png", rows)


if __name__ == "__main__":
    config.run(main)
