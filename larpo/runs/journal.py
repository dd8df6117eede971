"""Answers, appended to a file as they arrive, a line of JSON each: a killed process loses only answers that had not arrived.

An answer is found by its question, in whatever order questions are asked again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from .intact import Damaged

Answer = TypeVar("Answer")


class Journal(Generic[Answer]):
    """The answers in a file, to which one process at a time adds; or in memory alone.

    Subclasses say how an answer is written: `key` names the field of the question, `fields` and `parse` are for all others.
    strict: a damaged line raises Damaged; else it is passed over. The last line of a killed process may be cut in any case.
    """

    key = "key"
    strict = True

    def __init__(self, path: Path | None, others: Iterable[Path] = ()):
        """others: files of other processes, which are read and not written."""
        self._path = path
        self._known: dict[str, Answer] = {}
        for file in others:
            self._read(file)
        if path is not None and path.exists():
            whole = self._read(path)
            with path.open("r+b") as file:
                file.truncate(whole)  # what follows shall stand on a line of its own

    def fields(self, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def parse(self, fields: dict[str, Any]) -> Answer:
        raise NotImplementedError

    def __contains__(self, question: str) -> bool:
        return question in self._known

    def __getitem__(self, question: str) -> Answer:
        return self._known[question]

    def put(self, found: Mapping[str, Answer]) -> None:
        self._known.update(found)
        if self._path is None:
            return
        lines = [{self.key: question} | self.fields(answer) for question, answer in found.items()]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _read(self, path: Path) -> int:
        """The bytes of its whole lines."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n"), 1):
            try:
                if line:
                    fields = json.loads(line)
                    question = fields.pop(self.key)
                    self._known[question] = self.parse(fields)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if self.strict:
                    raise Damaged(path, f"line {number} is damaged ({error})") from None
        return whole
