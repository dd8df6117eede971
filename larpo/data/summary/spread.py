"""The distribution of some numbers: least, median, most, and a histogram."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BARS = 24


@dataclass(frozen=True)
class Spread:
    """Of some numbers.

    bars: (from, to, how many): from == to where the numbers have few values, each of which is a bar; of other numbers those
    of a bar are below `to`, of whole numbers `to` is one of them. Where a hundredth of them is far above the rest, the last bar
    is all of that.

    >>> spread_of([2, 2, 4, 8])
    Spread(least=2, mean=4.0, median=3.0, high=8, most=8, bars=((2, 2, 2), (4, 4, 1), (8, 8, 1)))
    """

    least: float
    mean: float
    median: float
    high: float  # 95 of 100 are not above
    most: float
    bars: tuple[tuple[float, float, int], ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Spread:
        return cls(**dict(value) | {"bars": tuple(map(tuple, value["bars"]))})


def spread_of(numbers: np.ndarray | list[float]) -> Spread | None:
    """None for no numbers."""
    ordered = np.sort(numbers)
    n = len(ordered)
    if n == 0:
        return None
    values, counts = np.unique(ordered, return_counts=True)
    if len(values) <= BARS:
        bars = tuple((value, value, count) for value, count in zip(values.tolist(), counts.tolist(), strict=True))
    else:
        bars = _bars(ordered, ordered[_share(n, 99)].item())
    return Spread(
        least=ordered[0].item(),
        mean=float((ordered / n).sum()),  # of scores of 1e308 too
        median=float(ordered[(n - 1) // 2] / 2 + ordered[n // 2] / 2),
        high=ordered[_share(n, 95)].item(),
        most=ordered[-1].item(),
        bars=bars,
    )


def number(value: float, digits: int = 3) -> str:
    """A number for a person; whole ones in full.

    >>> number(12345), number(2.5), number(1234.0), number(1e-9), number(-1e300), number(4.6667, 1)
    ('12,345', '2.5', '1,234', '1e-09', '-1e+300', '4.7')
    """
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 10**-digits <= abs(value) < 10**7:
        return f"{value:,.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:,.0f}"
    return f"{value:.3g}"


def _share(n: int, percent: int) -> int:
    """The place of the number that so many of n are not above."""
    return -(-n * percent // 100) - 1


def _bars(numbers: np.ndarray, top: float) -> tuple[tuple[float, float, int], ...]:
    least, most = numbers[0].item(), numbers[-1].item()
    if most / 2 - top / 2 < (top / 2 - least / 2) / 2:
        top = most
    whole = np.issubdtype(numbers.dtype, np.integer)
    if whole:  # as many of them in each bar
        width = math.ceil((top + 1 - least) / BARS)
        edges = least + width * np.arange(math.ceil((top + 1 - least) / width) + 1)
    else:
        share = np.linspace(0, 1, BARS + 1)
        edges = least * (1 - share) + top * share
    far = whole or top < most  # then what is at the last edge is above the last of these bars
    counts, _ = np.histogram(numbers[numbers < edges[-1]] if far else numbers, edges)
    bars = [(a, b - whole, n) for a, b, n in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)]
    above = numbers.size - sum(counts.tolist())
    return tuple(bars + [(edges[-1].item(), most, above)] * (above > 0))
