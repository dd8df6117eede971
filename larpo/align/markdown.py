"""Text that a model or a user wrote, on a page of Markdown: seen as it is, and taken for nothing else."""

from __future__ import annotations

import re
from typing import Any

from ..data.visible import visible
from ..rewards import text_of

SPECIAL = frozenset("\\|`*_[]<>#~$&")


def cell(text: Any, limit: int = 200) -> str:
    """A text, or messages, in a table: on one line, cut to `limit` characters; nothing in it is Markdown, HTML or a link.

    >>> print(cell("<b>a|b</b>\\n&amp; https://x.org"))
    \\<b\\>a\\|b\\</b\\> \\&amp; https:\\//x.org
    """
    shown = " ".join((text if isinstance(text, str) else text_of(text)).split())
    shown = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    escaped = "".join("\\" + c if c in SPECIAL else c for c in visible(shown))
    return escaped.replace("://", ":\\//").replace("www.", "www\\.")


def block(text: str, language: str) -> str:
    """A block of code, whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"
