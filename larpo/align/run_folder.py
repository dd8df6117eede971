"""The folder of a run, and how things get into it: whole, by one rename.

    config.yaml, prompts.json              what the run is
    start/                                 the initial policy on the held-out prompts: evaluation.parquet, evaluate.json
    iteration-01/                          a file for each stage's data, and a .json that says it is done, with counts
        sampled.parquet      sample.json       k completions per prompt
        candidates.parquet   score.json        the same with scores
        lists.parquet        lists.json        what is trained on
        model/               train.json        the policy after this iteration, a folder of transformers
        evaluation.parquet   evaluate.json     its completions of the held-out prompts, and what they say
    metrics.json, summary.md, plots/       all of it for a reader

A stage is done when its .json is there, which is written last. Before that, a data file that is there is whole: it appeared
by one rename. A process killed at any moment leaves at worst hidden `.name.unfinished` files, which the next one replaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..row_check import present

Rows = list[dict[str, Any]]


class RunFolder:
    """Paths inside a run's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()

    def iteration(self, iteration: int) -> Path:
        """Of an iteration; 0 is the start."""
        return self.path / ("start" if iteration == 0 else f"iteration-{iteration:02d}")

    def model(self, iteration: int) -> Path:
        """The policy after an iteration, counted from 1."""
        return self.iteration(iteration) / "model"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a process works in the folder; a killed process gives it back. Raises ValueError if another has it."""
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(f"output_dir={str(self.path)!r}: another process is at work in this folder") from None
        try:
            yield
        finally:
            lock.release()


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """`path` (a file or a folder) appears by one rename after `write(unfinished_path)`; what was there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    remove(unfinished)
    write(unfinished)
    if unfinished.is_dir():
        remove(path)
    os.replace(unfinished, path)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A parquet file; a row is a dict of plain values, lists and messages."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(list(rows))
    write_whole(path, lambda unfinished: parquet.write_table(table, unfinished))


def read_rows(path: Path) -> Rows:
    from pyarrow import parquet

    # Not read_table on a path: it takes a folder's name for a partition.
    return parquet.ParquetFile(path).read().to_pylist()


def plain(text: Any) -> str | list[dict[str, Any]]:
    """A text, or messages without the keys that Arrow filled in."""
    return text if isinstance(text, str) else [present(message) for message in text]


def rows_once(path: Path, build: Callable[[], Rows]) -> Rows:
    """The rows of a parquet file, which is written from `build()` if it is not there."""
    if not path.exists():
        write_rows(path, build())
    return read_rows(path)


def in_chunks(folder: Path, items: Sequence, size: int, work: Callable[[int, Sequence], Rows]) -> Rows:
    """The rows of `work(chunk, items of the chunk)` for all chunks, each kept in a file: a chunk that is there is not redone.

    The caller removes `folder` once what it makes of the rows is written.
    """
    rows: Rows = []
    for chunk, start in enumerate(range(0, len(items), size)):
        part = items[start : start + size]
        rows += rows_once(folder / f"{chunk:05d}.parquet", lambda chunk=chunk, part=part: work(chunk, part))
    return rows
