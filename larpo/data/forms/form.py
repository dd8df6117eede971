"""A form of data: the columns it is known by, and where in a row prompt, answers and scores are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .fields import Field
from .scores import Scores, columns_of

Text = str | list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Form:
    """Paths are as `Field.each` reads them: "answers[].text" is the text of each item of the column answers.

    name, of: what it is called, and which data sets or tools write it, with licences.
    columns: it is the form of data that has all of these.
    prompt: a path, a function of the row, or None: what the answers share at their start. A path that is in `also`, not in
        `columns`, is a column that rows may do without, and then it is what their answers share.
    answers: paths, one for each answer or for all, or a function of the row. Strings, messages, or None for one without text.
    scores: by name; the first whose columns the data has is taken where none is asked for.
    source: paths to the name of what wrote each answer.
    also: columns that are read, or replaced by what is read, where the data has them.
    group_by: rows that are equal there are one list.
    chat: a prompt that is text is a user's turn.
    gaps: the data set is published with answers that have no text or no score; they are left out and counted.
    native: rows are lists as they are, and are only checked.
    """

    name: str
    of: str
    columns: tuple[str, ...]
    prompt: str | Callable[[Field], Text] | None
    answers: tuple[str, ...] | Callable[[Field], list[Any]]
    scores: Mapping[str, Scores]
    source: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    group_by: str | None = None
    chat: bool = False
    gaps: bool = False
    native: bool = False

    def read_prompt(self, row: Field) -> Text | None:
        if self.prompt is None:
            return None
        if callable(self.prompt):
            return self.prompt(row)
        if self.prompt not in self.columns and self.prompt in self.also:  # a column that rows may do without
            field = row.get(self.prompt)
            return None if field is None else field.answer()
        return row.at(self.prompt).answer()

    def read_answers(self, row: Field) -> list[tuple[str, Text | None]]:
        """The answers with their paths; None for one that is not there."""
        if callable(self.answers):
            return [(self.columns[i], answer) for i, answer in enumerate(self.answers(row))]
        fields = [field for path in self.answers for field in row.each(path, "a list of at least one completion")]
        return [(field.name, None if field.value is None and self.gaps else field.answer()) for field in fields]

    def read_source(self, row: Field) -> list[str] | None:
        """Names of what wrote each answer, if all are there."""
        try:
            names = [field.value for path in self.source for field in row.each(path)]
        except ValueError:
            return None
        return names if names and all(isinstance(name, str) for name in names) else None

    def replaced(self, scores: Scores | None) -> set[str]:
        """The columns that prompt, completions and scores take the place of."""
        read = (*self.columns, *self.also, *columns_of(*self.source), *(scores.columns if scores else ()))
        return {*read, *(columns_of(self.prompt) if isinstance(self.prompt, str) else ())}

    def __str__(self) -> str:
        return f"{self.name} {{{', '.join(self.columns)}}}"
