"""Settings as they are written: a YAML file or JSON text as a dict, refused with line and field where it is wrong."""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
import types
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from .files import read_text
from .secrets import masked


def load_yaml(path: str | Path, known: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    """The mapping in a YAML file, whose keys must be among `known`; with their types there, what is text stays as written.

    1e-5 is a number, which YAML 1.1 takes for text, unless it is quoted or, as 4e52301 of a commit, beyond all numbers. For a
    setting that is text, 010, 5e-7 and 2024-01-01 are text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file, the line (from 1) and what is wrong there: not YAML, no mapping, a key that is unknown (with
            the nearest one that is known) or comes twice.
    """
    import yaml

    path, hints = Path(path), known if isinstance(known, Mapping) else {}
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    text = read_text(path)
    try:
        node = yaml.compose(text, Loader=_loader())
        values = yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:  # characters that YAML has no room for
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ValueError(f"{path}, line {line}: holds {type(values).__name__}; expected lines of `name: value`")
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ValueError(f"{path}, line {line}: {key.value!r} is given twice, first on line {seen[key.value]}")
        seen[key.value] = line
        if key.value not in known:
            raise ValueError(f"{path}, line {line}: unknown setting {key.value!r}{nearest(key.value, sorted(known))}")
        if value.tag.endswith((":int", ":float", ":timestamp")) and _is_text(hints.get(key.value)):
            values[key.value] = value.value
    return values


def yaml_value(text: str) -> Any:
    """A value in YAML; text that is no YAML stands for itself."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError:
        return text


@functools.cache
def _loader() -> type:
    """YAML 1.1 of PyYAML, with the numbers of YAML 1.2."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    pattern = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+.0123456789"))
    Loader.add_constructor("tag:yaml.org,2002:float", _float)
    return Loader


def _float(loader: Any, node: Any) -> float | str:
    value = loader.construct_yaml_float(node)
    return node.value if math.isinf(value) and "inf" not in node.value.lower() else value


def _is_text(hint: Any) -> bool:
    kinds = set(kinds_of(hint))
    return str in kinds and kinds <= {str, types.NoneType}


def kinds_of(hint: Any) -> tuple:
    """The types of a union, or the one that it is."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


WORDS = {False: ("no", "off", "none"), True: ("yes", "on")}  # that YAML 1.1 reads as a boolean, or that a user means by it
CHOICES = {"report_to": ("none", "all")}  # of settings whose type does not list them


def as_meant(name: str, value: Any, hint: Any) -> Any:
    """What a value stands for where a setting's type says so: a boolean for the choice that YAML 1.1 took for one
    (`save_strategy: no` is "no"), text in quotes for a number. Anything else is returned as it is.

    Raises ValueError for a boolean that stands for no choice, and for text where a setting is a boolean or a number: "no"
    would count as true.

    >>> as_meant("save_strategy", False, Literal["no", "steps"]), as_meant("bf16", False, bool), as_meant("beta", "1e-1", float)
    ('no', False, 0.1)
    """
    kinds = kinds_of(hint)
    if isinstance(value, str):
        if value == "None" and types.NoneType in kinds:  # as Python writes it; YAML writes null
            return None
        return _not_text(name, value, set(kinds) - {types.NoneType})
    if not isinstance(value, bool):
        return value
    choices = [*CHOICES.get(name, ()), *(choice for kind in kinds for choice in choices_of(kind))]
    if bool in kinds or Any in kinds or any(choice is value for choice in choices):
        return value
    for word in WORDS[value]:
        if word in choices:
            return word
    expected = f"one of {', '.join(map(repr, choices))}" if choices else "no boolean"
    raise ValueError(f"{name} must be {expected}, got {value!r}; YAML reads no, off, yes and on as booleans unless quoted")


def _not_text(name: str, value: str, kinds: set) -> Any:
    """The text, or the number in it where a setting is one."""
    if kinds == {bool}:
        raise ValueError(f"{name} must be a boolean, got {value!r}")
    if not kinds or not kinds <= {int, float}:
        return value
    try:
        return float(value) if float in kinds else int(value)
    except ValueError:
        raise ValueError(f"{name} must be a {'' if float in kinds else 'whole '}number, got {value!r}") from None


def choices_of(kind: Any) -> tuple:
    """The values of an enumeration or of a Literal."""
    if _is_enum(kind):
        return tuple(member.value for member in kind)
    return get_args(kind) if get_origin(kind) is Literal else ()


def only_choices(hint: Any) -> tuple:
    """The values that a setting of this type may have, besides None: those of a Literal, or of an enumeration (in `Enum | str`
    as text). Empty where the type takes others too."""
    kinds = [kind for kind in kinds_of(hint) if kind is not types.NoneType]
    return tuple(choice for kind in kinds if _is_enum(kind) or len(kinds) == 1 for choice in choices_of(kind))


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def json_value(name: str, text: str, expected: str = "JSON text") -> Any:
    """A setting that was given as JSON text; ValueError, without secrets, where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be {expected}, got {masked(text)!r}: {error}") from None


def json_object(name: str, text: str) -> dict[str, Any]:
    """A setting that was given as JSON text; ValueError, without secrets, where that is no object."""
    value = json_value(name, text, "a dict or JSON text of one")
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a dict or JSON text of one, got {masked(text)!r}")
    return value
