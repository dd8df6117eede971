"""The error for columns of no known form: it names the nearest form, and the `columns` that are likeliest to read the data."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from .form import Form
from .published import FORMS


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Names under which data sets have prompts, answers and their scores, the likeliest first.
QUESTIONS = _names(
    "question instruction query input context history problem user title post messages conversations conversation text request"
)
ANSWERS = _names(
    "answers completions responses generations candidates outputs choices options answer response completion output generation"
)
TEXTS = _names("text answer response completion content output body generation")
SCORES = _names("score scores reward rewards rating ratings votes pm_score label preference")
RANKS = _names("rank ranks ranking")


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
