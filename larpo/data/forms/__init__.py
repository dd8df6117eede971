"""Forms of data: in which columns a data set keeps prompts, answers and scores.

`recognise` finds the form by the names of the columns, and says what to do where none fits. form.py defines what a form is,
published.py holds the known ones, mapping.py makes one from a user's `columns`; `larpo.data.reader.Reader` reads rows by it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...runs.yaml_config import nearest
from ..reading import Reading
from ..validation import REQUIRED
from .form import Form
from .mapping import of_columns
from .published import FORMS
from .unknown import unknown

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


def recognise(columns: Collection[str], reading: Reading, *, scored: bool = True, row: Mapping[str, Any] | None = None) -> Form:
    """The form of data with these columns.

    scored: False takes lists without scores too. row: one row, from which the error for unknown columns guesses a mapping.

    Raises ValueError where they have none, with the nearest one and the mapping that would read the data, and where columns
    that are not read have names that the lists need.
    """
    if reading.columns is not None:
        return of_columns(reading.columns, columns, scored=scored, row=row)
    known = {form.name: form for form in FORMS}
    if reading.form is not None:
        if reading.form not in known:
            raise ValueError(f"form: none is called {reading.form!r}{nearest(reading.form, known)}; all are {', '.join(known)}")
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
    """Columns that the form does not read, but whose names its lists need."""
    read = {*form.columns, *form.also, *(column for scores in form.scores.values() for column in scores.columns)}
    return [] if form.native else sorted(set(columns) & set(REQUIRED) - read)
