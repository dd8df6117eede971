"""Results of many rows, kept in parts as they come: a run that was killed continues after its last part, and processes share
the work.

    FOLDER/identity.json        what these are results of, and how many rows a part has
    FOLDER/NAME/00000.parquet   those of the first rows in the order in which they are computed

A part appears whole. Which rows it has does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import in_chunks, read_json, write_json
from .identity import changed
from .intact import Damaged
from .lock import locked
from .ranks import Ranks

IDENTITY = "identity.json"


@dataclass(frozen=True)
class Parts:
    """The parts in a folder of one piece of work; `parts_of` opens it."""

    folder: Path
    size: int
    ranks: Ranks

    def results(
        self,
        name: str,
        order: Sequence[int],
        work: Callable[[list[int]], Mapping[int, Any]],
        *,
        unit: str = "row",
        progress: bool = True,
    ) -> dict[int, Any]:
        """{row: its result} of all rows in `order`; work(some of them) gives theirs. Every process gets all results."""

        def part(_: int, rows: Sequence[int]) -> list[dict[str, Any]]:
            found = work(list(rows))
            return [{"row": row, "result": found[row]} for row in rows]

        folder, shown = self.folder / name, progress and self.ranks.is_first
        try:
            found = in_chunks(folder, order, self.size, part, self.ranks, description=name, unit=unit, bar=shown)
        except Damaged as error:
            raise Damaged(error.path, f"{error.why}. Remove it, and what it held is computed again") from None
        for i, (one, row) in enumerate(zip(found, order, strict=False)):
            if one.get("row") != row:
                path = folder / f"{i // self.size:05d}.parquet"
                raise Damaged(path, "it holds other rows than it was written for. Remove it, and they are computed again")
        return {one["row"]: one["result"] for one in found}


@contextmanager
def parts_of(folder: Path, what: Mapping[str, Any], size: int, ranks: Ranks) -> Iterator[Parts]:
    """The parts in a folder. An empty folder is claimed for this work, which `what` identifies.

    size: rows of a part, where none is there yet. ranks: the processes that work together, which all see the folder.

    Raises ValueError where it holds parts of other work, naming what differs, and where another process is at work in it.
    """

    def rows_of_a_part() -> int:
        file = folder / IDENTITY
        if not file.is_file():
            if any(folder.glob("*/*.parquet")):
                raise ValueError(f"{str(folder)!r} holds results, but no {IDENTITY} that says of what: remove the folder")
            write_json(file, {"rows of a part": size, **what})
        try:
            before = read_json(file)
        except Damaged as error:
            raise ValueError(f"{error}. It says what the results beside it are of: remove the folder") from error
        if different := changed(before, what):
            raise ValueError(
                f"{str(folder)!r} holds results of another run: {'; '.join(different)}. Remove the folder to begin again"
            )
        return before["rows of a part"]

    with ranks.first_within(locked(folder)):
        yield Parts(folder, ranks.first(rows_of_a_part), ranks)
