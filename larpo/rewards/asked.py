"""What a reward is asked about."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from .text import Text

Call = dict[Any, list[int]]  # questions of one call of a reward: {key: the rows that it is about}
UNCHANGING = {int, float, str, bool, bytes, type(None)}


class Asked(NamedTuple):
    """The completions that a reward is asked about, with the prompt of each and other columns."""

    prompts: Sequence[Text]
    completions: Sequence[Text]
    columns: dict[str, Any]

    def at(self, rows: Sequence[int]) -> Asked:
        """Some of them; a column that is no list is the same for all."""
        columns = {name: [c[i] for i in rows] if isinstance(c, list) else c for name, c in self.columns.items()}
        return Asked([self.prompts[i] for i in rows], [self.completions[i] for i in rows], columns)

    def of(self, call: Call) -> Asked:
        return self.at([row for rows in call.values() for row in rows])

    def copied(self) -> Asked:
        return Asked(_own(self.prompts), _own(self.completions), _own(self.columns))

    def lists(self) -> list[list[int]]:
        """The rows of each list: completions that stand together and have one prompt."""
        groups = itertools.groupby(range(len(self.prompts)), key=lambda i: self.prompts[i])
        return [list(rows) for _, rows in groups]


def _own(value: Any) -> Any:
    """A copy down to what can't be changed in place: of lists, dicts, sets, arrays and tensors. Other objects are handed on."""
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(value) if UNCHANGING.issuperset(map(type, value)) else [_own(item) for item in value]
    if type(value) in (tuple, set):
        return type(value)(map(_own, value))
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and hasattr(value, "__array__"):
        return copy.deepcopy(value)
    return value
