"""What a row of candidate lists must look like, checked one row at a time with errors that say where and which field."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any, NoReturn

REQUIRED = ("prompt", "completions", "scores")
OPTIONAL = ("source", "ref_logps", "weight", "prompt_ids", "completion_ids", "completion_mask")
_INDEX = re.compile(r"\[\d+\]")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class BadRow(ValueError):
    """A row that makes no list. `reason` is the same for all rows that are refused for the same thing."""

    def __init__(self, where: str, what: str, reason: str):
        super().__init__(where, what, reason)  # so that it can be pickled by a process of Dataset.map
        self.where, self.what, self.reason = where, what, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def check_row(row: Mapping[str, Any], where: str = "row") -> None:
    """Raises if `row` is not a prompt with its candidates; changes nothing.

    Args:
        row: `prompt` (str, or messages: a list of {"role", "content"}), `completions` (m >= 1 strings, or m lists of
            messages), `scores` (m finite numbers, higher is better); optional, absent or None: `source` (m strings),
            `ref_logps` (m finite numbers, nats), `weight` (of the list, a number >= 0), `prompt_ids` with `completion_ids`
            (tokens, m lists of tokens), and with these `completion_mask` (m lists of bools: which tokens count).
        where: starts the message: a file and line, or a row.

    Raises:
        ValueError: the place, the field, what it holds and what is expected.

    >>> check_row({"prompt": "1 + 1 =", "completions": [" 2", " 3"], "scores": [1.0, None]}, "sums.jsonl, line 7")
    Traceback (most recent call last):
    ...
    larpo.data.validation.BadRow: sums.jsonl, line 7: field 'scores[1]' holds None; expected a finite number
    """
    for field in REQUIRED:
        if field not in row:
            raise BadRow(where, f"field {field!r} is missing; found {sorted(row)}", f"{field!r} is missing")
    check_no_media(row, where)
    check_text("prompt", row["prompt"], where)
    m = check_completions("completions", row["completions"], where)
    if isinstance(row["prompt"], str) and not isinstance(row["completions"][0], str):
        bad_field("prompt", row["prompt"], "messages, as in 'completions'", where)
    check_numbers("scores", row["scores"], m, where)
    if row.get("ref_logps") is not None:
        check_numbers("ref_logps", row["ref_logps"], m, where)
    if row.get("source") is not None:
        check_length("source", row["source"], m, where)
        for i, source in enumerate(row["source"]):
            if not isinstance(source, str):
                bad_field(f"source[{i}]", source, "a string", where)
    if row.get("weight") is not None:
        check_number("weight", row["weight"], where)
        if row["weight"] < 0:
            bad_field("weight", row["weight"], "a number >= 0, the weight of the list in the loss", where)
    _check_ids(row, m, where)


def present(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without the keys that are None: Arrow fills in every key that some other message has."""
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def check_completions(field: str, completions: Any, where: str) -> int:
    """The number of candidates, at least one; all of them strings or all of them messages."""
    if not isinstance(completions, list | tuple) or not completions:
        bad_field(field, completions, "a list of at least one completion", where)
    text = isinstance(completions[0], str)
    for i, completion in enumerate(completions):
        check_text(f"{field}[{i}]", completion, where)
        if isinstance(completion, str) != text:
            bad_field(f"{field}[{i}]", completion, f"{'a string' if text else 'messages'}, as in {field}[0]", where)
    return len(completions)


def check_text(field: str, value: Any, where: str) -> None:
    """A string, or a list of at least one message."""
    if isinstance(value, str):
        check_unicode(field, value, where)
        return
    if not isinstance(value, list | tuple) or not value:
        bad_field(field, value, "a string or a list of messages", where)
    for i, message in enumerate(value):
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            bad_field(f"{field}[{i}]", message, "a message: {'role': str, 'content': str}", where)
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            bad_field(f"{field}[{i}].content", content, "a string", where)
        if isinstance(content, str):
            check_unicode(f"{field}[{i}].content", content, where)
        for k, part in enumerate(content if isinstance(content, list) else ()):
            if not is_text_part(part):
                what = "a part of text, {'type': 'text', 'text': str}: models of text alone are trained"
                bad_field(f"{field}[{i}].content[{k}]", part, what, where)


def check_unicode(field: str, text: str, where: str) -> None:
    """Raises ValueError for a lone surrogate: JSON can hold one half of an emoji, which UTF-8 cannot."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        bad_field(field, text[max(error.start - 20, 0) : error.end + 20], "whole characters; this has half an emoji", where)


def check_no_media(row: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for columns of images, videos or sound, which a model of text would not see."""
    for field in MEDIA:
        if row.get(field) is not None and (not isinstance(row[field], list | tuple) or row[field]):
            bad_field(field, row[field], "no such column: models of text alone are trained; drop it", where)


def joined_text(content: str | list) -> str:
    """The text of a message's content: itself, or its parts one behind the other, as templates write them.

    Raises ValueError for parts that are not text.
    """
    if isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if not is_text_part(part):
            raise ValueError(f"content[{i}] of a message holds {part!r}; expected a part of text, which alone is trained on")
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


def is_text_part(part: Any) -> bool:
    """Whether a part of a content is text and nothing else: a string, or {"type": "text", "text": ...}."""
    if isinstance(part, str):
        return True
    return (
        isinstance(part, Mapping)
        and part.get("type", "text") == "text"
        and isinstance(part.get("text"), str)
        and all(value is None for key, value in part.items() if key not in ("type", "text"))
    )


def check_numbers(field: str, values: Any, m: int, where: str) -> None:
    check_length(field, values, m, where)
    for i, value in enumerate(values):
        check_number(f"{field}[{i}]", value, where)


def check_number(field: str, value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        bad_field(field, value, "a finite number", where)


def check_length(field: str, values: Any, m: int, where: str) -> None:
    if not isinstance(values, list | tuple):
        bad_field(field, values, f"a list of {m}, one for each completion", where)
    if len(values) != m:
        what = f"field {field!r} has length {len(values)}; expected {m}, one for each completion"
        raise BadRow(where, what, f"{field!r} has another length than the completions")


def _check_ids(row: Mapping[str, Any], m: int, where: str) -> None:
    prompt, completions = row.get("prompt_ids"), row.get("completion_ids")
    if prompt is None and completions is None:
        if row.get("completion_mask") is not None:
            bad_field("completion_mask", row["completion_mask"], "no mask without completion_ids, whose tokens it is of", where)
        return
    for field, value in (("prompt_ids", prompt), ("completion_ids", completions)):
        if value is None:
            bad_field(field, None, "tokens: prompt_ids and completion_ids are given together or not at all", where)
    check_length("completion_ids", completions, m, where)
    for field, ids in (("prompt_ids", prompt), *((f"completion_ids[{i}]", ids) for i, ids in enumerate(completions))):
        if not isinstance(ids, list | tuple) or (set(map(type, ids)) - {int}) or (ids and min(ids) < 0):
            bad_field(field, ids, "a list of tokens (ints >= 0)", where)
    if (masks := row.get("completion_mask")) is not None:
        check_length("completion_mask", masks, m, where)
        for i, (mask, ids) in enumerate(zip(masks, completions, strict=True)):
            if not isinstance(mask, list | tuple) or len(mask) != len(ids) or not {*mask} <= {0, 1}:
                bad_field(f"completion_mask[{i}]", mask, f"{len(ids)} bools, one for each of its tokens", where)


def bad_field(field: str, value: Any, expected: str, where: str) -> NoReturn:
    shown = repr(value)
    if len(shown) > 80:
        shown = f"{shown[:77]}... ({type(value).__name__})"
    raise BadRow(where, f"field {field!r} holds {shown}; expected {expected}", f"{_INDEX.sub('[]', field)!r} is not {expected}")
