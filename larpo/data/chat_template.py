"""The chat template: messages to the text that a policy reads, the same wherever it is sampled, trained on or scored.

A prompt ends where the assistant begins; one that ends in a message of the assistant is an answer that was begun: the turn
stays open, and a completion goes on in it. The columns `tools` (a list of JSON schemas, or JSON text of one) and
`chat_template_kwargs` (a dict) of a row go to the template, as with TRL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .validation import present

Message = Mapping[str, Any]


def template_keywords(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives `apply_chat_template` beside the messages; usually nothing.

    Raises ValueError where `tools` or `chat_template_kwargs` hold something else than is said above.

    >>> template_keywords({"prompt": "Hi", "tools": [], "chat_template_kwargs": {"enable_thinking": False, "date": None}})
    {'enable_thinking': False}
    """
    tools, keywords = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"tools must be a list of JSON schemas, or JSON text of one; got {tools!r}: {error}") from None
    if tools is not None and not isinstance(tools, list | tuple):
        raise ValueError(f"tools must be a list of JSON schemas, or JSON text of one; got {tools!r}")
    if keywords is not None and not isinstance(keywords, Mapping):
        raise ValueError(f"chat_template_kwargs must be a dict, got {keywords!r}")
    found = _without_none(dict(keywords or {}))
    return found | {"tools": _without_none(tools)} if tools else found  # some templates announce tools even for []


def prompt_text(tokenizer: Any, prompt: Sequence[Message], keywords: Mapping[str, Any]) -> str:
    """The text of a prompt, up to where a completion begins."""
    messages = [present(message) for message in prompt]
    open_turn = _is_begun(messages[-1])
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not open_turn, continue_final_message=open_turn, **keywords
    )


def whole_text(tokenizer: Any, prompt: Sequence[Message], answer: str | Sequence[Message], keywords: Mapping[str, Any]) -> str:
    """The text of a prompt with a completion; a string is one message of the assistant."""
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    prompt, answer = ([present(message) for message in messages] for messages in (prompt, answer))
    if _is_begun(prompt[-1]) and answer[0]["role"] == "assistant":
        content = _joined(prompt[-1].get("content"), answer[0].get("content"))
        prompt, answer = prompt[:-1], [prompt[-1] | answer[0] | {"content": content}, *answer[1:]]
    return tokenizer.apply_chat_template([*prompt, *answer], tokenize=False, **keywords)


def _is_begun(last: Message) -> bool:
    """Whether the last message of a prompt is an answer to go on with; a call of a tool alone is whole."""
    return last["role"] == "assistant" and last.get("content") is not None


def _joined(start: str | list | None, rest: str | list | None) -> str | list:
    """Two contents of messages as one: texts, or lists of parts."""
    if isinstance(start, list) or isinstance(rest, list):
        parts = ([{"type": "text", "text": one}] if isinstance(one, str) else one or [] for one in (start, rest))
        return [part for some in parts for part in some]
    return (start or "") + (rest or "")


def _without_none(value: Any) -> Any:
    """Without the keys that are None: Arrow fills in every key that some other row has."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value
