"""A YAML file of settings as a dict, refused with line and field where it is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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
