"""The form that the user describes by `columns`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...runs.yaml_config import nearest
from .form import Form
from .scores import Fixed, Numbers, Ranks, columns_of


def of_columns(
    mapping: Mapping[str, Any], columns: Collection[str], *, scored: bool = True, row: Mapping[str, Any] | None = None
) -> Form:
    """The form that the user's `columns` describe; a column that is a list in `row` is one of answers, as with [] behind it.

    Raises ValueError for columns that are not there.
    """
    paths = {role: tuple(path) if isinstance(path, list | tuple) else (path,) for role, path in mapping.items()}
    for role in {"completions", "scores", "rank", "source"} & set(paths):
        paths[role] = tuple(f"{path}[]" if _is_list((row or {}).get(path)) else path for path in paths[role])
    for role, named in paths.items():
        for column, path in zip(columns_of(*(str(path) for path in named)), named, strict=True):
            if isinstance(path, str) and column not in columns and path not in columns:
                missing = f"columns: {role} is at {path!r}, but there is no column {column!r}{nearest(column, columns)}"
                raise ValueError(f"{missing}; found {sorted(columns)}")
    if "scores" in paths and not all(isinstance(path, str) for path in paths["scores"]):
        if any(isinstance(path, str) for path in paths["scores"]):
            raise ValueError(f"columns['scores'] must be columns or numbers, not both; got {mapping['scores']!r}")
        scores = {"scores": Fixed(tuple(map(float, paths["scores"])))}
    elif "scores" in paths or "rank" in paths:
        scores = {"scores": Numbers(paths["scores"]) if "scores" in paths else Ranks(paths["rank"])}
    elif scored:
        raise ValueError("columns must name 'scores', of which the highest is best, or 'rank', of which the lowest is best")
    else:
        scores = {}
    return Form(
        name="columns",
        of="the user",
        columns=tuple(dict.fromkeys(columns_of(*paths["prompt"], *paths["completions"]))),
        prompt=mapping["prompt"],
        answers=paths["completions"],
        scores=scores,
        source=paths.get("source", ()),
        group_by=mapping.get("group_by"),
    )


def _is_list(value: Any) -> bool:
    """Whether a value is a list of several things and no conversation, which is one."""
    return isinstance(value, list | tuple) and not (
        value and isinstance(value[0], Mapping) and {"role", "from"} & set(value[0])
    )
