"""Text that a model or a user wrote, on a page of Markdown: seen as it is, and taken for nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows by the heads of their columns, which line up: to be read as it is, too."""
    cells = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head, *lines = (" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in cells)
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (head, rule, *lines))


def block(text: str, language: str) -> str:
    """A block of code, whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"
