"""What every recipe is: arms of one method, run from several seeds, kept in a file, and shown as a table and a plot."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from ...runs.files import read_json, write_text
from ..optional import need
from . import report
from .report import Row

Columns = dict[str, float | str | None]  # of the table: a number to take the mean of, or a text for each seed
Arm = Callable[[Any, int], Row]  # (what the arms of a seed start from, the seed) -> the outcome, plain numbers and lists


@dataclass
class Recipe:
    """One method. The fields of a subclass are its settings, the methods below what it has of its own.

    heading: over the names of arms in the table. digits: of a column's numbers, where not three. panels: what of an outcome
    is plotted, and under which title. threads: of the CPU; tiny models run fastest on one.
    """

    name: ClassVar[str]
    heading: ClassVar[str] = "arm"
    digits: ClassVar[Mapping[str, int]] = {}
    panels: ClassVar[Mapping[str, str]] = {}
    x_label: ClassVar[str] = ""
    threads: ClassVar[int] = 1

    def start(self, seed: int) -> Any:
        """What all arms of a seed start from. An arm must leave it as it is."""

    def arms(self) -> Mapping[str, Arm]:
        raise NotImplementedError

    def columns(self, row: Row) -> Columns:
        """What the table shows of an outcome."""
        raise NotImplementedError

    def notes(self, rows: Sequence[Row]) -> list[str]:
        """Sentences below the table."""
        return []

    def plot(self, figure, rows: Sequence[Row]) -> None:
        """Draws the `panels` on a matplotlib figure: curves over `x_label`, or a bar for each arm's numbers."""
        axes = figure.subplots(1, len(self.panels), squeeze=False)[0]
        for one, (key, title) in zip(axes, self.panels.items(), strict=True):
            if any(isinstance(row.get(key), list) for row in rows):
                report.curves(one, rows, key)
                one.set(xlabel=self.x_label)
            else:
                report.bars(one, rows, key)
            one.set_title(title, fontsize=9)
        handles, arms = axes[0].get_legend_handles_labels()
        if arms:
            figure.legend(handles, arms, loc="outside lower center", ncols=len(arms), fontsize=7)

    def table(self, rows: Sequence[Row]) -> list[dict[str, str]]:
        """A line for each arm, the means of its numbers over seeds."""
        arms = {arm: [self.columns(row) for row in found] for arm, found in report.by_arm(rows).items()}
        names = dict.fromkeys(name for found in arms.values() for one in found for name in one)
        return [
            {self.heading: arm, **{name: self._cell(name, [one.get(name) for one in found]) for name in names}}
            for arm, found in arms.items()
        ]

    def _cell(self, name: str, values: Sequence[float | str | None]) -> str:
        texts = [value for value in values if isinstance(value, str)]
        return ", ".join(texts) if texts else report.over_seeds(values, self.digits.get(name, 3))

    def run(self, seeds: Sequence[int] = (0, 1, 2), out: Path | None = None) -> dict[str, Any]:
        """Every arm from every seed: their rows, the table of them, notes and settings.

        out: a folder. Each outcome is kept in its NAME.json at once; those that are there already are not run again.
        """
        kept = self.kept(out)
        rows, passed = kept["rows"], {name: kept[name] for name in CLOCKS}
        since = {name: clock() for name, clock in CLOCKS.items()}
        for row in self._missing(seeds, rows):
            rows.append(row)
            kept |= {name: round(passed[name] + clock() - since[name], 1) for name, clock in CLOCKS.items()}
            if out is not None:
                write_text(out / f"{self.name}.json", dumps(kept))
        shown = [row for row in rows if row["seed"] in seeds]
        return kept | {"rows": shown, "table": self.table(shown), "notes": self.notes(shown)}

    def _missing(self, seeds: Sequence[int], rows: Sequence[Row]) -> Iterator[Row]:
        """Runs every arm from every seed that `rows` has no outcome of, and yields each outcome as soon as it is there."""
        arms, there = self.arms(), {(row["arm"], row["seed"]) for row in rows}
        left = {seed: [arm for arm in arms if (arm, seed) not in there] for seed in seeds}
        with tqdm(total=sum(map(len, left.values())), desc=self.name, unit="run") as bar:
            for seed, names in left.items():
                begin = self.start(seed) if names else None
                for name in names:
                    yield {"arm": name, "seed": seed, **arms[name](begin, seed)}
                    bar.update()

    def kept(self, out: Path | None) -> dict[str, Any]:
        """What an earlier run with the same settings left in the folder `out`, or a result without rows."""
        settings = {one.name: getattr(self, one.name) for one in fields(self) if one.metadata.get("setting", True)}
        new = {"recipe": self.name, "settings": json.loads(json.dumps(settings)), **dict.fromkeys(CLOCKS, 0.0), "rows": []}
        if out is None or not (path := out / f"{self.name}.json").exists():
            return new
        found = read_json(path)
        if found.get("settings") == new["settings"] and "rows" in found:
            return found
        print(f"{path} holds a run with other settings: it will be replaced")
        return new


# The CPU's own seconds do not grow where other programs share the machine.
CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}


def dumps(result: Mapping[str, Any]) -> str:
    """JSON with a line for every row."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    return json.dumps({**result, "rows": []}, indent=1).replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n"


def commands(kind: type[Recipe]) -> tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Any]]]:
    """`run(seeds, **settings)` and `main(argv)` of a recipe's module; main is the command `python -m larpo.recipes.NAME`."""

    def run(seeds: Sequence[int] = (0, 1, 2), **settings: Any) -> dict[str, Any]:
        return kind(**settings).run(seeds)

    def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
        return command(kind(), argv)

    return run, main


def command(recipe: Recipe, argv: Sequence[str] | None) -> dict[str, Any]:
    """Runs the recipe and prints its table; with --out keeps the outcomes in NAME.json and draws NAME.png."""
    name = recipe.name
    about = sys.modules[type(recipe).__module__].__doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m larpo.recipes.{name}", description=about)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each arm (default: 0 1 2)")
    parser.add_argument("--out", type=Path, help=f"folder for {name}.json and {name}.png; what is there is not run again")
    parser.add_argument("--threads", type=int, default=recipe.threads, help=f"CPU threads (default: {recipe.threads})")
    asked = parser.parse_args(argv)
    import torch

    torch.set_num_threads(asked.threads)
    try:
        result = recipe.run(asked.seeds, asked.out)
    except ImportError as error:
        parser.exit(2, f"{error}\n")
    print(f"\n{report.markdown(result['table'])}\n", *result["notes"], sep="\n")
    print(f"{result['seconds']} s, {result['cpu_seconds']} s of them on a CPU, with {asked.threads} thread(s)")
    if asked.out is not None:
        figure = need("matplotlib.figure", "bench").Figure(figsize=(7, 3.6), layout="constrained")
        recipe.plot(figure, result["rows"])
        figure.savefig(asked.out / f"{name}.png", dpi=120)
        print(f"wrote {name}.json and {name}.png to {asked.out}")
    return result
