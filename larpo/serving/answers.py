"""Answers on disk as they arrive: a process that is killed loses what was in flight.

Each process has a file of its own, to which it appends a line per answer, and reads those of all. An answer is found by what
was asked, so it does not matter which process asks, in which order, or how many there are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ..runs.intact import Damaged
from .asking import Answer, Choice, Limits, Wanted


def key_of(weights: str, wanted: Wanted, limits: Limits) -> str:
    asked = {"weights": weights} | dataclasses.asdict(wanted) | dataclasses.asdict(limits)
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Answers:
    """The answers in a folder, or in memory alone."""

    def __init__(self, folder: Path | None, rank: int = 0):
        """Raises Damaged for a file that is cut elsewhere than at its end."""
        self.folder, self._known, self._file = folder, {}, None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"answers-{rank:03d}.jsonl"
        for path in sorted(folder.glob("answers-*.jsonl")):
            whole = self._read(path)
            if path == own:  # what follows shall stand on a line of its own
                with path.open("r+b") as file:
                    file.truncate(whole)
        self._file = own.open("a", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> Answer | None:
        return self._known.get(key)

    def keep(self, key: str, answer: Answer) -> None:
        self._known[key] = answer
        if self._file is not None:
            self._file.write(json.dumps({"key": key} | dataclasses.asdict(answer), ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path) -> int:
        """The bytes of its whole lines."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                found: dict[str, Any] = json.loads(line)
                key, choices = found.pop("key"), [Choice(**one) for one in found.pop("choices")]
                self._known[key] = Answer(choices, **found)
            except (ValueError, KeyError, TypeError) as error:
                raise Damaged(path, f"line {number} is damaged ({error})") from None
        return whole
