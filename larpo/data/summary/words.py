"""Facts in words: the rows of the tables on the terminal and on the page, and the sentences of a log."""

from __future__ import annotations

from typing import NamedTuple

from .facts import DataSummary
from .spread import Spread, number


class Row(NamedTuple):
    """A row of a table. note: what it means, where that is not plain; warns: whether somebody should look at it."""

    label: str
    value: str
    note: str = ""
    warns: bool = False


def sections(summary: DataSummary) -> dict[str, list[Row]]:
    """All facts but the histograms and the examples, by what they are of."""
    s = summary
    limits = [f"{name} {_setting(value)}" for name, value in s.limits.items() if value is not None]
    how = [Row("read as", s.form), Row("scored by", s.scored_by), Row("settings", ", ".join(limits))]
    if s.refused:
        how.append(Row("refused", s.refused, "training stops here", True))
    lists = [
        Row("lists", f"{s.lists:,}", _first(s)),
        Row("answers", f"{s.candidates:,}"),
        Row("answers of a list", _spread(s.sizes, 0)),
        _found("lists of one answer", s.lists_of_one, s.lists, "nothing to compare"),
        _found("repeated prompts", s.prompts_repeated, s.lists, "lists whose prompt stood before"),
        _found("repeated answers", s.completions_repeated, s.candidates, "in their list"),
    ]
    ordered = s.lists - s.lists_of_one - s.lists_all_tied
    scores = [
        Row("scores", _spread(s.scores, 3)),
        _found("lists all tied", s.lists_all_tied, s.lists, "no preference in them"),
        Row("lists partly tied", _of(s.lists_some_tied, s.lists)),
        Row("tied pairs", _of(s.pairs_tied, s.pairs)),
        Row("the best is the longest", _of(s.best_is_longest, ordered), "of lists with scores that differ"),
    ]
    if s.best_tokens is not None:
        scores.append(
            Row("tokens of best, worst", f"{number(s.best_tokens, 1)}, {number(s.worst_tokens, 1)}", "means: is better longer?")
        )
    tokens = [
        Row("tokens of a prompt", _spread(s.prompt_tokens, 0)),
        Row("tokens of an answer", _spread(s.completion_tokens, 0)),
        _found("prompts cut", s.prompts_cut, s.lists, "by max_prompt_length, max_length"),
        _found("answers cut", s.completions_cut, s.candidates, "by max_length"),
        _found("empty answers", s.completions_empty, s.candidates, "no token that says something"),
        _found("equal answers", s.completions_equal, s.candidates, "in their list, as cut"),
        _found("lists all equal", s.lists_all_equal, s.lists, "they teach nothing"),
        _found("answers with a user's turn", s.completions_with_turns, s.candidates, "in their text, which counts"),
        Row("tokens that count", _all_but(s.tokens_counted, s.tokens_read), "of answers: the loss is of them"),
        Row("tokens of an epoch", f"{s.tokens_run:,}", "each answer with its prompt"),
    ]
    left_out = [
        Row(f"{one.count:,} {one.what}{'s' * (one.count > 1)}", one.reason, f"first: {one.first}", True) for one in s.left_out
    ]
    found = {"How it was read": how, "Lists": lists, "Scores": scores, "Tokens": tokens}
    return found | ({"Left out": left_out} if left_out else {})


def sentences(summary: DataSummary) -> str:
    """The shape of the data, for a log, beside what `TokenizationReport` says was cut."""
    s = summary
    size = f"{s.sizes.least:,}" if s.sizes.least == s.sizes.most else f"{s.sizes.least:,} to {s.sizes.most:,}"
    said = [
        f"{size} candidates a list, scores {s.scores.least:g} to {s.scores.most:g}, tied pairs {_of(s.pairs_tied, s.pairs)}",
        f"tokens of a prompt {_middle(s.prompt_tokens)}, of a completion {_middle(s.completion_tokens)}",
    ]
    repeated = [
        f"{n:,} {what}" for n, what in ((s.prompts_repeated, "prompts"), (s.completions_repeated, "completions of a list")) if n
    ]
    said += [f"repeated: {' and '.join(repeated)}"] if repeated else []
    return "; ".join(said) + "."


def _first(s: DataSummary) -> str:
    if s.lists_read is None:
        return "the first of a stream"
    return f"the first of {s.lists_read:,}" if s.lists < s.lists_read else ""


def _found(label: str, n: int, total: int, note: str) -> Row:
    """What there should be none of, or little."""
    return Row(label, _of(n, total), note if n else "", warns=n > 0)


def _middle(spread: Spread) -> str:
    return f"{spread.median:,.0f} (median) to {spread.most:,.0f}"


def _of(n: int, total: int) -> str:
    """With its share, which says more than the number."""
    if not n or not total:
        return "none" if not n else f"{n:,}"
    share = 100 * n / total
    return f"{n:,} ({share:.0f} %)" if share >= 9.95 or share == round(share) else f"{n:,} ({share:.2g} %)"


def _all_but(n: int, others: int) -> str:
    return f"{n:,}" if not others else f"{_of(n, n + others)}, not {others:,} that are read"


def _spread(spread: Spread, digits: int) -> str:
    if spread.least == spread.most:
        return f"{number(spread.least, digits)} each"
    least, median, high, most = (number(x, digits) for x in (spread.least, spread.median, spread.high, spread.most))
    return f"{least} to {most}, median {median}, 95 % up to {high}"


def _setting(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
