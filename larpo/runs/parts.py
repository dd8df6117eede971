"""Results of many rows that are kept in parts as they come: what is killed goes on behind its last part, and processes share
the work.

    FOLDER/identity.json        what these are results of, and how many rows a part has
    FOLDER/NAME/00000.parquet   those of the first rows in the order in which they are computed

A part appears whole. Which rows it has depends on no number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import read_json, read_rows, write_json, write_rows
from .identity import changed
from .intact import Damaged
from .lock import locked

if TYPE_CHECKING:
    from accelerate import PartialState

logger = logging.getLogger(__name__)

IDENTITY = "identity.json"


def processes() -> PartialState:
    """What `accelerate launch` or `torchrun` started beside this process, and the device that is its own."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())  # which otherwise sees one process on a CPU


@dataclass(frozen=True)
class Parts:
    """The parts in a folder of one piece of work; `parts_of` opens it."""

    folder: Path
    size: int
    state: PartialState

    def results(
        self,
        name: str,
        order: Sequence[int],
        work: Callable[[list[int]], Mapping[int, Any]],
        *,
        unit: str = "row",
        progress: bool = True,
    ) -> dict[int, Any]:
        """{row: its result} of all rows in `order`; work(some of them) gives theirs. Every process gets all results.

        Every process works, if any does, some for nothing: the first forward of a model is one at which they all meet.
        """
        from tqdm.auto import tqdm

        rows = [list(order[a : a + self.size]) for a in range(0, len(order), self.size)]
        path = {i: self.folder / name / f"{i:05d}.parquet" for i in range(len(rows))}
        missing = [i for i in path if not path[i].exists()]
        self.state.wait_for_everyone()  # or some would not see as missing what others write by now
        done = sum(len(rows[i]) for i in path) - sum(len(rows[i]) for i in missing)
        main = self.state.is_main_process
        if done and main:
            logger.info("%s: %d of %d %ss were there before, in %s", name, done, len(order), unit, self.folder)
        with tqdm(total=len(order), initial=done, desc=name, unit=unit, disable=not (progress and main)) as bar:
            mine = missing[self.state.process_index :: self.state.num_processes]
            if missing and not mine:
                work(rows[missing[0]])
            for i in mine:
                found = work(rows[i])
                write_rows(path[i], [{"row": row, "result": found[row]} for row in rows[i]])
                bar.update(min(len(rows[i]) * self.state.num_processes, len(order) - bar.n))  # the others are as far
        self.state.wait_for_everyone()
        return {row: result for i in path for row, result in self._read(path[i], rows[i])}

    def _read(self, path: Path, rows: Sequence[int]) -> Iterator[tuple[int, Any]]:
        try:
            found = read_rows(path)
        except Damaged as error:
            raise Damaged(path, f"{error.why}. Remove it, and what it held is computed again") from None
        if [one.get("row") for one in found] != list(rows):
            raise Damaged(path, "it holds other rows than it was written for. Remove it, and they are computed again")
        return ((one["row"], one["result"]) for one in found)


@contextmanager
def parts_of(folder: Path, what: Mapping[str, Any], size: int, state: PartialState) -> Iterator[Parts]:
    """The parts in a folder that is this work's own from now on, if it is empty: `what` says of what they are results.

    size: rows of a part, where none is there yet. state: of the processes that work together, which all see the folder.

    Raises ValueError where it holds parts of other work, naming what differs, and where another process is at work in it.
    """
    with locked(folder, rank=state.process_index):
        file = folder / IDENTITY
        if state.is_main_process and not file.is_file():
            if any(folder.glob("*/*.parquet")):
                raise ValueError(f"{str(folder)!r} holds results, but no {IDENTITY} that says of what: remove the folder")
            write_json(file, {"rows of a part": size, **what})
        state.wait_for_everyone()
        try:
            before = read_json(file)
        except Damaged as error:
            raise ValueError(f"{error}. It says what the results beside it are of: remove the folder") from error
        if different := changed(before, what):
            raise ValueError(
                f"{str(folder)!r} holds results of another run: {'; '.join(different)}. Remove the folder to begin again"
            )
        yield Parts(folder, before["rows of a part"], state)
