"""Where a run stands, read from its folder by another process: while the run is at work, or after it was stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runs.files import read_json
from ..runs.lock import is_locked
from ..training.divergence import FILE as DIVERGED
from .lines import line
from .run_folder import RunFolder, stages_of


@dataclass(frozen=True)
class Status:
    """Where a run stands."""

    folder: RunFolder
    at_work: bool | None  # whether a process has the folder's lock; None: it can't be told
    iterations: int = 0
    done: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)  # iteration, stage and its counts
    now: tuple[int, str] | None = None  # the stage that is next, or at work; None: all are done
    kept: str = ""  # what is there of it
    diverged: str | None = None
    quiet: float | None = None  # seconds since the run has written a file

    def __str__(self) -> str:
        return "\n".join([self._head(), *(line(self.folder.iteration(i).name, stage, c) for i, stage, c in self.done)])

    def _head(self) -> str:
        minutes = sum(counts["seconds"] for *_, counts in self.done) / 60
        parts = [self._where(), f"{minutes:.1f} minutes of finished stages", self._who()]
        return f"{self.folder.path}: {'; '.join(part for part in parts if part)}"

    def _where(self) -> str:
        if not self.iterations:
            return "not begun"
        if self.now is None:
            return f"finished, {self.iterations} of {self.iterations} iterations; see summary.md"
        iteration, stage = self.now
        where = "at the start" if iteration == 0 else f"in iteration {iteration} of {self.iterations}"
        return f"{where}, {stage}{f' ({self.kept})' if self.kept else ''}"

    def _who(self) -> str:
        wrote = "" if self.quiet is None else f", which last wrote a file {_ago(self.quiet)} ago"
        if self.diverged is not None:
            return f"training has diverged: {self.diverged}"
        if self.at_work is None:
            return "whether a process is at work can't be told on this file system"
        if self.at_work:
            return f"a process is at work{wrote}"
        return "" if self.now is None else "no process is at work: start the same command again to go on"


def status(path: str | Path) -> Status:
    """Where the run in this folder stands. Raises ValueError where it holds none, and for a file that was not written to its
    end."""
    folder = RunFolder(path)
    at_work = is_locked(folder.path)
    settings = folder.settings()
    if settings is None:
        if at_work:
            return Status(folder, at_work)
        raise ValueError(f"{str(folder.path)!r} holds no run of `larpo align`: it has no config.yaml")
    done = [(i, stage, read_json(file)) for i, stage, file in _stages(folder, settings) if file.exists()]
    now = next(((i, stage) for i, stage, file in _stages(folder, settings) if not file.exists()), None)
    iteration = settings["iterations"] if now is None else now[0]
    why = folder.iteration(iteration) / DIVERGED
    return Status(
        folder,
        at_work,
        settings["iterations"],
        done,
        now,
        kept="" if now is None else _kept(folder, *now),
        diverged=read_json(why)["why"] if why.exists() else None,
        quiet=_seconds_since_a_file(folder.iteration(iteration)),
    )


def _stages(folder: RunFolder, settings: dict[str, Any]) -> Iterator[tuple[int, str, Path]]:
    """Every stage of the run, and the file that says that it is done."""
    for iteration in range(settings["iterations"] + 1):
        for stage in stages_of(iteration, refill=settings.get("refill", False)):
            yield iteration, stage, folder.iteration(iteration) / f"{stage}.json"


def _kept(folder: RunFolder, iteration: int, stage: str) -> str:
    if stage == "train":
        steps = [int(path.name.rpartition("-")[2]) for path in folder.checkpoints(iteration).glob("checkpoint-*")]
        return f"a checkpoint of step {max(steps)} is kept" if steps else ""
    chunks = folder.chunks(iteration, stage)
    answers = sum(path.read_bytes().count(b"\n") for path in chunks.rglob("answers.jsonl"))
    kept = {"parts": len(list(chunks.rglob("*.parquet"))), "answers of a server": answers}
    shown = [f"{number} {name}" for name, number in kept.items() if number]
    return f"{' and '.join(shown)} of it are kept" if shown else ""


def _seconds_since_a_file(folder: Path) -> float | None:
    newest = 0.0
    with contextlib.suppress(OSError):  # a run at work removes files as well
        for path in folder.rglob("*"):
            newest = max(newest, path.stat().st_mtime) if path.is_file() else newest
    return max(0.0, time.time() - newest) if newest else None


def _ago(seconds: float) -> str:
    """
    >>> _ago(90), _ago(7300)
    ('90 s', '122 min')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
