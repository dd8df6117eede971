"""What every recipe does with its result: the command line, a table, a JSON file and a plot."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

Rows = list[dict[str, Any]]


def main(
    argv: Sequence[str] | None,
    *,
    name: str,
    doc: str,
    run: Callable[..., dict[str, Any]],
    plot: Callable[[Any, dict[str, Any]], None],
    threads: int = 1,
) -> dict[str, Any]:
    """The command `python -m larpo.recipes.NAME`: runs, prints the table, and with --out writes NAME.json and NAME.png.

    Args:
        argv: arguments; None for those of the process.
        run: `run(seeds)`; its result has "table", a list of rows, and "notes", sentences printed below it.
        plot: draws the result on a matplotlib figure that it is given.
        threads: by default; tiny models run fastest on one.
    """
    parser = argparse.ArgumentParser(prog=f"python -m larpo.recipes.{name}", description=doc.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument("--out", type=Path, help=f"folder for {name}.json and {name}.png")
    parser.add_argument("--threads", type=int, default=threads, help=f"CPU threads (default: {threads})")
    arguments = parser.parse_args(argv)
    import torch

    torch.set_num_threads(arguments.threads)
    start, cpu = time.perf_counter(), time.process_time()
    try:
        result = {"recipe": name, "seeds": arguments.seeds, **run(arguments.seeds)}
    except ImportError as error:
        parser.exit(2, f"{error}\n")
    result |= seconds(start, cpu)
    print(f"\n{markdown(result['table'])}\n")
    for note in result["notes"]:
        print(note)
    print(f"{result['seconds']} s, {result['cpu_seconds']} s of them on a CPU, with {arguments.threads} thread(s)")
    if arguments.out is not None:
        write(result, plot, arguments.out)
    return result


def seconds(start: float, cpu: float) -> dict[str, float]:
    """Passed since then; the CPU's own seconds do not grow where other programs share the machine."""
    return {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}


def write(result: dict[str, Any], plot: Callable[[Any, dict[str, Any]], None], folder: Path) -> None:
    """folder/NAME.json and folder/NAME.png."""
    figures = need("matplotlib.figure", "bench")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['recipe']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figure = figures.Figure(figsize=(7, 3.6), layout="constrained")
    plot(figure, result)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(f"wrote {path} and {path.with_suffix('.png')}")


def need(module: str, extra: str) -> ModuleType:
    """The module, or an ImportError that names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"this recipe needs {package}: pip install 'larpo_kernels[{extra}]'") from error


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
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("|" + "|".join(line) + "|" if line[0] == "---" else f"| {' | '.join(map(str, line))} |" for line in lines)


def band(axes, x: Sequence[float], curves: Sequence[Sequence[float]], label: str, color: str | None = None) -> None:
    """The mean of the seeds' curves, and all of them faintly behind it; None: the axes' next colour."""
    mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
    (line,) = axes.plot(x, mean, label=label, color=color)
    for curve in curves:
        axes.plot(x, curve, color=line.get_color(), alpha=0.25, linewidth=0.8)


def bars(axes, values: Mapping[str, Sequence[float]]) -> None:
    """A bar for the mean of each kind's seeds, and a dot for every seed."""
    for place, seeds in enumerate(values.values()):
        axes.bar(place, statistics.fmean(seeds), color="tab:blue", alpha=0.6)
        axes.plot([place] * len(seeds), seeds, ".", color="black")
    axes.set_xticks(range(len(values)), list(values), fontsize=8)
