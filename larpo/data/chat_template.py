"""The chat template: messages to the text that a policy reads, the same wherever it is sampled, trained on or scored.

A prompt ends where the assistant begins. Where its last message is the assistant's, that message is the start of the answer:
the turn stays open, and a completion continues it. The columns `tools` (a list of JSON schemas, or JSON text of one) and
`chat_template_kwargs` (a dict, or JSON text of one) of a row go to the template, as with TRL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import json_text
from .validation import joined_text, present

Message = Mapping[str, Any]


def template_keywords(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives `apply_chat_template` beside the messages; usually nothing.

    Raises ValueError where `tools` or `chat_template_kwargs` hold something else.

    >>> template_keywords({"prompt": "Hi", "tools": [], "chat_template_kwargs": {"enable_thinking": False, "date": None}})
    {'enable_thinking': False}
    """
    tools, keywords = (_object(row.get(name), name, kind, what) for name, kind, what in COLUMNS)
    return (keywords or {}) | ({"tools": tools} if tools else {})  # some templates announce tools even for []


COLUMNS = (("tools", list | tuple, "a list of JSON schemas"), ("chat_template_kwargs", Mapping, "a dict"))


def _object(value: Any, name: str, kind: Any, what: str) -> Any:
    """A column that may be JSON text; objects of Python lose the keys that are None."""
    if not value:
        return None  # LLaMA-Factory's files have "" where there are no tools
    read = json_text.check_kind(name, value, kind | None, what)
    return read if isinstance(value, str) else json_text.without_none(read)


def render(tokenizer: Any, messages: Sequence[Message], keywords: Mapping[str, Any], **how: bool) -> str:
    """The text of messages; how: add_generation_prompt and continue_final_message of `apply_chat_template`."""
    return tokenizer.apply_chat_template(written(tokenizer, messages, keywords), tokenize=False, **how, **keywords)


def written(tokenizer: Any, messages: Sequence[Message], keywords: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages as the template wants them: tool calls as objects, contents as strings or as parts of text."""
    strings = _takes_strings(tokenizer, keywords)
    found = []
    for message in messages:
        message = json_text.read_message(present(message))
        content = message.get("content")
        if content is not None:
            text = joined_text(content)
            message["content"] = text if strings else _part(text)
        found.append(message)
    return found


def prompt_text(tokenizer: Any, prompt: Sequence[Message], keywords: Mapping[str, Any]) -> str:
    """The text of a prompt, up to where a completion begins."""
    open_turn = _is_begun(prompt[-1])
    return render(tokenizer, prompt, keywords, add_generation_prompt=not open_turn, continue_final_message=open_turn)


def whole_text(tokenizer: Any, prompt: Sequence[Message], answer: str | Sequence[Message], keywords: Mapping[str, Any]) -> str:
    """The text of a prompt with a completion; a string is one message of the assistant."""
    return render(tokenizer, conversation(prompt, answer)[0], keywords)


def conversation(prompt: Sequence[Message], answer: str | Sequence[Message]) -> tuple[list[Message], int]:
    """The messages of a prompt with a completion, and the index of the completion's first. An answer that the prompt starts and
    the completion continues is one message."""
    answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not (_is_begun(prompt[-1]) and answer[0]["role"] == "assistant"):
        return [*prompt, *answer], len(prompt)
    start, rest = present(prompt[-1]), present(answer[0])
    content = joined_text(start.get("content") or "") + joined_text(rest.get("content") or "")
    return [*prompt[:-1], start | rest | {"content": content}, *answer[1:]], len(prompt) - 1


def _takes_strings(tokenizer: Any, keywords: Mapping[str, Any]) -> bool:
    """Whether the template writes contents that are strings: most do, and some that also know images write parts only."""
    template = str(getattr(tokenizer, "chat_template", None))
    if template not in _FORMS:
        _FORMS[template] = _writes(tokenizer, keywords, str) or not _writes(tokenizer, keywords, _part)
    return _FORMS[template]


_FORMS: dict[str, bool] = {}  # of a template


def _writes(tokenizer: Any, keywords: Mapping[str, Any], content: Callable[[str], Any]) -> bool:
    from jinja2.exceptions import TemplateError

    words = {"user": "Jxq0", "assistant": "wZk7"}
    messages = [{"role": role, "content": content(word)} for role, word in words.items()]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **keywords)
    except (TemplateError, TypeError, ValueError):
        return False
    shown_as_data = "'type'" in text or '"type"' in text
    return all(word in text for word in words.values()) and not shown_as_data


def _part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _is_begun(last: Message) -> bool:
    """Whether the last message of a prompt is an answer to go on with; one that calls a tool is whole."""
    return last["role"] == "assistant" and last.get("content") is not None and not any(map(last.get, json_text.CALLS))
