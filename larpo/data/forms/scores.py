"""How a form says which answer is better, each turned into a number per answer, higher is better.

`columns` are those that are read, `comparable` says whether the numbers of different rows are on one scale, so that rows of one
prompt can become one list. None in place of a number: the data set has none for this answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .fields import Field


class Scores(Protocol):
    comparable: bool

    @property
    def columns(self) -> tuple[str, ...]: ...

    def __call__(self, row: Field, m: int) -> list[float | None]: ...


def columns_of(*paths: str) -> tuple[str, ...]:
    """The columns in which paths begin."""
    return tuple(path.split(".")[0].split("[]")[0] for path in paths)


@dataclass(frozen=True)
class Numbers:
    """Numbers at a path, or one at each of several. gaps: there may be none, or a text that says so."""

    paths: tuple[str, ...]
    gaps: bool = False
    comparable = True

    @property
    def columns(self) -> tuple[str, ...]:
        return columns_of(*self.paths)

    def __call__(self, row: Field, m: int) -> list[float | None]:
        return [None if self.gaps and field.absent else field.number() for path in self.paths for field in row.each(path)]

    def __str__(self) -> str:
        return ", ".join(f"`{path}`" for path in self.paths)


@dataclass(frozen=True)
class Ranks(Numbers):
    """Ranks, of which the lowest is the best: a score is how far the rank is ahead of the list's last."""

    comparable = False

    def __call__(self, row: Field, m: int) -> list[float | None]:
        ranks = super().__call__(row, m)
        last = max((rank for rank in ranks if rank is not None), default=0.0)
        return [None if rank is None else last - rank for rank in ranks]

    def __str__(self) -> str:
        return f"last rank − {super().__str__()}"


@dataclass(frozen=True)
class RankOfRow(Ranks):
    """The rank of a row's only answer, to be compared with the ranks of the other rows of its list once these are merged."""

    comparable = True

    def __call__(self, row: Field, m: int) -> list[float | None]:
        return [-rank for rank in Numbers.__call__(self, row, m)]


def ahead_of_last(scores: Sequence[float]) -> list[float]:
    """What `Ranks` makes of a list's ranks, from the scores of `RankOfRow`."""
    return [score - min(scores) for score in scores]


@dataclass(frozen=True)
class Fixed:
    """The same scores in every row, for answers whose columns say which is better."""

    values: tuple[float, ...]
    columns = ()
    comparable = False

    def __call__(self, row: Field, m: int) -> list[float | None]:
        return list(self.values)

    def __str__(self) -> str:
        return ", ".join(f"{value:g}" for value in self.values)


@dataclass(frozen=True)
class InOrder:
    """Answers that stand with the best first: m - 1, ..., 1, 0."""

    columns = ()
    comparable = False

    def __call__(self, row: Field, m: int) -> list[float | None]:
        return [float(m - 1 - i) for i in range(m)]

    def __str__(self) -> str:
        return "their order, best first"


@dataclass(frozen=True)
class OfColumn:
    """Scores that are read from one column."""

    column: str
    comparable = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)


@dataclass(frozen=True)
class Winner(OfColumn):
    """A column that names the better of two answers, or says that neither is: 1 and 0, or 0 twice."""

    first: Any
    second: Any
    ties: tuple[Any, ...] = ()

    def __call__(self, row: Field, m: int) -> list[float | None]:
        said = row[self.column]
        for value, scores in ((self.first, [1.0, 0.0]), (self.second, [0.0, 1.0]), *((tie, [0.0, 0.0]) for tie in self.ties)):
            if said.value == value and isinstance(said.value, bool) == isinstance(value, bool):
                return list(scores)
        said.bad(f"one of {', '.join(map(repr, (self.first, self.second, *self.ties)))}")

    def __str__(self) -> str:
        return f"1 and 0 by `{self.column}`"


@dataclass(frozen=True)
class OneHot:
    """A column of 0 and 1 for each outcome: the first won, the second won, neither did."""

    columns: tuple[str, str, str]
    comparable = False

    def __call__(self, row: Field, m: int) -> list[float | None]:
        a, b, tie = (row[name].number() if name in row.object() else 0.0 for name in self.columns)
        if sorted((a, b, tie)) != [0.0, 0.0, 1.0]:
            row[self.columns[0]].bad(f"a 1 in one of {', '.join(self.columns)} and 0 in the others, not {a:g}, {b:g}, {tie:g}")
        return [a, b]

    def __str__(self) -> str:
        return ", ".join(f"`{name}`" for name in self.columns[:2])


@dataclass(frozen=True)
class Preference(OfColumn):
    """A number that is below 0 where the first of two answers is better: the better one has its size, the other one 0."""

    def __call__(self, row: Field, m: int) -> list[float | None]:
        strength = row[self.column].number()
        return [max(-strength, 0.0), max(strength, 0.0)]

    def __str__(self) -> str:
        return f"`{self.column}`: −x for the first below 0, x for the second above"


@dataclass(frozen=True)
class Margin(OfColumn):
    """By how much the first of two answers is better."""

    column: str = "margin"

    def __call__(self, row: Field, m: int) -> list[float | None]:
        field = row[self.column]
        if field.number() <= 0:
            field.bad("a number above 0, by how much 'chosen' is better; score='preference' leaves it unread")
        return [field.number(), 0.0]

    def __str__(self) -> str:
        return f"`{self.column}`, 0"


@dataclass(frozen=True)
class Label(OfColumn):
    """Whether an answer is a good one: 1 or 0."""

    comparable = True

    def __call__(self, row: Field, m: int) -> list[float | None]:
        label = row[self.column]
        if label.value not in (True, False) or isinstance(label.value, float):
            label.bad("True or False, or 1 or 0")
        return [float(label.value)] * m

    def __str__(self) -> str:
        return f"1 or 0 by `{self.column}`"


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of scores."""

    terms: tuple[tuple[float, Scores], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for _, scores in self.terms for column in scores.columns))

    @property
    def comparable(self) -> bool:
        return all(scores.comparable for _, scores in self.terms)

    def __call__(self, row: Field, m: int) -> list[float | None]:
        read = zip(*(scores(row, m) for _, scores in self.terms), strict=True)
        weights = [weight for weight, _ in self.terms]
        return [None if None in one else sum(w * s for w, s in zip(weights, one, strict=True)) for one in read]

    def __str__(self) -> str:
        return " + ".join(f"{weight:g} × {scores}" for weight, scores in self.terms)


def chosen_scores(
    scores: Mapping[str, Scores], wanted: str | Mapping[str, float] | None, columns: Sequence[str], form: str
) -> Scores:
    """One of a form's scores: by name, a weighted sum of several, or the first whose columns the data has.

    Raises ValueError for a name that the form has not, or whose columns the data has not.
    """
    there = {name: one for name, one in scores.items() if set(one.columns) <= set(columns)}
    if wanted is None:
        return next(iter(there.values()), next(iter(scores.values())))
    weights = {wanted: 1.0} if isinstance(wanted, str) else dict(wanted)
    for name, weight in weights.items():
        if name not in there:
            raise ValueError(f"score: {form} data has no score {name!r} here; it has {', '.join(there) or 'none'}")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"score: the weight of {name!r} must be a number, got {weight!r}")
    if not weights:
        raise ValueError(f"score must name at least one score, of {', '.join(there)}")
    return there[wanted] if isinstance(wanted, str) else Weighted(tuple((w, there[name]) for name, w in weights.items()))
