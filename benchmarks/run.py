"""Correctness, time, memory and error of our ops and of other implementations of the same loss.

python benchmarks/run.py                      the real case, both sides, a few minutes on two cores
python benchmarks/run.py --suite linear       the head from hidden and weight, all CPU shapes
python benchmarks/run.py --suite full         the GPU shapes
python benchmarks/run.py --suite small        small calls, where the host's work shows, on one thread; and first calls
python benchmarks/run.py --suite prefix       a model's training step, the prompt of a list run once or for each candidate
python benchmarks/run.py --suite trainer      steps of LarPOTrainer and of TRL's DPOTrainer on equal data
python benchmarks/run.py --shape T2048-H896-V32000-m8 --dtype float32 --provider "ours*" --provider eager
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import report
from benchmarks.core import first_call, kinds, machine, suites
from benchmarks.core.measure import Settings, all_providers, auto_plan, measure
from benchmarks.core.problem import SIDES
from benchmarks.core.truth import COMPUTES
from benchmarks.providers.prefix import ModelStep
from benchmarks.providers.trainers import TrainerStep
from benchmarks.reporting import tables
from benchmarks.reporting.by_shape import by_shape, first_calls

PATIENT = Settings(budget_s=90, guard_s=20, memory_guard_s=120)
SETTINGS = {  # of suites that need others
    "quick": Settings(),
    "small": Settings(rounds=200, budget_s=15, sample_s=0.002, memory_from=2**22),
    "prefix": Settings(rounds=3, budget_s=8, guard_s=20),  # nine tables of whole models
    "trainer": Settings(rounds=5, budget_s=300, guard_s=90, memory_guard_s=90),
}
QUICK_LIMIT_S = 210  # what has begun by then is finished: five minutes in all on two slow cores
NO_TRL = "trl is not installed, so LarPOTrainer has nothing to be compared with: pip install --no-deps trl==1.16.0"
HERE = Path(__file__).resolve().parent
console = Console(width=None if sys.stdout.isatty() else 190)


def main(
    suite: Annotated[str, typer.Option(help=f"one of {', '.join(suites.SUITES)}")] = "quick",
    shape: Annotated[list[str] | None, typer.Option(help="cases in place of the suite's, by name")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float16, float32")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="names or patterns, as in 'ours*'")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for results.json and plots")] = None,
    record: Annotated[bool, typer.Option(help="write to benchmarks/results/MACHINE, which git keeps")] = False,
    rounds: Annotated[int | None, typer.Option(help="timed runs of each provider at most")] = None,
    budget: Annotated[float | None, typer.Option(help="seconds for the rounds of one table")] = None,
    guard: Annotated[float | None, typer.Option(help="seconds above which a provider is timed once")] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="seconds after which other providers are left out; 210 for quick"),
    ] = None,
    memory: Annotated[bool, typer.Option(help="measure peak memory")] = True,
    list_: Annotated[bool, typer.Option("--list", help="list cases and providers, run nothing")] = False,
) -> None:
    """Check every provider against float64, then time it, then measure its memory."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    todo = suites.jobs(suite, device, shape, dtype)
    if list_:
        return _list(todo, device, provider)
    if suite == "small":
        torch.set_num_threads(1)
    header = machine.header(device)
    folder = out or HERE / ("results/" + machine.slug(header["machine"]) if record else "out")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{suite if not shape else 'shapes'}.json"
    result = {**header, "command": " ".join(sys.argv[1:]), "tables": []}
    console.print(escape(tables.machine_line(result)))
    if device == "cpu" and not machine.has_native_bfloat16(device):
        console.print("This CPU has no bfloat16 instructions: GEMMs default to float32 here.")
    settings = _settings(suite, device, rounds=rounds, budget_s=budget, guard_s=guard, memory=memory)
    limit = limit or (QUICK_LIMIT_S if suite == "quick" and not shape else None)
    for table in _tables(todo, device, provider, settings, limit, small=suite == "small"):
        result["tables"].append(table)
        file.write_text(json.dumps(result, indent=1) + "\n")  # after every table: a long run may be cut short
        console.print(report.rich_table(table))
    if suite == "small" and not shape:
        result["first_calls"] = first_call.measured(device)
        file.write_text(json.dumps(result, indent=1) + "\n")
    _conclude(result)
    from benchmarks.reporting.plots import draw  # matplotlib is slow to import and only needed now

    for path in [file, *draw([result], folder)]:
        console.print(f"wrote {path}")
    rows = [row for table in result["tables"] for row in table["rows"] if row["provider"].startswith("ours")]
    if any(row["status"] in ("WRONG", "error") for row in rows):
        console.print("[bold red]ours failed its check above")
        raise typer.Exit(1)


def _settings(suite: str, device: str, **asked) -> Settings:
    """Those of the suite, but for what was asked for."""
    settings = replace(SETTINGS.get(suite, PATIENT), **{name: value for name, value in asked.items() if value is not None})
    if suite == "small" and device == "cuda":
        return replace(settings, sample_s=0.02)  # many calls are queued before the device is waited for
    return settings


def _conclude(result: dict) -> None:
    """Tables of several tables, and what the columns mean."""
    if "first_calls" in result:
        console.print(tables.aligned(first_calls(result["first_calls"])))
    if steps := [table for table in result["tables"] if table["side"] == ModelStep.side]:
        console.print(tables.aligned(by_shape(steps)))
    missing = {row["message"] for table in result["tables"] for row in table["rows"] if table["side"] == TrainerStep.side}
    if "trl is not installed" in missing:
        console.print(NO_TRL)
    _legend()


def _tables(todo, device, globs, settings, limit, *, small):
    """Measured tables, one after another; a case is built once and its truth shared by its modes.

    limit: seconds for all tables; each may use what those before it left of equal shares.
    """
    start, count, done = time.monotonic(), sum(len(job.modes) for job in todo), 0
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        tables = bar.add_task("tables", total=count)
        for (name, dtype), same in groupby(todo, key=lambda job: (job.case, job.dtype)):
            bar.update(tables, description=f"building {name}, {dtype}")
            same = list(same)
            case = kinds.build(name, same[0].side, getattr(torch, dtype), device)
            for job in same:
                truth = None
                for mode in job.modes:
                    problem, say = kinds.problem(case, job.side, mode), _teller(bar, tables, job, mode)
                    say("float64")
                    truth = truth or kinds.truth(problem)
                    chosen = all_providers(job.side, problem.mode, globs, small=small)
                    done += 1
                    share = None if limit is None else start + limit * done / count
                    table = measure(problem, chosen, truth, replace(settings, deadline=share), say)
                    bar.advance(tables)
                    yield {**table, "plan": auto_plan(problem), "small": small}
            del case
            gc.collect()


def _teller(bar: Progress, task, job: suites.Job, mode: str):
    def say(step: str) -> None:
        bar.update(task, description=f"{job.side} {mode} {job.case} {job.dtype}: {step}")

    return say


def _list(todo, device, globs) -> None:
    for job in todo:
        console.print(f"{job.side:7} {job.case:36} {job.dtype:9} {', '.join(job.modes)}")
    drawn = Table("provider", "side", "modes", "computes", "here")
    listed = {}
    for side, modes in SIDES.items():
        for mode in modes:
            for p in all_providers(side, mode, globs):
                listed.setdefault((p.name, side), (p, []))[1].append(mode)
    for (name, side), (p, modes) in listed.items():
        drawn.add_row(name, side, ", ".join(modes), p.computes, p.missing(device=device) or "yes")
    console.print(drawn)


def _legend() -> None:
    for name, meaning in COMPUTES.items():
        console.print(f"{name}: {meaning}", style="dim")
    console.print(
        "Errors are against float64: logps per candidate in nats, gradients relative; both rms. peak: memory "
        "above the inputs, gradients included. spread: half the interquartile range. Dim rows are floors.",
        style="dim",
    )


if __name__ == "__main__":
    typer.run(main)
