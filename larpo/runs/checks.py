"""Checks of settings and arguments that are made in several places, each with the same sentence."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from .secrets import masked


def check_choice(name: str, value: Any, choices: Collection) -> None:
    """Raises ValueError for a setting that is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {masked(value, name)!r}")


def check_count(name: str, value: Any, at_least: int) -> None:
    """Raises ValueError for a setting that is neither None nor a whole number of at least so much."""
    if value is not None and not is_whole(value, at_least):
        raise ValueError(f"{name} must be None or an int >= {at_least}, got {value!r}")


def is_whole(value: Any, at_least: int) -> bool:
    """Whether a setting is a whole number of at least so much; a boolean is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_number(value: Any, at_least: float = -math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= at_least
