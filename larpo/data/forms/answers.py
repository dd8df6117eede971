"""Answers that no path finds: whole conversations, whose common start is the prompt."""

from __future__ import annotations

from ..validation import BadRow
from .fields import Field
from .prompts import Messages, assistant, user


def arena(row: Field) -> list[Messages]:
    """`conversation_a` and `conversation_b`"""
    return [row["conversation_a"].messages(), row["conversation_b"].messages()]


def arena_turns(row: Field) -> list[Messages | None]:
    """`prompt`, a list of a user's turns, with the lists of answers in `response_a` and `response_b`"""
    asked = [field.text() for field in row["prompt"].items()]
    return [_conversation(asked, row[name]) for name in ("response_a", "response_b")]


def _conversation(asked: list[str], said: Field) -> Messages | None:
    answers = said.items()
    if len(answers) != len(asked):
        what = f"field {said.name!r} has {len(answers)} turns; expected {len(asked)}, one for each in 'prompt'"
        raise BadRow(said.where, what, f"{said.name!r} has another number of turns than 'prompt'")
    if any(answer.value is None for answer in answers):
        return None
    return [
        turn for question, answer in zip(asked, answers, strict=True) for turn in (user(question), assistant(answer.text()))
    ]


def swift_response(row: Field) -> list[Messages]:
    """`messages`, and the same with `rejected_response` in place of the last answer"""
    chosen = row["messages"].messages()
    end = max((i for i, message in enumerate(chosen) if message["role"] != "assistant"), default=-1)
    if end == len(chosen) - 1:
        row["messages"].bad("messages that end with an answer of the assistant")
    return [chosen, [*chosen[: end + 1], assistant(row["rejected_response"].text())]]


def swift_messages(row: Field) -> list[Messages]:
    """`messages` and `rejected_messages`"""
    return [row["messages"].messages(), row["rejected_messages"].messages()]
