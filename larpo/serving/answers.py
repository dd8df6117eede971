"""Answers on disk as they arrive: a process that is killed loses what was in flight.

A line per answer, found by what was asked: the order in which questions are asked does not matter.
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
    """The answers in a file, to which one process at a time adds; or in memory alone."""

    def __init__(self, path: Path | None):
        """Raises Damaged for a file that is cut elsewhere than at its end."""
        self._known, self._file = {}, None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            whole = self._read(path)
            with path.open("r+b") as file:
                file.truncate(whole)  # what follows shall stand on a line of its own
        self._file = path.open("a", encoding="utf-8")

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
