"""What judges have said, kept on disk as it comes: a run that goes on asks nobody twice.

    FOLDER/JUDGE/00000.jsonl     a line per question that the process of this rank has asked, with the values that it was told

JUDGE is its name with a digest of its identity (identity.py), which itself is not written down: a judge may hold a key.

A line is appended at once. The last one of a killed process may be cut; it is passed over, and asked again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .identity import digest

Values = list[float | None]


class Memory:
    """The folder in which judges' values are kept, a folder inside for each judge."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[str, Remembered] = {}

    def of(self, name: str, identity: dict[str, Any]) -> Remembered:
        """What the judge of this identity has said."""
        key = digest(identity)
        if key not in self._open:
            short = re.sub(r"\W+", "-", name).strip("-")[:40]
            self._open[key] = Remembered(self.folder / f"{short}-{key[:12]}")
        return self._open[key]


class Remembered:
    """The values that one judge has given, by question. Ranks read each other's when they start, and write their own."""

    def __init__(self, folder: Path):
        self._values: dict[str, Values] = {}
        for file in sorted(folder.glob("*.jsonl")):
            self._read(file)
        rank = int(os.environ.get("RANK", "0"))
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{rank:05d}.jsonl"

    def __contains__(self, question: str) -> bool:
        return question in self._values

    def __getitem__(self, question: str) -> Values:
        return self._values[question]

    def put(self, found: Mapping[str, Values]) -> None:
        """A newline comes first as well: what a killed process left may end without one."""
        lines = [json.dumps({"question": question, "values": values}) for question, values in found.items()]
        with open(self._file, "a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines) + "\n")
        self._values.update(found)

    def _read(self, file: Path) -> None:
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                said = json.loads(line)
                self._values[said["question"]] = said["values"]
            except (ValueError, TypeError, KeyError):
                continue
