"""How studies show their results: a Markdown table, a mean with its spread, where lines come from."""

import statistics
from collections.abc import Iterable


def markdown(head: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def spread(values: list[float], places: int) -> str:
    """Mean and, over several seeds, the standard deviation."""
    text = f"{statistics.mean(values):.{places}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{places}f}"


def seeds(groups: Iterable[list[dict]]) -> str:
    """How many training seeds the rows of a table have, and what it shows of them."""
    counts = sorted({len(rows) for rows in groups if rows})
    several = "s, mean ± standard deviation" if counts[-1] > 1 else ""
    return f"{' to '.join(map(str, sorted({counts[0], counts[-1]})))} training seed{several}"


def origin(rows: list[dict], *keys: str) -> str:
    """Where lines of results come from: the values of `keys`, then the commit."""
    def values(key):
        return ", ".join(sorted({str(row[key]) for row in rows}))

    return "; ".join([*map(values, keys), f"commit {values('commit')}"])
