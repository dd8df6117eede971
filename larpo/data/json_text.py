"""Free-form JSON of a row, kept as text until a template reads it.

Arrow gives a column one struct: of `{"a": 1}` beside `{"t": 2}` it makes `{"a": 1, "t": None}`, it loses the order of keys,
and refuses values of different types. So what has no fixed keys is text in a data set: the `tool_calls` of messages (and
keys like it), and the columns `tools` and `chat_template_kwargs`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

CALLS = ("tool_calls", "function_call", "tool_responses")  # keys of messages
COLUMNS = ("tools", "chat_template_kwargs")
MESSAGES = ("prompt", "completions")


def write_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of lists whose free-form JSON is text.

    >>> write_row({"prompt": "Hi", "tools": [{"name": "rain"}]})
    {'prompt': 'Hi', 'tools': '[{"name": "rain"}]'}
    """
    return write_messages(row) | {name: _text(row[name]) for name in COLUMNS if name in row}


def write_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the tool calls of its prompt and completions as text."""
    return {**row, **{name: _in_messages(row[name]) for name in MESSAGES if name in row}}


def read_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose tool calls are objects. Raises ValueError where their text is no JSON of such."""
    return {key: read_calls(key, value) if key in CALLS and isinstance(value, str) else value for key, value in message.items()}


def read_calls(key: str, text: str) -> Any:
    """Tool calls from their text; ValueError where it is not JSON of a list (of an object, for the older function_call)."""
    kind, what = (dict, "an object") if key == "function_call" else (list, "a list")
    return check_kind(key, text, kind, what)


def check_kind(name: str, value: Any, kind: Any, what: str) -> Any:
    """The value, or what JSON text says it is. Raises ValueError where that is not of this kind (a type); what: its name."""
    read = value
    if isinstance(value, str):
        try:
            read = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} must be {what}, or JSON text of one; got {value!r}: {error}") from None
    if not isinstance(read, kind):
        raise ValueError(f"{name} must be {what}, or JSON text of one; got {value!r}")
    return read


def without_none(value: Any, keep: str | None = None) -> Any:
    """Without the keys that are None, at any depth but below the key `keep`: Arrow fills in every key that another row has."""
    if isinstance(value, Mapping):
        return {key: item if key == keep else without_none(item, keep) for key, item in value.items() if item is not None}
    return [without_none(item, keep) for item in value] if isinstance(value, list | tuple) else value


def write_dataset(dataset: Dataset, name: str) -> Dataset:
    """The data set with the tool calls of its messages as text, from whatever column they are in.

    Keys that are None go, with a warning where arguments had some: a struct of Arrow has them in every row that lacks the
    key, and a null that was meant looks the same. Arguments that are `datasets.Json` keep theirs.
    """
    exact = columns_with_calls(dataset.features)
    if not exact:
        return dataset
    features = type(dataset.features)({**dataset.features, **{name: _with_text(dataset.features[name]) for name in exact}})
    written = dataset.with_format(None).map(write_columns, fn_kwargs={"exact": exact}, features=features, desc="tool calls")
    if any(not exact[column] and _has_none(row[column]) for row in dataset.select_columns(list(exact)) for column in exact):
        warnings.warn(
            f"{name}: arguments of tool calls held keys that are None, which were left out: a Dataset puts the keys of all its "
            "rows into each. Where null is meant, give tool_calls as JSON text, or the rows as a list or a .jsonl file",
            stacklevel=4,
        )
    return written


def columns_with_calls(features: Mapping[str, Any]) -> dict[str, bool]:
    """The columns whose messages have tool calls that are no text, and whether what they hold is exact (`datasets.Json`)."""
    return {name: _holds_json(feature) for name, feature in features.items() if _with_text(feature) != feature}


def write_columns(row: Mapping[str, Any], exact: Mapping[str, bool]) -> dict[str, Any]:
    """These columns of a row, with tool calls as text and without the keys that Arrow has filled in."""
    return {column: _in_messages(row[column], keep="arguments" if exact[column] else "") for column in exact}


def _text(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _in_messages(value: Any, keep: str | None = None) -> Any:
    """A prompt or a list of completions, with the tool calls of its messages as text.

    keep: what may hold None; other keys of the calls that are None go. None: all stay.
    """
    if isinstance(value, list | tuple):
        return [_in_messages(item, keep) for item in value]
    if not isinstance(value, Mapping):
        return value
    calls = {key: value[key] for key in CALLS if value.get(key) is not None}
    if keep is not None:
        calls = {key: without_none(item, keep) for key, item in calls.items()}
    return {**value, **{key: _text(item) for key, item in calls.items()}}


def _has_none(value: Any, within: bool = False) -> bool:
    """Whether arguments of a tool call somewhere in the value hold a key that is None."""
    if isinstance(value, Mapping):
        return any((within and item is None) or _has_none(item, within or key == "arguments") for key, item in value.items())
    return isinstance(value, list | tuple) and any(_has_none(item, within) for item in value)


def _with_text(feature: Any) -> Any:
    """A feature in which the tool calls of messages are strings."""
    import datasets

    if isinstance(feature, Mapping):
        text = datasets.Value("string")
        return {key: text if key in CALLS and not _is_text(item) else _with_text(item) for key, item in feature.items()}
    if isinstance(feature, list):  # how a list of messages is written in older data sets
        return [_with_text(item) for item in feature]
    return type(feature)(_with_text(feature.feature)) if isinstance(feature, datasets.List) else feature


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string", "null")


def _holds_json(feature: Any) -> bool:
    """Whether something in it is `datasets.Json`, which fills nothing in."""
    import datasets

    if isinstance(feature, Mapping):
        return any(map(_holds_json, feature.values()))
    inner = getattr(feature, "feature", None)
    return isinstance(feature, getattr(datasets, "Json", ())) or (inner is not None and _holds_json(inner))
