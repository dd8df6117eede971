"""What a run of gpu_check found: tables for a terminal, and pictures."""

from __future__ import annotations

from pathlib import Path

from benchmarks.reporting.by_shape import by_shape, head_shape, schedules
from benchmarks.reporting.tables import aligned, cells, ratio, relative, shown

MOST_CHARACTERS = 9_500  # of what is printed last: some terminals keep no more


def merged(done: list[dict]) -> list[dict]:
    """One table a case, side and mode, of the rows that several steps measured.

    A row from a later table brings along the times of those that took turns with it there, for ratios of the same rounds.
    """
    found = {}
    for table in (row["table"] for result in done for row in result["rows"] if "table" in row):
        key = tuple(table[name] for name in ("case", "side", "mode", "dtype"))
        if key not in found:
            found[key] = table
            continue
        known = {row["provider"] for row in found[key]["rows"]}
        beside = {row["provider"]: row["seconds"] for row in table["rows"] if row["provider"] in known and row["seconds"]}
        new = [{**row, "beside": beside} for row in table["rows"] if row["provider"] not in known]
        found[key] = {**found[key], "rows": [*found[key]["rows"], *new]}
    return list(found.values())


def summary(done: list[dict], most: int = MOST_CHARACTERS) -> str:
    """Tables of what was measured, the most important ones and a line for each step last; cut at the top if too long."""
    found = {result["step"]: [row for row in result["rows"] if row.get("ok", True)] for result in done}
    parts = [drawn(table, rows) for step, table in TABLES.items() if (rows := found.get(step))]
    if tables := merged(done):
        parts.append(drawn(_cases, tables))
    text = "\n\n".join([*parts, _steps(done)])
    return text if len(text) <= most else f"...{text[-most:]}"


def drawn(table, rows: list[dict]) -> str:
    try:
        return table(rows)
    except Exception as error:  # minutes of a GPU lie behind the other tables
        return f"{table.__name__.strip('_')}: could not be drawn, {type(error).__name__}: {error}"


# --- steps ---------------------------------------------------------------------------------------------------------


def _steps(done: list[dict]) -> str:
    """A step that only prepares others has a line if something went wrong."""
    listed = [r for r in done if r["status"] != "ok" or not r["step"].startswith("ahead")]
    table = aligned([["step", "status", "time"], *([r["step"], r["status"], f"{r['seconds']:.0f} s"] for r in listed)])
    notes = ["", *map(_note, listed)]
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(table.splitlines(), notes, strict=True))


def _note(result: dict) -> str:
    message = result["message"][:120]
    return "; ".join(note for note in (message, *_notes(result["step"], result["rows"])) if note)


def _notes(step: str, rows: list[dict]) -> list[str]:
    if step == "tests" and rows:
        return [", ".join(f"{rows[-1][what]} {what}" for what in ("passed", "skipped", "failed") if what in rows[-1])]
    if step == "tune" and rows:
        return ["; ".join(", ".join(f"{name} {value}" for name, value in row["chosen"].items()) for row in rows)]
    if tables := [row["table"] for row in rows if "table" in row]:
        told = [row for table in tables for row in table["rows"] if _matters(row)]
        return [*(f"{row['provider']}: {row['status']} {row['message'][:120]}" for row in told), f"{len(tables)} tables"]
    if checks := [row["ok"] for row in rows if "ok" in row]:
        return [f"{sum(checks)} of {len(checks)} checks"]
    return [f"{len(rows)} measured"] if rows else []


def _matters(row: dict) -> bool:
    return bool(row["message"]) and (row["status"] != "not run" or "not installed" in row["message"])


# --- tables --------------------------------------------------------------------------------------------------------


def _cases(tables: list[dict]) -> str:
    """A line a provider, the fastest first."""
    names = ["time", "eager = 1", "ours = 1", "of GEMMs", "peak", "logps", "gradient"]
    lines, prefixes = [], [table for table in tables if table["side"] == "prefix"]
    for table in (table for table in tables if table["side"] != "prefix"):
        lines.append([f"{table['side']}, {table['mode']}: {table['case']}", *[""] * len(names)])
        rows = [row for row in shown(table) if row["status"] != "not run"]
        lines += [_case_line(table, row, _compared(rows, row)) for row in rows]
    parts = ["A prompt run once\n" + aligned(by_shape(prefixes))] if prefixes else []
    return "\n\n".join([*parts, *([aligned([["case and provider", *names], *lines])] if lines else [])])


def _compared(rows: list[dict], row: dict) -> dict | None:
    """Our row that took turns with this one; the fastest that is exact where all were measured together."""
    ours = [r for r in rows if r["provider"].startswith("ours") and r.get("rows") is None and r["seconds"]]
    return next((r for r in ours if r["provider"] in row.get("beside", ())), ours[0] if ours else None)


def _case_line(table: dict, row: dict, ours: dict | None) -> list[str]:
    text = cells(table, row)
    worst = max((e for name, e in row["errors"].items() if name.startswith("d_") and e is not None), default=None)
    against = "" if row["provider"].startswith("ours") else ratio(relative(row, ours))
    times = [text["time"], text["time, eager = 1"], against, text["GEMMs alone / time"]]
    return [f"  {text['provider']}"[:44], *times, text["peak"], text["logps"], "" if worst is None else f"{worst:.1e}"]


def _profile(rows: list[dict]) -> str:
    found = [(r["what"], k) for r in rows for k in r["kernels"][:5]]
    lines = [[f"{what}: {k['kernel'][:44]}", f"{k['ms']:.2f} ms", f"{k['launches']} x"] for what, k in found]
    return "Where the time goes\n" + aligned([["kernel", "time", "launches"], *lines])


def _head(rows: list[dict]) -> str:
    return "Head, forward and backward, bfloat16\n" + aligned(schedules(rows, launches=True))


def _rows(rows: list[dict]) -> str:
    names = ["forward GB/s", "of copy", "backward GB/s", "of copy", "copy GB/s", "host us"]
    lines = [
        [
            f"{r['T']} x {r['V']} {r['dtype']}, {r['launch']}",
            _short(r["forward GB/s"]),
            f"{r['forward of copy']:.2f}",
            _short(r["backward GB/s"]),
            f"{r['backward of copy']:.2f}",
            _short(r["copy GB/s"]),
            f"{(r['forward on the host'] + r['backward on the host']) * 1e6:.0f}",
        ]
        for r in rows
    ]
    title = "From logits: bandwidth, and its share of what copying as many bytes reaches\n"
    return title + aligned([["logits", *names], *lines])


TABLES = {"profile": _profile, "rows": _rows, "head": _head}  # in the order they are printed


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


# --- pictures ------------------------------------------------------------------------------------------------------


def draw(done: list[dict], folder: Path) -> list[Path]:
    """Bandwidth of the rows and rate of the head, if they were measured and matplotlib is there."""
    rows = {r["step"]: [row for row in r["rows"] if row.get("ok", True)] for r in done}
    try:
        from benchmarks.reporting.plots import plt, save
    except ImportError:
        return []
    files = []
    if bf16 := [r for r in _best_launch(rows.get("rows", [])) if r["dtype"] == "bfloat16"]:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
        for axis, which in zip(axes, ("forward", "backward"), strict=True):
            for v in sorted({r["V"] for r in bf16}):
                line = sorted((r["T"], 100 * r[f"{which} of copy"]) for r in bf16 if r["V"] == v)
                axis.plot(*zip(*line, strict=True), "o-", label=f"V {v}")
            axis.set(xscale="log", title=which, xlabel="tokens", ylabel="% of measured copy bandwidth", ylim=(0, 110))
            axis.grid(alpha=0.3)
        axes[1].legend()
        files.append(save(figure, folder / "rows.png"))
    if head := [r for r in _best_launch(rows.get("head", [])) if not r["ignored"]]:
        figure, axis = plt.subplots(figsize=(9, 1 + len(head) / 3))
        names = [f"{head_shape(r)}, {r['schedule']}" for r in head][::-1]
        axis.barh(names, [r["GEMMs TFLOP/s"] for r in head][::-1], color="lightgrey", label="its GEMMs alone")
        axis.barh(names, [r["TFLOP/s"] for r in head][::-1], height=0.5, color="tab:blue", label="ours")
        axis.set(xlabel="TFLOP/s")
        axis.legend()
        files.append(save(figure, folder / "head.png"))
    return files


def _best_launch(rows: list[dict]) -> list[dict]:
    """Those of the tuned launches where there are any."""
    return [r for r in rows if r["launch"] == rows[-1]["launch"]]
