"""A YAML file of settings as a dict, refused with line and field where it is wrong."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


def load_yaml(path: str | Path, known: Iterable[str]) -> dict[str, Any]:
    """The mapping in a YAML file, whose keys must be among `known`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file, the line (from 1) and what is wrong there: not YAML, no mapping, a key that is unknown (with
            the nearest one that is known) or comes twice.
    """
    import yaml

    path, known = Path(path), sorted(known)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not YAML: {error.problem}") from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ValueError(f"{path}, line {line}: holds {type(values).__name__}; expected lines of `name: value`")
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ValueError(f"{path}, line {line}: {key.value!r} is given twice, first on line {seen[key.value]}")
        seen[key.value] = line
        if key.value not in known:
            raise ValueError(f"{path}, line {line}: unknown setting {key.value!r}{nearest(key.value, known)}")
    return {key: number(value) for key, value in values.items()}


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


WORDS = {False: ("no", "off", "none"), True: ("yes", "on")}  # that YAML 1.1 reads as a boolean, or that a user means by it
CHOICES = {"report_to": ("none", "all")}  # of settings whose type does not list them


def as_word(name: str, value: Any, hint: Any) -> Any:
    """The choice that was meant by a boolean, where a setting of this type takes none: `save_strategy: no` is "no".

    Raises ValueError for a boolean that stands for no choice, and for text where a setting is a boolean: "no" would count as
    true. Anything else is returned as it is.

    >>> as_word("save_strategy", False, Literal["no", "steps"]), as_word("bf16", False, bool), as_word("seed", 7, int)
    ('no', False, 7)
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, str) and set(kinds) <= {bool, types.NoneType}:
        raise ValueError(f"{name} must be a boolean, got {value!r}")
    if not isinstance(value, bool):
        return value
    choices = [*CHOICES.get(name, ()), *(choice for kind in kinds for choice in _choices(kind))]
    if bool in kinds or Any in kinds or any(choice is value for choice in choices):
        return value
    for word in WORDS[value]:
        if word in choices:
            return word
    expected = f"one of {', '.join(map(repr, choices))}" if choices else "no boolean"
    raise ValueError(f"{name} must be {expected}, got {value!r}; YAML reads no, off, yes and on as booleans unless quoted")


def _choices(kind: Any) -> tuple:
    """The values of an enumeration or of a Literal."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return tuple(member.value for member in kind)
    return get_args(kind) if get_origin(kind) is Literal else ()


def number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text; here it is the number that was meant."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and not value.isalpha() else value
        except ValueError:
            return value
    if isinstance(value, dict):
        return {key: number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [number(item) for item in value]
    return value
