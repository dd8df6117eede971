"""What a recorded table says, as text: rows in order, cells, headings; and rows of text as columns, as Markdown, in a page.

No dependencies, so it serves a bare machine too.
"""

from __future__ import annotations

from statistics import median, quantiles

from benchmarks.core.problem import MODES


def shown(table: dict) -> list[dict]:
    """Rows by time, the fastest formulation of a group standing for it, floors and failures last."""
    groups: dict[str, dict] = {}
    for row in table["rows"]:
        key = row["group"] or row["provider"]
        if key not in groups or _order(row) < _order(groups[key]):
            groups[key] = row
    return sorted(groups.values(), key=_order)


def _order(row: dict) -> tuple:
    failed = {"ok": 0, "WRONG": 2, "out of memory": 3, "error": 3, "not run": 4}[row["status"]]
    return (1 if row["floor"] and not failed else failed, seconds(row) if row["seconds"] else float("inf"))


def title_of(row: dict) -> str:
    if row["group"] is None:
        return row["provider"]
    return f"{row['group']} ({row['provider'].removeprefix(row['group']).strip()})"


def seconds(row: dict) -> float | None:
    return median(row["seconds"]) if row["seconds"] else None


def best(row: dict) -> float | None:
    return min(row["seconds"], default=None)


def spread(row: dict) -> float | None:
    """Half the distance between the quartiles, relative to the median."""
    if len(row["seconds"]) < 3:
        return None
    low, _, high = quantiles(row["seconds"], n=4, method="inclusive")
    return (high - low) / 2 / median(row["seconds"])


def floor_seconds(table: dict, gemms: int | None) -> float | None:
    """The fastest floor of as many GEMMs (any dtype), or of the traffic."""
    times = [seconds(r) for r in table["rows"] if r["floor"] and r["gemms"] == gemms and r["seconds"]]
    return min(times, default=None)


def baseline(table: dict) -> dict | None:
    """The row that others are compared with."""
    name = "trl DPOTrainer" if table["side"] == "trainer" else "eager"
    return next((r for r in table["rows"] if r["provider"] == name and r["seconds"]), None)


def relative(row: dict, base: dict | None) -> float | None:
    """Its time as a multiple of that of `base`, from the rounds in which the two took turns."""
    if not base or not row["seconds"] or not base["seconds"]:
        return None
    return seconds(row) / median(row.get("beside", {}).get(base["provider"], base["seconds"]))


def bound_reached(table: dict, row: dict) -> tuple[float, float] | None:
    """Times as fast as separate rows, and what share of the tokens' bound that is."""
    rows = [r for r in table["rows"] if r["provider"] == "separate rows" and r["seconds"]]
    if not rows or not row["seconds"] or row is rows[0]:
        return None
    faster = seconds(rows[0]) / seconds(row)
    return faster, faster / table["bound"]


def duration(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def size(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def exponent(row: dict, name: str) -> str:
    if name not in row["errors"]:
        return ""
    error = row["errors"][name]
    return "not finite" if error is None else f"{error:.1e}"


def columns(table: dict) -> list[str]:
    if table["side"] == "prefix":
        return ["provider", "time", "spread", "speed-up", "bound", "share of the bound", "peak", "logps", "d weights"]
    if table["side"] == "trainer":
        return [
            "provider",
            "computes",
            "time",
            "spread",
            "time, TRL = 1",
            "peak",
            "peak, TRL = 1",
            "loss",
            "loss off by",
            "logps",
        ]
    names = ["provider", "computes", "time", "spread", "time, eager = 1"]
    if table.get("small"):
        names = ["provider", "computes", "best", "time", "best, eager = 1"]
        names += ["kernels"] if table["device"] == "cuda" else []
    elif table["side"] == "linear":
        merges = any(row.get("rows") is not None for row in table["rows"])  # of a provider with a tail
        names += ["GEMMs", *(["rows"] if merges else []), "GFLOP/s", "GEMMs alone / time"]
    else:
        names += ["GB/s"]
    names += ["peak", "beyond gradients", "peak, eager = 1", "logps"]
    gradients = {
        "train": ["d logits"],
        "frozen": ["d hidden"],
        "trainable": ["d hidden", "d weight"],
        "score": [],
    }
    return [*names, *gradients[table["mode"]]]


def cells(table: dict, row: dict) -> dict[str, str]:
    """One row as text, by column name; what does not apply is empty."""
    text = {
        "provider": title_of(row),
        "computes": "" if row["floor"] else row["computes"],
        "GEMMs": str(row["gemms"] or ""),
        "rows": "" if row.get("rows") is None else f"{row['rows']:.0%}",
        "loss": "" if row.get("loss") is None else f"{row['loss']:.6f}",
        "loss off by": exponent(row, "loss"),
        "logps": exponent(row, "logps"),
        **{name: exponent(row, name.replace(" ", "_")) for name in ("d logits", "d hidden", "d weight", "d weights")},
        **_time_cells(table, row),
        **_memory_cells(table, row),
    }
    if row["status"] != "ok":
        text["time"] = row["status"]
    return text


def _time_cells(table: dict, row: dict) -> dict[str, str]:
    base, time = baseline(table), seconds(row)
    floor = floor_seconds(table, row["gemms"])
    gflops = row["gemms"] * table["gemm_flops"] / time / 1e9 if time and row["gemms"] else None
    bandwidth = table["traffic_bytes"] / time / 1e9 if time and table["traffic_bytes"] else None
    gain = bound_reached(table, row) if table["side"] == "prefix" else None
    against = ratio(relative(row, base))
    return {
        "time": duration(time),
        "spread": "1 run" if row["one_run"] else "" if spread(row) is None else f"± {spread(row):.0%}",
        "best": duration(best(row)),
        "best, eager = 1": ratio(best(row) / best(base) if time and base else None),
        "kernels": duration(row.get("kernel_seconds")),
        "time, eager = 1": against,
        "time, TRL = 1": against,
        "GFLOP/s": "" if gflops is None else f"{gflops:.0f}",
        "GEMMs alone / time": "" if row["floor"] else ratio(floor / time if floor and time else None),
        "GB/s": "" if bandwidth is None else f"{bandwidth:.3g}",
        "speed-up": ratio(gain and gain[0]),
        "bound": ratio(gain and table["bound"]),
        "share of the bound": f"{gain[1]:.0%}" if gain else "",
    }


def _memory_cells(table: dict, row: dict) -> dict[str, str]:
    base, peak = baseline(table), row["peak_bytes"]
    known = peak is not None and base and base["peak_bytes"]
    against = ratio(peak / base["peak_bytes"] if known else None)
    return {
        "peak": size(peak),
        "beyond gradients": size(None if peak is None else max(0, peak - table["gradient_bytes"])),
        "peak, eager = 1": against,
        "peak, TRL = 1": against,
    }


def heading(table: dict) -> str:
    t = table
    shape = f"{t['T']} tokens ({t['scored_tokens']} scored), V {t['V']}" + (f", H {t['H']}" if t["H"] else "")
    return f"{t['side']}, {t['mode']}: {t['case']}, {t['dtype']}, {t['lists']} lists of {t['m']}, {shape}"


def remarks(table: dict) -> list[str]:
    said = [MODES[table["mode"]] + (f"; {table['note']}" if table["note"] else "")]
    if table["gradient_bytes"]:
        said.append(f"gradients asked for: {size(table['gradient_bytes'])}")
    if table.get("plan"):
        said.append(f"schedule auto: {table['plan']}")
    said += [f"{r['provider']}: {r['status']}: {r['message']}" for r in table["rows"] if _worth_saying(r)]
    return said


def _worth_saying(row: dict) -> bool:
    return bool(row["message"]) and row["status"] != "not run"


def machine_line(result: dict) -> str:
    m, git = result["machine"], result["git"]
    cpu = f"{m['cpu']['model']}, {m['cpu']['cores']} threads, {' '.join(m['cpu']['instruction_sets'])}"
    commit = f"commit {(git['commit'] or 'unknown')[:10]}{' with changes' if git['dirty'] else ''}"
    packages = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if k in ("torch", "triton", "trl"))
    return "; ".join([m["gpu"] or cpu, packages, commit, result["date"][:10]])


def aligned(rows: list[list[str]]) -> str:
    """Rows of text as columns: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def as_markdown(rows: list[list[str]], rule: str = "---") -> str:
    """Rows of text as a Markdown table, the names first."""
    names, *body = rows
    lines = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in [names, [rule] * len(names), *body]]
    return "\n".join(f"| {line} |" for line in lines)


def filled(page: str, marker: str, content: str) -> str:
    """The page with other content between <!-- marker --> and <!-- /marker -->."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, rest = page.split(start)
    return f"{before}{start}\n\n{content}\n\n{end}{rest.split(end)[1]}"
