"""Fields of a row, found by path and read as text, numbers or messages; errors name the row's place and the path."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from ..validation import BadRow, bad_field, check_text

MISSING = ("", "N/A", "n/a", "None", "nan", "NaN")  # texts that stand for no number where a data set is published with gaps
ASSISTANT = dict.fromkeys(("gpt", "chatgpt", "bot", "model", "function_call"), "assistant")
ROLES = {"human": "user", **ASSISTANT, "observation": "tool", "function": "tool"}

# Text that is messages, as a .csv file has them: an object that begins with who speaks.
MESSAGES = re.compile(
    rf"""\s*\[?\s*\{{\s*["'](role|from)["']\s*:\s*["'](user|assistant|system|tool|developer|{"|".join(ROLES)})["']"""
)


class Field:
    """A value of a row with its path in it and the row's place.

    >>> Field({"answers": [{"text": "yes"}]}, "", "row 0")["answers"].items()[0]["text"].text()
    'yes'
    """

    __slots__ = ("name", "value", "where")

    def __init__(self, value: Any, name: str, where: str):
        self.value, self.name, self.where = value, name, where

    def __getitem__(self, key: str) -> Field:
        inside = self.object()
        name = f"{self.name}.{key}" if self.name else key
        if key not in inside:
            raise BadRow(self.where, f"field {name!r} is missing; found {sorted(map(str, inside))}", f"{name!r} is missing")
        return Field(inside[key], name, self.where)

    def get(self, key: str) -> Field | None:
        """The field, or None where it is missing or holds None."""
        value = self.object().get(key)
        return None if value is None else self[key]

    def at(self, path: str) -> Field:
        """The field at a path such as info.post; a column whose name has a dot is found under that name."""
        if not path:
            return self
        if isinstance(self.value, Mapping) and path in self.value:
            return self[path]
        key, _, rest = path.partition(".")
        return self[key].at(rest)

    def each(self, path: str, what: str = "a list") -> list[Field]:
        """The fields at a path with [], one for each item of the list there; at another path the one field."""
        before, brackets, after = path.partition("[]")
        if not brackets:
            return [self.at(path)]
        return [item.at(after.removeprefix(".")) for item in self.at(before).items(what)]

    def object(self) -> Mapping[str, Any]:
        value = self._decoded("{")
        if not isinstance(value, Mapping):
            self.bad("an object with named fields")
        return value

    def items(self, what: str = "a list") -> list[Field]:
        """The items of a list, or of lists in an object, which is how Arrow may hold a list of objects."""
        value = self._decoded("[", "{")
        if isinstance(value, Mapping) and value and all(isinstance(column, list | tuple) for column in value.values()):
            sizes = {len(column) for column in value.values()}
            if len(sizes) == 1:
                value = [dict(zip(value, item, strict=True)) for item in zip(*value.values(), strict=True)]
        if not isinstance(value, list | tuple):
            self.bad(what)
        return [Field(item, f"{self.name}[{i}]", self.where) for i, item in enumerate(value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.bad("a string")
        return self.value

    def number(self) -> float:
        """A finite number, or the text of one."""
        value = self.value
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                self.bad("a finite number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.bad("a finite number")
        return float(value)

    @property
    def absent(self) -> bool:
        """Whether it holds nothing: None, NaN or a text that stands for it."""
        value = self.value
        return value is None or (math.isnan(value) if isinstance(value, float) else isinstance(value, str) and value in MISSING)

    def answer(self) -> str | list[dict[str, Any]]:
        """A string, or messages: a list of them, one alone, or JSON text of them; of LLaMA-Factory too ({"from", "value"})."""
        value = self.value
        if isinstance(value, str) and MESSAGES.match(value):
            value = self._decoded("[", "{")
        if isinstance(value, Mapping):
            value = [value]
        if isinstance(value, list | tuple):
            value = [_message(item, f"{self.name}[{i}]", self.where) for i, item in enumerate(value)]
        check_text(self.name, value, self.where)
        return value

    def messages(self) -> list[dict[str, Any]]:
        value = self.answer()
        if isinstance(value, str):
            self.bad("a list of messages")
        return value

    def bad(self, expected: str) -> NoReturn:
        bad_field(self.name, self.value, expected, self.where)

    def _decoded(self, *starts: str) -> Any:
        """The value, or what JSON text of an object or a list says."""
        if not isinstance(self.value, str) or not self.value.lstrip().startswith(starts):
            return self.value
        try:
            return json.loads(self.value)
        except json.JSONDecodeError as error:
            self.bad(f"JSON ({error.msg}, character {error.pos + 1})")


def _message(value: Any, name: str, where: str) -> Any:
    """A message with role and content, from one with from and value."""
    if not isinstance(value, Mapping) or "role" in value or "from" not in value:
        return value
    speaker, said = value["from"], value.get("value")
    role = ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if speaker != "function_call":
        return {"role": role, "content": said}
    call = Field(said, f"{name}.value", where).object()
    return {"role": role, "content": "", "tool_calls": [{"type": "function", "function": dict(call)}]}
