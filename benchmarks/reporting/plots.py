"""Pictures of recorded tables: error against time; time and memory against V, m, T and the masked share."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter

from benchmarks.reporting.tables import best, duration, seconds, shown, size, title_of

SWEEPS = {"V": "vocabulary", "m": "candidates per list", "T": "tokens", "masked": "share of tokens masked"}
SHAPE = ("case_kind", "side", "mode", "dtype", "device", "T", "H", "V", "m", "masked")
MARKERS = "osD^vP*Xhp<>d8"


def draw(results: list[dict], folder: Path) -> list[Path]:
    """Every picture the results have data for -> the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = [table for result in results for table in result["tables"] if table["side"] in ("logits", "linear")]
    small = [table for table in tables if table.get("small")]
    tables = [table for table in tables if table not in small]
    drawn = [error_against_time(table, folder) for table in tables]
    drawn += [cost_bars(table, folder) for table in tables]
    for field in SWEEPS:
        drawn += [sweep(field, points, folder) for points in _sweeps(tables, field)]
    drawn += [small_calls(small, folder)] if small else []
    return [path for path in drawn if path is not None]


def _measured(table: dict) -> list[dict]:
    return [row for row in shown(table) if row["status"] == "ok" and not row["floor"] and row["seconds"]]


def _look(name: str, names: list[str]) -> dict:
    """Ours in strong blues and greens, everybody else in greys and warm colours; one marker a provider."""
    ours = [n for n in names if n.startswith("ours")]
    others = [n for n in names if not n.startswith("ours")]
    kin = ours if name in ours else others
    shade = plt.get_cmap("winter" if name in ours else "autumn")(kin.index(name) / max(1, len(kin)))
    return {"color": shade, "marker": MARKERS[names.index(name) % len(MARKERS)]}


def _title(table: dict) -> str:
    return f"{table['side']}, {table['mode']}: {table['case']}, {table['dtype']} on {table['device']}"


def _file(table: dict, folder: Path, kind: str) -> Path:
    return folder / f"{table['device']}-{table['side']}-{table['mode']}-{table['case']}-{table['dtype']}-{kind}.png"


def save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)
    return path


def error_against_time(table: dict, folder: Path) -> Path | None:
    """A panel for each error: down and to the left is better."""
    rows = _measured(table)
    kinds = [k for k in ("logps", "d_logits", "d_hidden", "d_weight") if any(r["errors"].get(k) for r in rows)]
    if not rows or not kinds:
        return None
    names = [r["provider"] for r in rows]
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds) + 2, 4), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for row in rows:
            if row["errors"].get(kind):
                axis.plot(
                    seconds(row),
                    row["errors"][kind],
                    ls="",
                    ms=9,
                    label=title_of(row),
                    **_look(row["provider"], names),
                )
        axis.set(xscale="log", yscale="log", xlabel="time", title=_error_name(kind))
        _plain_ticks(axis.xaxis, [seconds(r) for r in rows], duration)
        axis.margins(0.15)
        axis.grid(alpha=0.3, which="both")
    figure.suptitle(f"Error against time. {_title(table)}")
    handles = {h.get_label(): h for axis in axes[0] for h in axis.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(0.92, 0.5), frameon=False)
    return save(figure, _file(table, folder, "error-time"))


def _error_name(kind: str) -> str:
    if kind == "logps":
        return "sequence log-likelihood, rms error in nats"
    return f"{kind.replace('_', ' ')}, relative error"


def cost_bars(table: dict, folder: Path) -> Path | None:
    """Memory and time of each provider side by side, slowest on top; a figure that was not measured has no bar."""
    rows = _measured(table)[::-1]
    if not rows:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.42 * len(rows) + 1.4), sharey=True)
    colors = ["tab:blue" if r["provider"].startswith("ours") else "silver" for r in rows]
    labels = [title_of(r) for r in rows]
    for axis, values, text, title in (
        (axes[0], [r["peak_bytes"] for r in rows], size, "extra peak memory"),
        (axes[1], [seconds(r) for r in rows], duration, "time"),
    ):
        bars = axis.barh(labels, [v or 0 for v in values], color=colors)
        axis.bar_label(bars, ["not measured" if v is None else text(v) for v in values], padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.margins(x=0.2)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    if table["gradient_bytes"]:
        axes[0].axvline(table["gradient_bytes"], color="black", lw=0.8, ls=":")
        axes[0].set_xlabel("dotted: the gradients themselves", fontsize=8)
    figure.suptitle(_title(table), y=1.02)
    return save(figure, _file(table, folder, "cost"))


def _sweeps(tables: list[dict], field: str) -> list[list[dict]]:
    """Runs of tables that differ in nothing but one field, sorted by it; at least two values."""

    def rest(table):
        kind = "".join(k for k in ("peaked",) if k in table["case"]) or table["case"].split("-")[0].rstrip("0123456789")
        return tuple(str({**table, "case_kind": kind}[key]) for key in SHAPE if key != field)

    eligible = sorted((t for t in tables if isinstance(t[field], int | float)), key=rest)
    groups = ({t[field]: t for t in same} for _, same in groupby(eligible, key=rest))
    return [[points[x] for x in sorted(points)] for points in groups if len(points) > 1]


def sweep(field: str, points: list[dict], folder: Path) -> Path:
    """Time and memory of every provider as one field grows."""
    groups = list(dict.fromkeys(r["group"] or r["provider"] for t in points for r in _measured(t)))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for name in groups:
        series = [(t[field], r) for t in points for r in _measured(t) if (r["group"] or r["provider"]) == name]
        look = _look(name, groups)
        axes[0].plot([x for x, _ in series], [seconds(r) for _, r in series], label=name, **look)
        held = [(x, r["peak_bytes"]) for x, r in series if r["peak_bytes"]]
        axes[1].plot([x for x, _ in held], [b for _, b in held], **look)
    for axis, text, title in ((axes[0], duration, "time"), (axes[1], size, "extra peak memory")):
        axis.set(yscale="log", xlabel=SWEEPS[field], title=title)
        values = [v for line in axis.get_lines() for v in line.get_ydata()]
        _plain_ticks(axis.yaxis, values, text)
        if field != "masked":
            axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator([t[field] for t in points]))
        axis.xaxis.set_major_formatter(FixedFormatter([f"{t[field]:g}" for t in points]))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    first = points[0]
    fixed = ", ".join(f"{k} {first[k]}" for k in ("T", "H", "V", "m") if k != field and first[k])
    figure.suptitle(f"{first['side']}, {first['mode']}, {first['dtype']} on {first['device']}: {fixed}")
    figure.legend(loc="center left", bbox_to_anchor=(0.92, 0.5), frameon=False)
    name = f"{first['device']}-{first['side']}-{first['mode']}-{first['dtype']}-against-{field}"
    others = "-".join(f"{k}{first[k]}" for k in ("T", "H", "V", "m") if k != field and first[k])
    return save(figure, folder / f"{name}-{others}.png")


def small_calls(tables: list[dict], folder: Path) -> Path:
    """Time per call against the number of logits, a panel for each side; dashed: plain PyTorch."""
    sides = list(dict.fromkeys(t["side"] for t in tables))
    groups = list(dict.fromkeys(r["group"] or r["provider"] for t in tables for r in _measured(t)))
    figure, axes = plt.subplots(1, len(sides), figsize=(5.5 * len(sides), 4), sharey=True, squeeze=False)
    for side, axis in zip(sides, axes[0], strict=True):
        for name in groups:
            rows = [(t["T"] * t["V"], r) for t in tables if t["side"] == side for r in _measured(t)]
            points = sorted((x, best(r)) for x, r in rows if name in (r["group"], r["provider"]))
            style = "--" if name in ("eager", "plain Function") else "-"
            axis.plot(*zip(*points, strict=True), label=name, ls=style, **_look(name, groups)) if points else None
        axis.set(xscale="log", yscale="log", xlabel="logits", title=f"from {'logits' if side == 'logits' else 'hidden states'}")
        axis.grid(alpha=0.3)
    _plain_ticks(axes[0][0].yaxis, [y for axis in axes[0] for line in axis.get_lines() for y in line.get_ydata()], duration)
    figure.suptitle(f"Time of a call, forward and backward, best of many; {tables[0]['dtype']} on {tables[0]['device']}")
    handles = {h.get_label(): h for axis in axes[0] for h in axis.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(0.92, 0.5), frameon=False)
    return save(figure, folder / f"{tables[0]['device']}-small-calls.png")


def _plain_ticks(axis, values: list[float], text) -> None:
    """A handful of ticks with units in words: the log axis of a narrow range shows none otherwise."""
    if not values:
        return
    low, high = min(values) / 1.5, max(values) * 1.5
    steps = (
        (1, 1.5, 2, 3, 4, 5, 7) if high / low < 8 else (1, 2, 5) if high / low < 50 else (1, 3) if high / low < 1000 else (1,)
    )
    ticks = [b * 10.0**e for e in range(-9, 13) for b in steps if low <= b * 10.0**e <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([text(v) for v in ticks]))
    axis.set_minor_formatter(NullFormatter())
