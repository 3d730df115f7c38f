"""Scores as lines for people."""

import math
import re

import numpy as np

MEANING = {
    "frechet_pixel": "Frechet distance of pixels in [0, 1], 8 x 8; lower is better",
    **dict.fromkeys(("frechet", "fid", "fdd"), "Frechet distance of the features; lower is better"),
    "precision": "share of generated images among the real ones (k = 3)",
    "recall": "share of real images among the generated ones (k = 3)",
    "kid": "kernel distance (unbiased MMD^2, cubic) of the features, x 1000; lower is better",
    "inception_score": "number of classes that are told apart; higher is better",
    "novelty": "distance to the nearest training image, over that of a real image; near 0 means copies",
    "class_variance": "variance inside a class, over the real one; 1 is right",
    "class_variance_pixel": "the same in pixels, averaged to 8 x 8",
    "label_agreement": "share that a classifier of real images puts in the class asked for",
}


def table(scores: dict) -> str:
    """With several sets, their means and standard deviations."""
    real, file = scores.get("real", {}), scores.get("reference")
    if file:
        used = f", {scores['n_reference']} of them compared" if scores["n_reference"] != file.get("n") else ""
        count = file.get("n", "an unknown number of")
        lines = [f"reference  {file['file']}: {count} images{used}, codec {scores['codec']}"]
    else:
        against = "others against the same" if "extractor" in scores else "of these against the others"
        lines = [f"reference  {scores['n']} generated images against {scores['n_reference']} of the "
                 f"{scores.get('split', 'training')} set; real: {real.get('n', 0)} {against}"]
    lines += [f"features   {scores['extractor'][:108]}"] if "extractor" in scores else []
    lines.append(f"{'':20s} {'this run':>9s} {'real' if real else '':>9s}")
    for name, value in scores.items():
        if name in MEANING or re.fullmatch(r"swd_\d+", name):
            text = MEANING.get(name, f"sliced Wasserstein x 1000 of the level of {name[4:]} pixels; lower is better")
            title, unit = scores["name"] if name in ("frechet", "fid", "fdd") else name, 1000 if name == "kid" else 1
            columns = [f"{unit * x:9.{4 if abs(unit * x) < 1000 else 0}f}" for x in (value, real.get(name, math.nan))]
            if sets := scores.get(f"{name}_sets"):
                text += f"; ± {unit * np.std(sets, ddof=1):.4f} over {len(sets)} sets"
            lines.append(f"{title:20s} {columns[0]} {columns[1] if real else '':9s}   {text}")
    return "\n".join(lines)


def average(rows: list[dict]) -> dict:
    """The scores of one set; of several, their means, and those of each set under NAME_sets."""
    if len(rows) == 1:
        return rows[0]
    sets = {name: [row[name] for row in rows] for name, value in rows[0].items() if isinstance(value, float)}
    return rows[0] | {name: float(np.mean(values)) for name, values in sets.items()} | {
        f"{name}_sets": values for name, values in sets.items()}
