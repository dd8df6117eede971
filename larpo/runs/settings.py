"""The settings of a command: the defaults of dataclasses, over them a YAML file, over that flags.

    kinds = TrainJob, LarPOConfig
    job, args = read_settings(kinds, "train.yaml", flag_values(["--beta", "0.5"], kinds))

`larpo train`, `score`, `align` and `data` are all read here: they take the same words and refuse with the same sentences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from .checks import check_choice
from .secrets import masked
from .yaml_config import as_meant, kinds_of, load_yaml, nearest, only_choices, yaml_value

EMPTY = {"None": None, "null": None, "[]": []}
YES, NO = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")


class Setting(NamedTuple):
    """A field of a dataclass of settings, with its type."""

    field: Field
    hint: Any

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def is_needed(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING

    def of_flag(self, texts: Sequence[str]) -> Any:
        """The value of `--name`, `--name text` or `--name text text ...`."""
        kinds = kinds_of(self.hint)
        lists = [kind for kind in kinds if get_origin(kind) is list]
        if not texts:
            if bool not in kinds and Any not in kinds and "const" not in self.field.metadata:
                raise ValueError(f"--{self.name} needs a value")
            return True
        if len(texts) > 1 and not lists:
            raise ValueError(f"expected flags, got {masked(' '.join(texts[1:]))!r}")
        whole = _of_text(texts[0], self.hint)
        if len(texts) == 1 and (not isinstance(whole, str) or set(kinds) - {*lists, NoneType}):
            return whole
        (of_an_item,) = get_args(lists[0])
        return [as_meant(self.name, _of_text(text, of_an_item), of_an_item) for text in texts]

    def checked(self, value: Any) -> Any:
        """The value with the setting's type. Raises ValueError for one that has another type, or is none of the choices."""
        metadata, kinds = self.field.metadata, set(kinds_of(self.hint))
        if value is True and "const" in metadata:
            return value
        value = as_meant(self.name, value, self.hint)
        lists = [kind for kind in kinds if get_origin(kind) is list]
        if type(value) in (str, int, float) and lists and kinds <= {*lists, NoneType}:  # one item stands for a list of it
            value = [as_meant(self.name, value, *get_args(lists[0]))]
        if type(value) is int and float in kinds and int not in kinds:
            value = float(value)
        if type(value) is int and value in (0, 1) and kinds <= {bool, NoneType}:
            value = bool(value)
        choices = metadata.get("choices") or only_choices(self.hint)
        if choices and value is not None:
            check_choice(self.name, value, choices)
        if type(value) in (NoneType, int, float, list, dict) and not _takes(self.hint, value):
            kind = self.hint.__name__ if isinstance(self.hint, type) else self.hint
            raise ValueError(f"{self.name} does not take {masked(value, self.name)!r} (its type is {kind})")
        return value


def settings_of(kinds: Sequence[type]) -> dict[str, Setting]:
    """The settings of dataclasses by their names."""
    hints = {kind: get_type_hints(kind) for kind in kinds}
    return {one.name: Setting(one, hints[kind][one.name]) for kind in kinds for one in fields(kind) if one.init}


def flag_values(flags: Sequence[str], kinds: Sequence[type]) -> dict[str, Any]:
    """Flags as values by name: `--name value`, `--name=value`, `--name a b` for a list, `--name` and `--no-name` for a boolean,
    `--name.inner value` for a setting inside of one that is a dict.

    A setting that is text is taken as written, unless it is in quotes. What may be of any type, lists and dicts are YAML or
    JSON. `None`, `null` and `[]` are None and an empty list where the setting takes them.
    """
    known = settings_of(kinds)
    values: dict[str, Any] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ValueError(f"expected flags, got {masked(flag)!r}")
        name, given, text = flag[2:].partition("=")
        name, texts = name.replace("-", "_"), [text] if given else []
        while rest and not given and not rest[0].startswith("--"):
            texts.append(rest.pop(0))
        group, _, inner = name.partition(".")
        negated = known.get(name.removeprefix("no_"))
        if name not in known and negated is not None and bool in kinds_of(negated.hint) and not texts:
            values[negated.name] = False
        elif group not in known:
            raise ValueError(f"unknown setting {name!r}{nearest(group, known)}")
        elif inner:
            values[name] = Setting(known[group].field, Any).of_flag(texts)
        else:
            values[name] = known[group].of_flag(texts)
    return values


def read_settings(
    kinds: Sequence[type], file: str | Path | None, given: Mapping[str, Any], needed: Sequence[str] = ()
) -> tuple[Any, ...]:
    """An instance of each of the dataclasses, whose fields have different names.

    given: values by name, which win over the file; "group.name" sets one value inside of a dict.
    needed: settings with a default that must be given all the same.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file and line, or the setting, and what is wrong: unknown (with the nearest name), missing, of another
            type; and what the dataclasses refuse.
    """
    known = settings_of(kinds)
    values = {} if file is None else load_yaml(file, {name: setting.hint for name, setting in known.items()})
    for name, value in given.items():
        group, _, inner = name.partition(".")
        if group not in known:
            raise ValueError(f"unknown setting {name!r}{nearest(group, known)}")
        before = values.get(group) or {}
        if inner and not isinstance(before, Mapping):
            raise ValueError(f"{name!r} is set, but {group} holds {masked(before, group)!r}")
        values[group] = {**before, inner: value} if inner else value
    needed = [*(name for name, setting in known.items() if setting.is_needed), *needed]
    if missing := [name for name in needed if values.get(name) is None]:
        raise ValueError(f"{' and '.join(missing)} must be given in {file or 'a config file'} or as --{missing[0]}")
    values = {name: known[name].checked(value) for name, value in values.items()}
    return tuple(kind(**{name: values[name] for name in settings_of([kind]) if name in values}) for kind in kinds)


def _of_text(text: str, hint: Any) -> Any:
    """What the text of a flag stands for. Text that is no number or boolean where one is expected is left for `as_meant`."""
    kinds = set(kinds_of(hint))
    if Any in kinds:
        return yaml_value(text)
    if text in EMPTY and _takes(hint, EMPTY[text]):
        return EMPTY[text]
    if kinds <= {bool, NoneType}:
        return True if text.lower() in YES else False if text.lower() in NO else text
    if text.startswith(("{", "[")) and any((get_origin(kind) or kind) in (list, dict) for kind in kinds):
        try:
            return json.loads(text)  # PyYAML reads most of JSON, but no pairs of \u surrogates
        except json.JSONDecodeError:
            return yaml_value(text)
    return yaml_value(text) if len(text) > 1 and text[0] in "'\"" and text[0] == text[-1] else text


def _takes(hint: Any, value: Any) -> bool:
    return any(kind is Any or (get_origin(kind) or kind) is type(value) for kind in kinds_of(hint))
