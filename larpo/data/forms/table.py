"""The table of forms in docs/data.md: `python -m larpo.data.forms.table` prints it."""

from __future__ import annotations

import re

from . import FORMS
from .form import Form


def table() -> str:
    """A row of Markdown for each form: its columns, what becomes of them, the line that reads it, and what data has it."""
    head = ("form", "its columns", "prompt", "answers", "scores", "read by", "data, licence")
    rows = [
        (form.name, _code(form.columns), _prompt(form), _answers(form), _scores(form), _line(form), form.of) for form in FORMS
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def _code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _prompt(form: Form) -> str:
    if form.prompt is None:
        return "what the answers share"
    if isinstance(form.prompt, str):
        shared = ", or what the answers share" if form.prompt in form.also else ""
        return f"`{form.prompt}`{', a user’s turn' if form.chat else ''}{shared}"
    return _said(form.prompt)


def _answers(form: Form) -> str:
    said = _code(form.answers) if isinstance(form.answers, tuple) else _said(form.answers)
    return f"{said}, of all rows with the same `{form.group_by}`" if form.group_by else said


def _scores(form: Form) -> str:
    first, *others = form.scores.values()
    return f"{first}; or {_code(tuple(form.scores)[1:])}" if others else str(first)


def _line(form: Form) -> str:
    name = re.search(r"[\w-]+/[\w.-]*\w", form.of)
    config = re.search(r"config (\w+)", form.of)
    if name and config:
        return f'`load_lists("{name[0]}", config="{config[1]}")`'
    return f'`load_lists("{name[0] if name else "file.jsonl"}")`'


def _said(what: object) -> str:
    """What a function of a row says of itself in the first line, or how a column of messages is written."""
    doc = what.__doc__ if hasattr(what, "__name__") else str(what)
    return (doc or "").strip().splitlines()[0]


if __name__ == "__main__":
    print(table())
