"""A training that diverged is remembered in its folder: started again as it was, it would diverge again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..runs.files import read_json, remove, write_json
from ..runs.identity import changed
from ..runs.ranks import ALONE, Ranks
from .nonfinite import NonFiniteError

FILE = "diverged.json"  # why, and of which run


@contextlib.contextmanager
def remembered(folder: Path, run: Mapping[str, Any], ranks: Ranks = ALONE) -> Iterator[None]:
    """Put around a training and the writing of its result: a NonFiniteError that ends it is recorded in the folder's FILE, by
    the first of the processes that train.

    run: the settings that identify the training.

    Raises ValueError where the same training has diverged before.
    """
    file = folder / FILE

    def refuse_again() -> None:
        before = read_json(file) if file.is_file() else None
        if before is not None and not changed(before["run"], run):
            raise ValueError(
                f"the training in {str(folder)!r} has diverged before: {before['why']}. To try again all the same, from the "
                f"last checkpoint if there is one, delete {file}"
            )
        remove(file)

    ranks.first(refuse_again)
    try:
        yield
    except NonFiniteError as error:  # which all processes raise
        if ranks.is_first:
            write_json(file, {"why": str(error), "run": dict(run)})
        raise
