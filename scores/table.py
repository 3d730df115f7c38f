"""Scores as lines for people."""

import math

MEANING = {
    "frechet_pixel": "Frechet distance of pixels in [0, 1], 8 x 8; lower is better",
    **dict.fromkeys(("frechet", "fid"), "Frechet distance of the features; lower is better"),
    "precision": "share of generated images among the real ones (k = 3)",
    "recall": "share of real images among the generated ones (k = 3)",
    "kid": "kernel distance (unbiased MMD^2, cubic) of the features, x 1000; lower is better",
    "novelty": "distance to the nearest training image, over that of a real image; near 0 means copies",
    "class_variance": "variance inside a class, over the real one; 1 is right",
    "class_variance_pixel": "the same in pixels, averaged to 8 x 8",
    "label_agreement": "share that a classifier of real images puts in the class asked for",
}


def table(scores: dict) -> str:
    """A line for each score, beside that of real images."""
    real, file = scores.get("real", {}), scores.get("reference")
    if file:
        lines = [f"reference  {file['file']}: {file.get('n', 'an unknown number of')} images"]
    else:
        against = "others against the same" if "extractor" in scores else "of these against the others"
        lines = [f"reference  {scores['n']} generated images against {scores['n_reference']} of the "
                 f"{scores.get('split', 'training')} set; real: {real.get('n', 0)} {against}"]
    lines += [f"features   {scores['extractor'][:108]}"] if "extractor" in scores else []
    lines.append(f"{'':20s} {'this run':>9s} {'real' if real else '':>9s}")
    for name, value in scores.items():
        if name in MEANING:
            title, unit = scores["name"] if name in ("frechet", "fid") else name, 1000 if name == "kid" else 1
            columns = [f"{unit * x:9.{4 if abs(unit * x) < 1000 else 0}f}" for x in (value, real.get(name, math.nan))]
            lines.append(f"{title:20s} {columns[0]} {columns[1] if real else '':9s}   {MEANING[name]}")
    return "\n".join(lines)
