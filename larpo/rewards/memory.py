"""Answers of judges, kept on disk as they arrive, so that a run that goes on asks no question twice.

    FOLDER/JUDGE/00000.jsonl     a line for each question that the process of this rank has asked, with its values

JUDGE is its name with a digest of its identity (identity.py), which itself is not written down: a judge may hold a key.

A line is appended at once (see larpo/runs/journal.py).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..runs.journal import Journal
from .identity import digest

Values = list[float | None]


class Memory:
    """The folder in which judges' values are kept, a folder inside for each judge."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[str, Remembered] = {}

    def of(self, name: str, identity: dict[str, Any]) -> Remembered:
        """The answers of the judge with this identity."""
        key = digest(identity)
        if key not in self._open:
            short = re.sub(r"\W+", "-", name).strip("-")[:40]
            self._open[key] = Remembered(self.folder / f"{short}-{key[:12]}")
        return self._open[key]


class Remembered(Journal[Values]):
    """The values that one judge has given, by question. Ranks read each other's when they start, and write their own.

    A damaged line is passed over: its question is asked again, and the others, which may have cost money, are not.
    """

    key = "question"
    strict = False

    def __init__(self, folder: Path):
        own = folder / f"{int(os.environ.get('RANK', '0')):05d}.jsonl"
        super().__init__(own, others=sorted(set(folder.glob("*.jsonl")) - {own}))

    def fields(self, values: Values) -> dict[str, Any]:
        return {"values": values}

    def parse(self, fields: dict[str, Any]) -> Values:
        return fields["values"]
