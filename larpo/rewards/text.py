"""What rewards read: strings, or lists of messages."""

from __future__ import annotations

from typing import Any

Text = str | list[dict[str, Any]]  # a string, or messages {"role": ..., "content": ...}


def text_of(completion: Text) -> str:
    """The text of a completion: itself, or the contents of its messages, a line each.

    >>> text_of([{"role": "assistant", "content": "Paris."}])
    'Paris.'
    """
    if isinstance(completion, str):
        return completion
    contents = (message.get("content") or "" for message in completion)
    return "\n".join(
        content if isinstance(content, str) else "".join(part.get("text", "") for part in content) for content in contents
    )
