"""Text that a model or a user wrote, with all of its characters made visible."""

from __future__ import annotations

import unicodedata

JOINERS = "\u200c\u200d"  # letters and emoji are written with them


def visible(text: str) -> str:
    """The text with characters that show nothing and change how others are shown as their code: control characters but the
    newline, bidirectional overrides, other invisible ones, and halves of surrogate pairs, which no file can hold.

    >>> print(visible("a\\x1b[31m b\\u202ec\\n"), end="")
    a\\u001b[31m b\\u202ec
    """
    return "".join(
        f"\\u{ord(c):04x}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in JOINERS + "\n" else c
        for c in text
    )
