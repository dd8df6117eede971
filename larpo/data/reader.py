"""Turns a row of any form into a row of lists; rows that make no list are refused, or left out and counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .forms import Form
from .forms.fields import Field
from .forms.prompts import is_dialogue, turns, user
from .forms.scores import RankOfRow, Ranks, Scores, ahead_of_last, chosen_scores, columns_of
from .forms.shared_start import split_messages, split_text, without_prompt
from .forms.unknown import QUESTIONS, first_of
from .reading import Reading
from .validation import OPTIONAL, REQUIRED, BadRow, bad_field, check_length, check_row

Row = dict[str, Any]
IMPLICIT = "implicit_prompt"  # column of bools: the prompt is what the candidates' texts share, cut by words and not at a turn
KNOWN = (*REQUIRED, *OPTIONAL)
PER_ANSWER = ("completions", "scores", "source", "ref_logps", "completion_ids", "completion_mask")
OF_THE_LIST = ("weight", "tools", "chat_template_kwargs", "prompt_ids", IMPLICIT)  # the same for all answers to a prompt


class Gap(BadRow):
    """A row with a gap that its data set is known to have in places: it is left out and counted, whatever `bad_rows` says."""


@dataclass
class LeftOut:
    """Rows and answers that are in no list, counted by reason."""

    rows: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # where a reason was met first

    def row(self, error: BadRow) -> None:
        self.rows[error.reason] += 1
        self.first.setdefault(error.reason, error.where)

    def answer(self, reason: str, where: str, n: int = 1) -> None:
        self.answers[reason] += n
        self.first.setdefault(reason, where)

    def __bool__(self) -> bool:
        return bool(self.rows or self.answers)

    def __str__(self) -> str:
        parts = []
        for what, counts in (("row", self.rows), ("answer", self.answers)):
            reasons = [f"{n:,} because {reason} (first: {self.first[reason]})" for reason, n in counts.most_common()]
            total = counts.total()
            if reasons:
                parts.append(f"{total:,} {what}{'s were' if total > 1 else ' was'} left out: {'; '.join(reasons)}")
        return ". ".join(parts) or "nothing was left out"


class Reader:
    """Reads the rows of data with these columns. What a row becomes depends on that row alone, so streams can be read too.

    What is left out is counted in `left_out`. Where `group_by` is not None, rows that are equal in that column are to be merged
    (`merged`); of a stream these can only be rows that follow each other.

    >>> from larpo.data.forms import recognise
    >>> columns, reading = ["context", "completions"], Reading()
    >>> answers = [[{"role": "assistant", "content": text}] for text in ("5", "4")]
    >>> ranked = [{"rank": 1, "completion": answers[0]}, {"rank": 0, "completion": answers[1]}]
    >>> row = {"context": [{"role": "user", "content": "2 + 2"}], "completions": ranked}
    >>> Reader(recognise(columns, reading), columns, reading).read(row, "row 0")["scores"]
    [0.0, 1.0]
    """

    def __init__(self, form: Form, columns: Collection[str], reading: Reading):
        self.form, self.reading = form, reading
        self.scores: Scores | None = chosen_scores(form.scores, reading.score, columns, form.name) if form.scores else None
        self.group_by = reading.group_by or form.group_by
        self.chat = reading.as_messages
        if self.chat is None and (form.chat or "system" in columns):
            self.chat = True
        self.has_source = bool(form.source) and set(columns_of(*form.source)) <= set(columns)
        self.left_out = LeftOut()
        if self.group_by is None:
            return
        if self.group_by not in columns:
            raise ValueError(f"group_by: there is no column {self.group_by!r}; found {sorted(columns)}")
        if isinstance(self.scores, Ranks) and len(form.answers) == 1 and "[]" not in form.answers[0] + self.scores.paths[0]:
            self.scores = RankOfRow(self.scores.paths)
        if self.scores is not None and not self.scores.comparable:
            raise ValueError(
                f"group_by={self.group_by!r} makes one list of several rows, and scores of {form.name} data ({self.scores}) "
                "say which answer of a row is better, and cannot be compared across rows"
            )

    @property
    def changes_nothing(self) -> bool:
        """Whether rows are lists as they are and need only be checked."""
        return self.form.native and self.group_by is None and self.chat is None and self.reading.bad_rows == "raise"

    def try_read(self, row: Mapping[str, Any], where: str) -> Row | None:
        """The row as a list; for a row that makes none BadRow or, where bad rows are dropped, None: it is counted."""
        try:
            return self.read(row, where)
        except BadRow as error:
            if self.reading.bad_rows == "raise" and not isinstance(error, Gap):
                raise
            self.left_out.row(error)
            return None

    def try_merge(self, rows: Sequence[Row], where: str) -> Row | None:
        """One list of several, as `try_read` reads them; where: of the first of them."""
        try:
            one = merged(rows, where, self.group_by)
            return one | {"scores": ahead_of_last(one["scores"])} if isinstance(self.scores, RankOfRow) else one
        except BadRow as error:
            if self.reading.bad_rows == "raise":
                raise
            for _ in rows:
                self.left_out.row(error)
            return None

    def read(self, row: Mapping[str, Any], where: str) -> Row:
        """The row as a list, checked. Raises BadRow."""
        if self.group_by is not None and key_of(row, self.group_by) is None:
            bad_field(self.group_by, None, "what rows of one list share", where)
        converted = _with_source_of_each(dict(row) if self.form.native else self._converted(row, where))
        check_row(converted if self.scores else _with_zeros(converted), where)
        _refuse_empty_prompt(converted, where)
        if self.chat is not None:
            converted = self._in_turns(converted, where)
        for name in ("scores", "ref_logps"):
            if converted.get(name) is not None:
                converted[name] = [float(value) for value in converted[name]]
        return {column: converted[column] for column in sorted(converted, key=_column_order)}

    def _converted(self, row: Mapping[str, Any], where: str) -> Row:
        form, record = self.form, Field(row, "", where)
        for name in form.columns:
            record[name]  # refuses a row without it
        prompt, answers = form.read_prompt(record), form.read_answers(record)
        scores = self.scores(record, len(answers)) if self.scores else None
        source = form.read_source(record) if self.has_source else None
        if source is not None:
            check_length(form.source[0], source, len(answers), where)
        if form.gaps:
            kept = self._without_gaps(answers, scores, where)
            answers, scores, source = ([one[i] for i in kept] if one is not None else None for one in (answers, scores, source))
        if not answers:
            record[form.columns[-1]].bad("a list of at least one completion")
        replaced = form.replaced(self.scores)
        extra = {name: value for name, value in row.items() if name not in replaced}
        if self.has_source and "source" in extra:
            extra["prompt_source"] = extra.pop("source")  # where the prompt is from, not who wrote the answers
        given = ({"scores": scores} if self.scores else {}) | ({"source": source} if self.has_source else {})
        return _split(prompt, answers, where) | given | extra

    def _without_gaps(self, answers: Sequence[tuple[str, Any]], scores: Sequence[float | None], where: str) -> list[int]:
        """The places of the answers that have a text and a score; the others are counted."""
        if len(scores) != len(answers):
            what = f"holds {len(answers)} answers and {len(scores)} scores; expected a score for each"
            raise BadRow(where, what, "it has not one score for each answer")
        no_text = [i for i, (_, text) in enumerate(answers) if text is None]
        no_score = [i for i, score in enumerate(scores) if score is None and i not in no_text]
        kept = [i for i in range(len(answers)) if i not in no_text and i not in no_score]
        if not kept:
            raise Gap(where, "has no answer with a score", "no answer in it has a score")
        if self.form.prompt is None and len(kept) < len(answers):
            raise Gap(where, "lacks one of the answers that it compares", "one of the answers that it compares is missing")
        for reason, lacking in (("it has no text", no_text), ("it has no score", no_score)):
            if lacking:
                self.left_out.answer(reason, where, len(lacking))
        return kept

    def _in_turns(self, converted: Row, where: str) -> Row:
        """The list with a prompt of messages, or without turns where `as_messages` is False."""
        prompt, completions = converted["prompt"], converted["completions"]
        system, place = converted.pop("system", None), Field(prompt, "prompt", where)
        if not self.chat:
            if system:
                bad_field("system", system, "none: a system message has no place in text (as_messages)", where)
            return converted | _as_text(prompt, completions, where)
        if isinstance(prompt, str) and not self.form.chat and is_dialogue(prompt):
            prompt, completions = turns(prompt, place), [text.removeprefix(" ") for text in completions]
        elif isinstance(prompt, str):
            if converted.get(IMPLICIT):
                place.bad("a prompt of its own: what answers happen to share is no turn of a user (as_messages)")
            prompt = [user(prompt)]
        if system is not None and prompt[0]["role"] != "system" and (said := Field(system, "system", where).text()):
            prompt = [{"role": "system", "content": said}, *prompt]
        return converted | {"prompt": prompt, "completions": completions}


def _split(prompt: Any, answers: Sequence[tuple[str, Any]], where: str) -> Row:
    """Prompt and completions; of texts that have no prompt, also whether where it ends is a guess."""
    names, texts = [name for name, _ in answers], [text for _, text in answers]
    text = isinstance(texts[0], str)
    for name, answer in answers:
        if isinstance(answer, str) != text:
            bad_field(name, answer, f"the kind of {names[0]!r} (string or messages)", where)
    if prompt is None and text:
        return dict(zip(("prompt", "completions", IMPLICIT), split_text(texts), strict=True))
    if prompt is None:
        prompt, texts = split_messages(texts, names, where)
    elif not text:
        prompt, texts = without_prompt(prompt, texts, names[0].split("[")[0], where)
    return {"prompt": prompt, "completions": texts}


def _refuse_empty_prompt(row: Row, where: str) -> None:
    """Raises BadRow for a prompt that is empty, or was guessed from what answers share, beside a column that may hold it."""
    guessed = row.get(IMPLICIT) or (IMPLICIT in row and not row["prompt"])
    if _says_something(row["prompt"]) and not guessed:
        return
    unread = {name: value for name, value in row.items() if name not in KNOWN and isinstance(value, str) and value.strip()}
    column = first_of(QUESTIONS, unread)
    if column is None and guessed and not row["prompt"]:
        column = next((name for name, value in unread.items() if len(value.split()) > 1), None)
    if column is not None:
        found = "what answers share" if guessed else "empty"
        way = f"columns={{'prompt': {column!r}, 'completions': ..., 'scores': ...}}"
        what = f"field 'prompt' is {found}, and {column!r} is not read; expected that as the prompt, {way}, or no such column"
        raise BadRow(where, what, f"the prompt may be in {column!r}")


# --- rows that are one list


def key_of(row: Mapping[str, Any], column: str) -> str | None:
    """What rows of one list have in common; None for a row that has none of it."""
    value = row.get(column)
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def merged(rows: Sequence[Row], where: str, column: str) -> Row:
    """One list of the answers of several rows, as `Reader.read` gives them.

    An answer that several rows compare with others counts once. Columns of the list must be equal in all rows; other ones
    become lists with the value of each row. Raises BadRow for rows of different prompts.
    """
    first, names = rows[0], dict.fromkeys(name for row in rows for name in row)
    for name in ("prompt", *OF_THE_LIST):
        if any(row.get(name) != first.get(name) for row in rows[1:]):
            what = f"rows with the same {column!r} differ in {name!r}; expected one list's rows to agree"
            raise BadRow(where, what, f"rows of one list differ in {name!r}")
    together = {name: first[name] for name in ("prompt", *OF_THE_LIST) if name in first}
    places = _places(rows)
    for name in names:
        if name in PER_ANSWER:
            lists = [row.get(name) for row in rows]
            together[name] = None if None in lists else [lists[i][k] for i, k in places]
        elif name not in together:
            together[name] = [row.get(name) for row in rows]
    return {name: together[name] for name in sorted(together, key=_column_order)}


def _places(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """(row, answer) of each answer. One that several rows compare, with equal text and score, comes once."""
    found: dict[Any, tuple[int, int]] = {}
    for i, row in enumerate(rows):
        several = len(row["completions"]) > 1
        for k, answer in enumerate(row["completions"]):
            same = (json.dumps(answer, sort_keys=True), row.get("scores", [0.0] * (k + 1))[k]) if several else (i, k)
            found.setdefault(same, (i, k))
    return list(found.values())


# --- small things


def _with_source_of_each(row: Row) -> Row:
    """A single `source` of the whole row becomes that of every candidate."""
    if isinstance(row.get("source"), str) and isinstance(row.get("completions"), list | tuple):
        return row | {"source": [row["source"]] * len(row["completions"])}
    return row


def _with_zeros(row: Row) -> Row:
    """The row with scores in place of those that are missing; bad completions have none, and are refused for themselves."""
    if "completions" not in row:
        return row
    completions = row["completions"]
    return row | {"scores": [0.0] * len(completions) if isinstance(completions, list | tuple) else []}


def _column_order(column: str) -> int:
    return KNOWN.index(column) if column in KNOWN else len(KNOWN)


def _says_something(prompt: Any) -> bool:
    return bool(prompt.strip()) if isinstance(prompt, str) else any(message.get("content") for message in prompt)


def _as_text(prompt: Any, completions: Any, where: str) -> Row:
    """A user's turn and answers to it as text. Raises BadRow for more turns than one."""

    def text(messages: Any, role: str, name: str) -> str:
        if isinstance(messages, str):
            return messages
        if len(messages) != 1 or messages[0].get("role") != role or not isinstance(messages[0].get("content"), str):
            Field(messages, name, where).bad(
                f"one turn of the {role}: more of them, and a system message, are no text (as_messages)"
            )
        return messages[0]["content"]

    answers = [text(completion, "assistant", f"completions[{i}]") for i, completion in enumerate(completions)]
    return {"prompt": text(prompt, "user", "prompt"), "completions": answers}
