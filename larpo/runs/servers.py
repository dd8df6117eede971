"""Servers of completions and of rewards: their address, the key for them, and what may be shown of their answers.

A key is in an environment variable, which a setting names, and never in a setting itself.
"""

from __future__ import annotations

import os
import urllib.parse

from .secrets import MASK, masked


def check_address(setting: str, url: str, example: str, *, may_have_query: bool) -> None:
    """Raises ValueError for a setting that is no address, and for one that holds a secret."""
    parts = urllib.parse.urlsplit(str(url))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{setting} must be an address like {example}, got {masked(url)!r}")
    holds_secret = any(masked(part) != part for part in (parts.path, parts.query))  # a host may be named like one: api-key:8000
    if parts.username or parts.password or holds_secret or (parts.query and not may_have_query):
        without = "key" if may_have_query else "query"
        raise ValueError(f"{setting} must hold no user, password or {without}: a key is read from api_key_env")


def key_in(variable: str | None, setting: str) -> str | None:
    """The key in an environment variable that a setting names, None if it names none. Raises ValueError if it is not set."""
    key = os.environ.get(variable or "")
    if variable is not None and not key:
        raise ValueError(f"{setting} is {variable!r}, and there is no such environment variable")
    return key


def without_key(text: str, variable: str | None) -> str:
    """A text that a server or a command gave, without the key, should it show it."""
    key = os.environ.get(variable or "")
    return text.replace(key, MASK) if key else text


def shown(text: str, variable: str | None, most: int = 300) -> str:
    """The beginning of such a text in a line, without secrets."""
    text = " ".join(masked(without_key(text, variable)).split())
    return text if len(text) <= most else f"{text[:most]}..."
