"""One text for each setting: what the section Args of a dataclass's docstring says is what `--help` prints."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import TypeVar

T = TypeVar("T", bound=type)


def documented(cls: T) -> T:
    """Gives every field of a dataclass the text under its name in the docstring as `metadata["help"]`, and the docstring the
    field's type and default, for `help(cls)`. Fields that it inherits are left alone.

    >>> from dataclasses import dataclass
    >>> @documented
    ... @dataclass
    ... class Settings:
    ...     '''What a run is.
    ...
    ...     Args:
    ...         beta: Scale of the implicit reward, > 0.
    ...     '''
    ...
    ...     beta: float = 0.1
    >>> fields(Settings)[0].metadata["help"], Settings.__doc__.splitlines()[-1].strip()
    ('Scale of the implicit reward, > 0.', 'beta (float, default 0.1): Scale of the implicit reward, > 0.')
    """
    doc = inspect.cleandoc(cls.__doc__ or "")
    for name, kind in inspect.get_annotations(cls).items():
        one = next(field for field in fields(cls) if field.name == name)
        found = re.search(rf"^    {name}: (.+(?:\n {{8}}.+)*)", doc, re.M)
        if found is None:
            continue
        one.metadata = MappingProxyType({**one.metadata, "help": " ".join(found[1].split())})
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        default = "" if one.default is MISSING else f", default {one.default!r}"
        doc = doc.replace(f"\n    {name}: ", f"\n    {name} ({kind}{default}): ", 1)
    cls.__doc__ = doc
    return cls
