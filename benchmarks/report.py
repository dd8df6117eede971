"""Tables from recorded results: on the terminal, and as Markdown between the README's markers.

    python benchmarks/report.py RESULTS.json ... --readme README.md [--plots FOLDER]

A marker pair `<!-- bench:NAME -->` ... `<!-- /bench:NAME -->` takes every recorded table NAME stands for:
    NAME = DEVICE/SIDE-MODE[/CASE[/DTYPE]]    cpu/logits-train, cuda/linear-frozen/T8192-H4096-V128256-m8, ...
Where none was recorded, the providers are listed and their cells say so.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.problem import MODES

UNMEASURED = "not yet measured"
MARKER = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- /bench:\2 -->)", re.S)


# --- what a recorded row means --------------------------------------------------------------------------


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
    return next((r for r in table["rows"] if r["provider"] == "eager" and r["seconds"]), None)


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
    names = ["provider", "computes", "time", "spread", "time, eager = 1"]
    if table["side"] == "linear":
        names += ["GEMMs", "GFLOP/s", "GEMMs alone / time"]
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
    eager, time = baseline(table), seconds(row)
    extra = row["peak_bytes"]
    beyond = None if extra is None else max(0, extra - table["gradient_bytes"])
    eager_time, eager_peak = (seconds(eager), eager["peak_bytes"]) if eager else (None, None)
    floor = floor_seconds(table, row["gemms"])
    gflops = row["gemms"] * table["gemm_flops"] / time / 1e9 if time and row["gemms"] else None
    bandwidth = table["traffic_bytes"] / time / 1e9 if time and table["traffic_bytes"] else None
    text = {
        "provider": title_of(row),
        "computes": "" if row["floor"] else row["computes"],
        "time": duration(time),
        "spread": "1 run" if row["one_run"] else "" if spread(row) is None else f"± {spread(row):.0%}",
        "time, eager = 1": ratio(time / eager_time if time and eager_time else None),
        "GEMMs": str(row["gemms"] or ""),
        "GFLOP/s": "" if gflops is None else f"{gflops:.0f}",
        "GEMMs alone / time": "" if row["floor"] else ratio(floor / time if floor and time else None),
        "GB/s": "" if bandwidth is None else f"{bandwidth:.3g}",
        "peak": size(extra),
        "beyond gradients": size(beyond),
        "peak, eager = 1": ratio(extra / eager_peak if extra is not None and eager_peak else None),
        "logps": exponent(row, "logps"),
        "d logits": exponent(row, "d_logits"),
        "d hidden": exponent(row, "d_hidden"),
        "d weight": exponent(row, "d_weight"),
    }
    if row["status"] != "ok":
        text["time"] = row["status"]
    return text


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


# --- on the terminal ------------------------------------------------------------------------------------


def rich_table(table: dict) -> Table:
    names = columns(table)
    drawn = Table(title=escape(heading(table)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        words = name in ("provider", "computes")
        drawn.add_column(name, justify="left" if words else "right", no_wrap=name == "provider")
    rows = [row for row in shown(table) if row["status"] != "not run"]
    best = next((r for r in rows if r["status"] == "ok" and not r["floor"]), None)
    for row in rows:
        failed, floor = row["status"] != "ok", row["floor"]
        style = "bold green" if row is best else "red" if failed else "dim" if floor else ""
        text = cells(table, row)
        drawn.add_row(*(escape(text[name]) for name in names), style=style)
    drawn.caption = escape("\n".join(remarks(table)))
    drawn.caption_justify = "left"
    return drawn


def machine_line(result: dict) -> str:
    m, git = result["machine"], result["git"]
    cpu = f"{m['cpu']['model']}, {m['cpu']['cores']} threads, {' '.join(m['cpu']['instruction_sets'])}"
    commit = f"commit {(git['commit'] or 'unknown')[:10]}{' with changes' if git['dirty'] else ''}"
    packages = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if k in ("torch", "triton", "trl"))
    return "; ".join([m["gpu"] or cpu, packages, commit, result["date"][:10]])


# --- Markdown -------------------------------------------------------------------------------------------


def markdown_table(table: dict) -> str:
    names = [n for n in columns(table) if n not in ("spread", "GEMMs")]
    rows = [row for row in shown(table) if _could_run(row)]
    body = [[_cell(row, cells(table, row), name) for name in names] for row in rows]
    return "\n".join(_line(r) for r in [names, ["---"] * len(names), *body])


def _could_run(row: dict) -> bool:
    """False where the provider is for another device or dtype: no measurement is missing there."""
    return row["status"] != "not run" or "not installed" in row["message"] or "time limit" in row["message"]


def _cell(row: dict, text: dict[str, str], name: str) -> str:
    missing = name == "time" and row["status"] == "not run"
    missing |= name == "peak" and row["status"] == "ok" and row["peak_bytes"] is None and not row["floor"]
    return UNMEASURED if missing else text[name]


def _line(values: list[str]) -> str:
    return "| " + " | ".join(v.replace("|", "\\|") for v in values) + " |"


def unmeasured_table(name: str) -> str:
    """The providers that would be measured, their cells saying that they were not."""
    from benchmarks.measure import all_providers

    device, side, mode, *_ = re.split("[/-]", name)
    listed = [p for p in all_providers(side, mode) if device in p.devices and not p.floor]
    titles = dict.fromkeys(p.group or p.name for p in listed)
    names = ["provider", "time", "peak", "logps"]
    rows = [[title] + [UNMEASURED] * (len(names) - 1) for title in titles]
    return "\n".join(_line(r) for r in [names, ["---"] * len(names), *rows])


def matching(name: str, results: list[dict]) -> list[tuple[dict, dict]]:
    """(result, table) pairs that a marker's name stands for."""
    device, kind, *rest = name.split("/")
    wanted = dict(zip(("case", "dtype"), rest, strict=False))
    return [
        (result, table)
        for result in results
        for table in result["tables"]
        if table["device"] == device
        and f"{table['side']}-{table['mode']}" == kind
        and all(table[key] == value for key, value in wanted.items())
    ]


def markdown(name: str, results: list[dict]) -> str:
    pairs = matching(name, results)
    if not pairs:
        return unmeasured_table(name) + "\n"
    blocks = [f"**{heading(t)}**\n\n{markdown_table(t)}\n\n{machine_line(r)}\n" for r, t in pairs]
    return "\n".join(blocks)


def fill_markers(text: str, results: list[dict]) -> str:
    """The text with every marker pair's contents replaced; doing it twice changes nothing."""
    return MARKER.sub(lambda m: f"{m[1]}\n{markdown(m[2], results)}\n{m[3]}", text)


def load(paths: list[Path]) -> list[dict]:
    results = [json.loads(path.read_text()) for path in paths]
    for path, result in zip(paths, results, strict=True):
        if result.get("schema") != 1:
            raise ValueError(f"{path}: got schema {result.get('schema')!r}, expected 1")
    return results


def main(
    results: Annotated[list[Path], typer.Argument(help="recorded results.json files", exists=True, dir_okay=False)],
    readme: Annotated[Path | None, typer.Option(help="fill the markers of this file", exists=True)] = None,
    plots: Annotated[Path | None, typer.Option(help="folder for the plots")] = None,
) -> None:
    """Print recorded results; with --readme, write them between its markers; with --plots, draw them."""
    recorded = load(results)
    console = Console()
    if readme:
        readme.write_text(fill_markers(readme.read_text(), recorded))
        console.print(f"{readme}: {', '.join(m[1] for m in MARKER.findall(readme.read_text())) or 'no markers'}")
    else:
        for result in recorded:
            console.print(escape(machine_line(result)))
            for table in result["tables"]:
                console.print(rich_table(table))
    if plots:
        from benchmarks.plots import draw

        for path in draw(recorded, plots):
            console.print(path)


if __name__ == "__main__":
    typer.run(main)
