"""Lists of answers on their way from a file to a batch: loading, validation, chat templates, tokens, collation.

The names that a user needs are those of `larpo`; `larpo.data.load_lists` and its neighbours are the same functions, loaded
when they are used, because they need the package datasets and most modules here do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loading import Reading, as_lists, check_row, from_candidate_lists, load_lists, read_lists

__all__ = ["Reading", "as_lists", "check_row", "from_candidate_lists", "load_lists", "read_lists"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'larpo.data' has no attribute {name!r}")
    return getattr(importlib.import_module(".loading", __name__), name)
