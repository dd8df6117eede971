"""Whether a folder holds the run that is about to go on in it, or another one: settings before and now, by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from .secrets import without_secrets

if TYPE_CHECKING:
    from datasets import Dataset


def changed(before: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """The settings by which one run differs from another, as sentences; none if it is the same run. A token, key or password
    makes no other run, and is not shown.

    >>> changed({"beta": 0.1, "steps": 5}, {"beta": 0.2, "steps": 9}, may_change=["steps"])
    ['beta was 0.1 and is 0.2']
    """
    before, now = without_secrets(before), without_secrets(now)
    return [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if name not in may_change and before.get(name) != value
    ]


def with_defaults(settings: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The settings of a run, which may have begun before some fields of the dataclass were there: at their defaults, then."""
    return {one.name: one.default for one in fields(kind) if one.default is not MISSING} | dict(settings)


def content(lists: Dataset) -> str:
    """What a data set holds, in a few characters: equal rows, equal text, wherever they were read from.

    >>> import datasets
    >>> content(datasets.Dataset.from_list([{"prompt": "a"}]))
    '1 lists, sha256 b4199e33255d'
    """
    digest = hashlib.sha256()
    for row in lists.with_format(None):
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return f"{len(lists)} lists, sha256 {digest.hexdigest()[:12]}"
