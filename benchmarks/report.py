"""Tables from recorded results: on the terminal, and as Markdown between the README's markers.

    python benchmarks/report.py RESULTS.json ... --readme README.md [--plots FOLDER]

A marker pair `<!-- bench:NAME -->` ... `<!-- /bench:NAME -->` takes every recorded table NAME stands for:
    NAME = DEVICE/SIDE-MODE[/CASE[/DTYPE]]    cpu/logits-train, cuda/linear-frozen/T8192-H4096-V128256-m8, ...
With `*` for CASE all of them go into one table, a case a row. cpu/small stands for the suite of small calls, cuda/head for
each schedule against its GEMMs (of benchmarks/gpu_check.py). Where none was recorded, the providers are listed and their cells
say so. `<!-- short:NAME -->` takes fewer columns and rows: our fastest exact one, and the others but
losses of pairs.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reporting.by_shape import by_shape, first_calls, schedules
from benchmarks.reporting.tables import as_markdown, cells, columns, heading, machine_line, remarks, shown

UNMEASURED = "not yet measured"
MARKER = re.compile(r"(<!-- (bench|short):(\S+) -->\n).*?(<!-- /\2:\3 -->)", re.S)
SHORT = ("provider", "computes", "time", "time, eager = 1", "beyond gradients", "logps", "d logits", "d hidden")


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


# --- Markdown -------------------------------------------------------------------------------------------


def markdown_table(table: dict) -> str:
    names = [n for n in columns(table) if n not in ("spread", "GEMMs")]
    rows = [row for row in shown(table) if _could_run(row)]
    body = [[_cell(row, cells(table, row), name) for name in names] for row in rows]
    return as_markdown([names, *body])


def short_table(table: dict) -> str:
    names = [name for name in SHORT if name in columns(table)]
    rows = [row for row in shown(table) if row["status"] == "ok" and row.get("rows") is None and row["computes"] != "pair loss"]
    ours = next((row for row in rows if row["provider"].startswith("ours")), None)  # None: it failed, the others did not
    rows = [row for row in rows if row is ours or not (row["floor"] or row["provider"].startswith("ours"))]
    return as_markdown([names, *([_cell(row, cells(table, row), name) for name in names] for row in rows)])


def head_tables(results: list[dict]) -> str:
    blocks = []
    for result in results:
        rows = [row for step in result.get("steps", ()) if step["step"] == "head" for row in step["rows"]]
        if rows:
            blocks.append(f"{as_markdown(schedules(rows))}\n\n{machine_line(result)}\n")
    return "\n".join(blocks)


def _could_run(row: dict) -> bool:
    """False where the provider is for another device or dtype: no measurement is missing there."""
    return row["status"] != "not run" or "not installed" in row["message"] or "time limit" in row["message"]


def _cell(row: dict, text: dict[str, str], name: str) -> str:
    missing = name == "time" and row["status"] == "not run"
    missing |= name == "peak" and row["status"] == "ok" and row["peak_bytes"] is None and not row["floor"]
    once = " (1 run)" if name == "time" and row["one_run"] and row["status"] == "ok" else ""
    return UNMEASURED if missing else text[name] + once


def unmeasured_table(name: str) -> str:
    """The providers that would be measured, their cells saying that they were not."""
    from benchmarks.core.measure import all_providers

    device, kind, *_ = name.split("/")
    if kind == "small":
        return UNMEASURED
    side, mode = kind.split("-")
    listed = [p for p in all_providers(side, mode) if device in p.devices and not p.floor]
    titles = dict.fromkeys(p.group or p.name for p in listed)
    names = ["provider", "time", "peak", "logps"]
    rows = [[title] + [UNMEASURED] * (len(names) - 1) for title in titles]
    return as_markdown([names, *rows])


def matching(name: str, results: list[dict]) -> list[tuple[dict, dict]]:
    """(result, table) pairs that a marker's name stands for."""
    device, kind, *rest = name.split("/")
    wanted = dict(zip(("case", "dtype"), rest, strict=False))
    return [
        (result, table)
        for result in results
        for table in result.get("tables", ())
        if table["device"] == device
        and kind == ("small" if table.get("small") else f"{table['side']}-{table['mode']}")
        and all(value in ("*", table[key]) for key, value in wanted.items())
    ]


def markdown(name: str, results: list[dict], short: bool = False) -> str:
    if name == "cuda/head":
        return head_tables(results) or UNMEASURED + "\n"
    pairs = matching(name, results)
    if not pairs:
        return unmeasured_table(name) + "\n"
    if "*" in name or all(t["side"] == "prefix" or t.get("small") for _, t in pairs):
        grouped = ((result, [t for r, t in pairs if r is result]) for result in results)
        return "\n".join(_one_table(result, found) for result, found in grouped if found)
    drawn = short_table if short else markdown_table
    blocks = [f"**{heading(t)}**\n\n{drawn(t)}\n\n{machine_line(r)}\n" for r, t in pairs]
    return "\n".join(blocks)


def _one_table(result: dict, found: list[dict]) -> str:
    """Side by side, a shape a row."""
    first, drawn = found[0], as_markdown(by_shape(found))
    about = first["note"] if first["side"] == "prefix" else f"{first['side']}, {first['mode']}"
    if first.get("small"):
        about = "forward and backward to all inputs"
        drawn += "\n\n" + as_markdown(first_calls(result.get("first_calls", [])))
    return f"**{first['dtype']}; {about}**\n\n{drawn}\n\n{machine_line(result)}\n"


def fill_markers(text: str, results: list[dict]) -> str:
    """The text with every marker pair's contents replaced; doing it twice changes nothing."""
    return MARKER.sub(lambda m: f"{m[1]}\n{markdown(m[3], results, m[2] == 'short')}\n{m[4]}", text)


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
        console.print(f"{readme}: {', '.join(m[2] for m in MARKER.findall(readme.read_text())) or 'no markers'}")
    else:
        for result in recorded:
            console.print(escape(machine_line(result)))
            for table in result.get("tables", ()):
                console.print(rich_table(table))
    if plots:
        from benchmarks.reporting.plots import draw

        for path in draw(recorded, plots):
            console.print(path)


if __name__ == "__main__":
    typer.run(main)
