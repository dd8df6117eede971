"""What recipes show: Markdown tables, and curves and bars on matplotlib's axes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]  # the outcome of one arm from one seed: "arm", "seed", and what the recipe measures


def by_arm(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each arm, arms in the order in which they come first."""
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return arms


def mean(values: Sequence[float]) -> float | None:
    """None of no values."""
    return statistics.fmean(values) if values else None


def over_seeds(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean and standard deviation over seeds, those without a value left out.

    >>> over_seeds([1.0, 2.0, None, 3.0], digits=1)
    '2.0 ± 1.0'
    """
    values = [value for value in values if value is not None]
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with the keys of the first row as its head.

    >>> print(markdown([{"method": "a", "reward": 1}]))
    | method | reward |
    |---|---|
    | a | 1 |
    """
    head, *body = [f"| {' | '.join(map(str, cells))} |" for cells in (rows[0], *(row.values() for row in rows))]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def curves(axes, rows: Iterable[Row], key: str, x: Sequence[float] | None = None) -> None:
    """The mean of each arm's curves `row[key]`, and those of its seeds faintly behind it; arms without them are left out.

    An arm has the same colour in every panel. x: None for the places in the curve.
    """
    for place, (arm, found) in enumerate(by_arm(rows).items()):
        of_seeds = [row[key] for row in found if key in row]
        for curve in of_seeds:
            axes.plot(x or range(len(curve)), curve, color=f"C{place}", alpha=0.25, linewidth=0.8)
        if of_seeds:
            means = [statistics.fmean(values) for values in zip(*of_seeds, strict=True)]
            axes.plot(x or range(len(means)), means, color=f"C{place}", label=arm)


def bars(axes, rows: Iterable[Row], key: str) -> None:
    """A bar for the mean of each arm's values `row[key]`, and a dot for every seed."""
    arms = by_arm(rows)
    for place, found in enumerate(arms.values()):
        values = [row[key] for row in found]
        axes.bar(place, statistics.fmean(values), color="tab:blue", alpha=0.6)
        axes.plot([place] * len(values), values, ".", color="black")
    axes.set_xticks(range(len(arms)), [arm.replace(" ", "\n") for arm in arms], fontsize=8)
