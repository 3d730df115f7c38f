"""How studies show their results: a Markdown table, a mean with its spread, a plot of curves."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from run import pictures


def markdown(head: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def spread(values: list[float], places: int) -> str:
    """Mean and, over several seeds, the standard deviation."""
    text = f"{statistics.mean(values):.{places}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{places}f}"


def seeds(groups: Iterable[list[dict]]) -> str:
    """How many training seeds the rows of a table have."""
    counts = sorted({len(rows) for rows in groups if rows})
    return f"{' to '.join(map(str, sorted({counts[0], counts[-1]})))} training seed{'s' if counts[-1] > 1 else ''}"


def plot(path: Path, curves: list[tuple], size: tuple = (8, 5), plain: bool = True, **axes) -> None:
    """curves: (x, y, matplotlib's keywords) of each; plain: numbers on logarithmic axes without powers of ten."""
    plt = pictures.pyplot()
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    for x, y, style in curves:
        axis.plot(x, y, **style)
    axis.set(**axes)
    axis.grid(which="both", alpha=0.3)
    if plain:
        pictures.plain_ticks(axis)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def origin(rows: list[dict], *keys: str) -> str:
    """Where lines of results come from: the values of `keys`, then the commit."""
    def values(key):
        return ", ".join(sorted({str(row[key]) for row in rows}))

    return "; ".join([*map(values, keys), f"commit {values('commit')}"])
