"""The histograms of a summary as one picture."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise
from typing import Any

from .facts import DataSummary
from .spread import Spread, number

COLOUR, ABOVE = "#3b6ea8", "#b9c9dd"
UNIT = 1e300  # of numbers beyond it: widths and margins of the axes would overflow


def histograms(summary: DataSummary, form: str = "svg") -> bytes:
    """A picture ("svg" or "png") of sizes, scores and tokens."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.4), layout="constrained")
    FigureCanvasAgg(figure)  # not through pyplot: the caller's backend stays
    limits = summary.limits
    prompt, both = limits["max_prompt_length"], limits["max_length"]
    what = ("lists", None), ("answers", None), ("prompts", ("max_prompt_length", prompt)), ("answers", ("max_length", both))
    panels = zip(figure.subplots(2, 2).flat, summary.spreads().items(), what, strict=True)
    for axes, (label, spread), (of, limit) in panels:
        unit = UNIT if max(-spread.least, spread.most) > UNIT else 1
        _histogram(axes, spread if unit == 1 else _in_units(spread), limit)
        axes.set_xlabel(label.lower() if unit == 1 else f"{label.lower()}, in units of {unit:g}")
        axes.set_ylabel(of)
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "larpo"}):  # the same facts make the same file
        figure.savefig(picture, format=form, dpi=120, metadata={"Date": None} if form == "svg" else None)
    return picture.getvalue()


def _histogram(axes: Any, spread: Spread, limit: tuple[str, int | None] | None) -> None:
    values = all(low == high for low, high, _ in spread.bars)
    if values:
        at = [low for low, _, _ in spread.bars]
        gap = min((b - a for a, b in pairwise(at)), default=1.0)
        axes.bar(at, [n for _, _, n in spread.bars], width=0.8 * gap, color=COLOUR)
        if len(at) <= 8:
            axes.set_xticks(at, labels=[f"{x:g}" for x in at])
        if len(at) == 1:
            axes.set_xlim(at[0] - 2, at[0] + 2)
    else:
        _ranges(axes, spread)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    if limit is not None and limit[1] is not None and limit[1] <= axes.get_xlim()[1]:
        axes.axvline(limit[1], color="#c0392b", linewidth=1.2)
        where = {"xy": (limit[1], 0.97), "xycoords": ("data", "axes fraction"), "va": "top"}
        axes.annotate(f" {limit[0]} {number(limit[1])}", color="#c0392b", fontsize="small", **where)


def _in_units(spread: Spread) -> Spread:
    return replace(spread, bars=tuple((low / UNIT, high / UNIT, n) for low, high, n in spread.bars))


def _ranges(axes: Any, spread: Spread) -> None:
    """Bars of one width; the last one, where it is of all that is far above, in another colour and with words."""
    low, high, n = spread.bars[-1]
    width = spread.bars[1][0] - spread.bars[0][0]
    far = high - low > 1.001 * width
    near = spread.bars[:-1] if far else spread.bars
    axes.bar([a for a, _, _ in near], [n for _, _, n in near], width=width * 0.94, align="edge", color=COLOUR)
    if far:
        axes.bar([low], [n], width=width * 0.94, align="edge", color=ABOVE)
        where = {"xy": (low + width / 2, n), "xytext": (0, 3), "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"{n:,} above,\nup to {number(high)}", color="#555", fontsize="small", **where)
