"""Reading: the settings that say how columns become lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..field_docs import documented
from ..runs.yaml_config import json_object, nearest

ROLES = ("prompt", "completions", "scores", "rank", "source", "group_by")


@documented
@dataclass(kw_only=True)
class Reading:
    """Settings of `larpo.as_lists` and `larpo.load_lists`, which `larpo train` and `larpo score` have too.

    Args:
        columns: Where prompt, completions and scores (or rank, the lowest best) are in data of no known form, a dict (JSON on a
            command line): {"prompt": "question", "completions": "answers[].text", "scores": "answers[].votes"}; also source and
            group_by.
        form: The form of the data by name, where its columns fit several (docs/data.md).
        score: Which score, where the data has several: a name, or weights ({"helpfulness": 0.65, "verbosity": -0.4}).
        group_by: Rows that are equal in this column are one list.
        as_messages: Make prompts that are text a user's turn (true), or single turns text (false). Not given: as the form says.
        bad_rows: Rows that make no list: 'raise' stops at the first, 'drop' leaves them out and counts them by reason.

    Raises ValueError for a value that is out of its range and for columns that say too little or two things.

    >>> Reading(columns={"prompt": "question", "completions": "answers[].text", "scores": "answers[].votes"}).columns["scores"]
    'answers[].votes'
    """

    columns: dict[str, Any] | str | None = None
    form: str | None = None
    score: dict[str, Any] | str | None = None
    group_by: str | None = None
    as_messages: bool | None = None
    bad_rows: str = "raise"

    def __post_init__(self):
        if isinstance(self.columns, str):
            self.columns = json_object("columns", self.columns)
        if isinstance(self.score, str) and self.score.lstrip().startswith("{"):
            self.score = json_object("score", self.score)
        if self.columns is not None:
            _check_columns(self.columns)
        if self.bad_rows not in ("raise", "drop"):
            raise ValueError(f"bad_rows must be 'raise' or 'drop', got {self.bad_rows!r}")
        if self.as_messages not in (None, True, False):
            raise ValueError(f"as_messages must be None, True or False, got {self.as_messages!r}")
        if self.columns is not None and (self.form is not None or self.score is not None):
            raise ValueError("columns say where the scores are, so form and score must be left out beside them")

    @classmethod
    def of(cls, settings: Mapping[str, Any], function: str, also: Sequence[str] = ()) -> Reading:
        """From keywords of a function that takes those in `also` too. Raises TypeError for one that it does not take."""
        takes = [*(one.name for one in fields(Reading)), *also]
        for name in settings:
            if name not in takes:
                raise TypeError(f"{function} takes {', '.join(takes)}, not {name!r}{nearest(name, takes)}")
        return cls(**settings)

    def reading(self) -> dict[str, Any]:
        """These settings, without those of a class that has others too."""
        return {one.name: getattr(self, one.name) for one in fields(Reading)}


def _check_columns(columns: Any) -> None:
    if not isinstance(columns, Mapping):
        raise ValueError(f"columns must be a dict such as {{'prompt': 'question', ...}}, got {type(columns).__name__}")
    for role, path in columns.items():
        if role not in ROLES:
            raise ValueError(f"columns has no {role!r}{nearest(str(role), ROLES)}; it takes {', '.join(ROLES)}")
        listed = (
            isinstance(path, Sequence) and not isinstance(path, str) and role in ("completions", "scores", "rank", "source")
        )
        for one in path if listed else [path]:
            number = role == "scores" and isinstance(one, int | float) and not isinstance(one, bool)
            if not number and not (isinstance(one, str) and one):
                raise ValueError(
                    f"columns[{role!r}] must be the name of a column, or a path such as answers[].text; got {path!r}"
                )
            if isinstance(one, str) and one.count("[]") > 1:
                raise ValueError(f"columns[{role!r}] must have [] once at most: one list of answers in a row; got {path!r}")
    for role in ("prompt", "completions"):
        if role not in columns:
            raise ValueError(f"columns must name {role!r}; it names {', '.join(columns) or 'nothing'}")
    if {"scores", "rank"} <= set(columns):
        raise ValueError("columns must name scores or rank, not both: of scores the highest is best, of ranks the lowest")
