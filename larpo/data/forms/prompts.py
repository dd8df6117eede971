"""Prompts that are spread over columns or hold the turns of a dialogue as text; the first line of each says what it reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..validation import BadRow
from .fields import Field

Messages = list[dict[str, Any]]

HUMAN = re.compile(r"\n\n(Human|Assistant):[ \t]*")  # of Anthropic's and Berkeley's data sets
DIALOGUE = re.compile(r"\s*Human:.*\n\nAssistant:\s*", re.DOTALL)
EXTRA_ID = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # of NVIDIA's


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@dataclass(frozen=True)
class Turns:
    """A column of messages."""

    column: str

    def __call__(self, row: Field) -> Messages:
        return row[self.column].messages()

    def __str__(self) -> str:
        return f"`{self.column}`"


@dataclass(frozen=True)
class AfterHistory:
    """A user's turn, its question in one column and more of it in `input`, after the turns in `history`."""

    column: str

    def __call__(self, row: Field) -> Messages:
        messages = []
        if (history := row.get("history")) is not None:
            for pair in history.items():
                said = pair.items("[question, answer]")
                if len(said) != 2:
                    pair.bad("[question, answer]")
                messages += [user(said[0].text()), assistant(said[1].text())]
        more = row.get("input")
        said = [row[self.column].text(), more.text() if more is not None else ""]
        return [*messages, user("\n".join(filter(None, said)))]

    def __str__(self) -> str:
        return f"`history`, then `{self.column}` and `input` as a user’s turn"


def human_assistant(row: Field) -> Messages:
    """turns behind `Human:` and `Assistant:` in `prompt`"""
    return turns(row["prompt"].text(), row["prompt"])


def extra_id(row: Field) -> Messages:
    """turns behind `<extra_id_1>` in `prompt`"""
    prompt = row["prompt"]
    return _alternating(["User", *EXTRA_ID.split(prompt.text())], prompt)


def is_dialogue(text: str) -> bool:
    """Whether a text is a dialogue that `turns` reads."""
    return DIALOGUE.fullmatch(text) is not None


def turns(text: str, field: Field) -> Messages:
    """The messages of a text such as "Human: Hi\\n\\nAssistant: Hello\\n\\nHuman: Bye\\n\\nAssistant:"."""
    parts = HUMAN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip())
    if parts[0].strip() or parts[-2:-1] != ["Assistant"] or parts[-1].strip():
        field.bad("turns that begin with 'Human:' and end with 'Assistant:'")
    return _alternating(parts[1:-2], field)


def _alternating(parts: list[str], field: Field) -> Messages:
    """Messages from speaker, text, speaker, text, ...: the user and the assistant in turn, the user last."""
    speakers, said = parts[::2], parts[1::2]
    if len(speakers) % 2 == 0 or any((who == "Assistant") != (i % 2 == 1) for i, who in enumerate(speakers)):
        raise BadRow(
            field.where,
            f"field {field.name!r} has the turns {', '.join(speakers)}; expected a user's and an assistant's, the user's last",
            f"{field.name!r} has turns that do not alternate",
        )
    return [
        assistant(text.strip()) if who == "Assistant" else user(text.strip()) for who, text in zip(speakers, said, strict=True)
    ]
