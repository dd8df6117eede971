"""Which checkpoint of a run can be resumed from."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint-N in folder that was written to its end: its trainer_state.json comes last, and parses."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) is None:
            continue
        with contextlib.suppress(OSError, json.JSONDecodeError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(match[1]), str(path)))
    return max(found)[1] if found else None
