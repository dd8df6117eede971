"""Checks what a reward returned: one finite number, or None, for each completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .memory import Values


def one_per_completion(said_by: str, values: Any, n: int) -> Values:
    """The values as floats, None where one is None. A set or a dict is refused: it does not say which value belongs to which
    completion."""
    shape = getattr(values, "shape", None)
    is_array = shape is not None and hasattr(values, "__array__") and len(shape) == 1
    if not is_array and (isinstance(values, str | bytes) or not isinstance(values, Sequence)):
        returned = type(values).__name__ if shape is None else f"{type(values).__name__} of shape {tuple(shape)}"
        raise ValueError(
            f"{said_by} returned {returned}; expected a list of floats or None, or an array or tensor of one dimension"
        )
    if len(values) != n:
        raise ValueError(f"{said_by} returned {len(values)} values; expected one for each of the {n} completions")
    try:
        return [None if value is None else _number(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{said_by} returned a value that is no finite number: {error}") from error


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):  # float() reads them
        raise TypeError(f"got {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"got {number}, where None would say that it has no opinion")
    return number
