"""Facts of data sets in a file of JSON, by their names: {"train": {"lists": 500, ...}, ...}."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .facts import DataSummary

FILE = "larpo-data.json"  # in output_dir, beside larpo-job.json


def write_summaries(folder: Path, summaries: Mapping[str, DataSummary], *, examples: bool = True) -> None:
    """Writes FILE in the folder. examples: False leaves out the lists that are shown, where the folder is made public."""
    from ...runs.files import write_json

    kept = summaries if examples else {name: dataclasses.replace(one, examples=()) for name, one in summaries.items()}
    write_json(folder / FILE, as_json(kept))


def as_json(summaries: Mapping[str, DataSummary]) -> dict[str, Any]:
    return {name: one.to_json() for name, one in summaries.items()}


def read_summaries(path: Path) -> dict[str, DataSummary]:
    """Raises Damaged, a ValueError, for a file that does not hold what was written there."""
    from ...runs.files import read_json
    from ...runs.intact import Damaged

    found = read_json(path)
    try:
        if not isinstance(found, Mapping):
            raise ValueError("expected an object of summaries by name")
        return {name: DataSummary.from_json(one) for name, one in found.items()}
    except (TypeError, KeyError, ValueError) as error:
        raise Damaged(path, f"it holds no summary of data ({error})") from None
