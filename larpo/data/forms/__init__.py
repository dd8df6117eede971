"""Forms of data: which one a table of columns has, what reads its rows, and what is said where there is none.

`recognise` says which form columns have; a form says where in a row things are (form.py), in published.py for those that are
known and by `of_columns` for one that the user describes. `larpo.data.reader.Reader` reads rows by it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from ...runs.yaml_config import nearest
from ..reading import Reading
from ..validation import REQUIRED
from .form import Form
from .published import FORMS
from .scores import Fixed, Numbers, Ranks, columns_of

__all__ = ["FORMS", "UNSCORED", "Form", "of_columns", "recognise"]

UNSCORED = Form(
    name="lists without scores",
    of="larpo score",
    columns=("prompt", "completions"),
    prompt="prompt",
    answers=("completions[]",),
    scores={},
    native=True,
)
# Names under which data sets have prompts, answers and their scores.
QUESTIONS = ("question", "instruction", "query", "input", "context", "history", "problem", "user", "title", "post", "messages",
             "conversations", "conversation", "text", "request")  # fmt: skip
ANSWERS = ("answers", "completions", "responses", "generations", "candidates", "outputs", "choices", "options", "answer",
           "response", "completion", "output", "generation")  # fmt: skip
TEXTS = ("text", "answer", "response", "completion", "content", "output", "body", "generation")
SCORES = ("score", "scores", "reward", "rewards", "rating", "ratings", "votes", "pm_score", "label", "preference")
RANKS = ("rank", "ranks", "ranking")


def recognise(columns: Collection[str], reading: Reading, *, scored: bool = True, row: Mapping[str, Any] | None = None) -> Form:
    """The form of data with these columns.

    scored: False takes lists without scores too. row: one row, for what is said of columns of no known form.

    Raises ValueError where they have none, with the nearest one and the mapping that would read the data, and where columns
    that are not read have names that the lists need.
    """
    if reading.columns is not None:
        return of_columns(reading.columns, columns, scored=scored, row=row)
    known = {form.name: form for form in FORMS}
    if reading.form is not None:
        if reading.form not in known:
            near = difflib.get_close_matches(reading.form, known, n=1)
            raise ValueError(
                f"form: none is called {reading.form!r}; the nearest is {(near or ['lists'])[0]!r}, all are {list(known)}"
            )
        form = known[reading.form]
        if missing := set(form.columns) - set(columns):
            raise ValueError(f"form {form} needs columns {sorted(missing)}, which are not among {sorted(columns)}")
        fitting = [form]
    else:
        fitting = [form for form in (*FORMS, *([] if scored else [UNSCORED])) if set(form.columns) <= set(columns)]
    if not fitting:
        raise ValueError(unknown(columns, row))
    for form in fitting:
        if not in_the_way(form, columns):
            return form
    taken = in_the_way(fitting[0], columns)
    raise ValueError(
        f"columns {taken} are in the way: {list(fitting[0].columns)} become {list(REQUIRED)}; rename or remove {taken}"
    )


def in_the_way(form: Form, columns: Collection[str]) -> list[str]:
    """Columns that the form does not read, under names that its lists need."""
    read = {*form.columns, *form.also, *(column for scores in form.scores.values() for column in scores.columns)}
    return [] if form.native else sorted(set(columns) & set(REQUIRED) - read)


def of_columns(
    mapping: Mapping[str, Any], columns: Collection[str], *, scored: bool = True, row: Mapping[str, Any] | None = None
) -> Form:
    """The form that the user's `columns` describe; a column that is a list in `row` is one of answers, as with [] behind it.

    Raises ValueError for columns that are not there.
    """
    paths = {role: tuple(path) if isinstance(path, list | tuple) else (path,) for role, path in mapping.items()}
    for role in {"completions", "scores", "rank", "source"} & set(paths):
        paths[role] = tuple(f"{path}[]" if _is_list((row or {}).get(path)) else path for path in paths[role])
    for role, named in paths.items():
        for column, path in zip(columns_of(*(str(path) for path in named)), named, strict=True):
            if isinstance(path, str) and column not in columns and path not in columns:
                missing = f"columns: {role} is at {path!r}, but there is no column {column!r}{nearest(column, columns)}"
                raise ValueError(f"{missing}; found {sorted(columns)}")
    if "scores" in paths and not all(isinstance(path, str) for path in paths["scores"]):
        if any(isinstance(path, str) for path in paths["scores"]):
            raise ValueError(f"columns['scores'] must be columns or numbers, not both; got {mapping['scores']!r}")
        scores = {"scores": Fixed(tuple(map(float, paths["scores"])))}
    elif "scores" in paths or "rank" in paths:
        scores = {"scores": Numbers(paths["scores"]) if "scores" in paths else Ranks(paths["rank"])}
    elif scored:
        raise ValueError("columns must name 'scores', of which the highest is best, or 'rank', of which the lowest is best")
    else:
        scores = {}
    return Form(
        name="columns",
        of="the user",
        columns=tuple(dict.fromkeys(columns_of(*paths["prompt"], *paths["completions"]))),
        prompt=mapping["prompt"],
        answers=paths["completions"],
        scores=scores,
        source=paths.get("source", ()),
        group_by=mapping.get("group_by"),
    )


def _is_list(value: Any) -> bool:
    """Whether a value is a list of several things and no conversation, which is one."""
    return isinstance(value, list | tuple) and not (
        value and isinstance(value[0], Mapping) and {"role", "from"} & set(value[0])
    )


# --- what is said of columns of no known form


def unknown(columns: Collection[str], row: Mapping[str, Any] | None = None) -> str:
    """What is found, the nearest known form, and the `columns` that would read it."""
    near = max(FORMS, key=lambda form: (_likeness(form, columns), -len(form.columns)))
    missing = [column for column in near.columns if column not in columns]
    lacks = f", which needs {', '.join(missing)} too" if len(missing) < len(near.columns) else ""
    return (
        f"no known form of candidate lists in columns {sorted(columns)}; the nearest is {near}{lacks}. If prompt, answers and "
        f"scores are there, say where: columns={guess(columns, row)} (all forms: docs/data.md)"
    )


def _likeness(form: Form, columns: Collection[str]) -> float:
    """The share of a form's columns that are there, under names like theirs."""
    likeness = [
        max((difflib.SequenceMatcher(None, wanted, column).ratio() for column in columns), default=0.0)
        for wanted in form.columns
    ]
    return sum(one if one > 0.7 else 0.0 for one in likeness) / len(likeness)


def guess(columns: Collection[str], row: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `columns` that are likeliest to read data with these columns; names in capitals are for the user to fill in."""
    prompt = first_of(("prompt", *QUESTIONS), columns)
    answers = first_of(ANSWERS, columns)
    found: dict[str, Any] = {"prompt": prompt or "THE_QUESTION"}
    items = (row or {}).get(answers)
    inside = items[0] if isinstance(items, list | tuple) and items and isinstance(items[0], Mapping) else None
    if {"chosen", "rejected"} <= set(columns):
        return found | {"completions": ["chosen", "rejected"], "scores": [1, 0]}
    if inside is not None:
        names = {role: first_of(known, inside) for role, known in (("scores", SCORES), ("rank", RANKS))}
        role = "rank" if names["rank"] and not names["scores"] else "scores"
        text = first_of(TEXTS, inside) or "THE_TEXT"
        return found | {"completions": f"{answers}[].{text}", role: f"{answers}[].{names[role] or 'THE_SCORE'}"}
    rank, score = first_of(RANKS, columns), first_of(SCORES, columns)
    role = "rank" if rank and not score else "scores"
    found |= {"completions": answers or "THE_ANSWERS", role: score or rank or "THE_SCORES"}
    return found | ({"group_by": found["prompt"]} if isinstance(items, str) else {})


def first_of(names: Collection[str], columns: Collection[str]) -> str | None:
    return next((name for name in names if name in columns), None)
