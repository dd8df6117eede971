"""Steps of a long check: each in a process of its own with its own time-out, so that a time limit cuts between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT_OF_TIME = "not run: the time limit was reached"
GRACE_S = 3.0  # between asking a step to end and ending it


@dataclass(frozen=True)
class Step:
    """A command that appends its results to the file named by its last argument, one JSON object a line.

    A row with "ok": false fails the step; so does an exit status other than 0.
    """

    name: str
    what: str
    command: list[str]
    limit_s: float
    least_s: float = 5.0  # with less time left it is not started


def run(steps: Iterable[Step], seconds: float, log: Path, environment: dict[str, str] | None = None) -> Iterator[dict]:
    """Results of the steps as they end: name, status, seconds, message, rows. Nothing a step does stops the next.

    seconds: for all steps. Rows that a step wrote before it was cut are kept. Output goes to the end of `log`.
    """
    end = time.monotonic() + seconds
    for step in steps:
        left = end - time.monotonic()
        if left < step.least_s:
            yield _result(step, "not run", 0.0, OUT_OF_TIME, [])
            continue
        yield _run_one(step, min(left, step.limit_s), log, environment)


def _run_one(step: Step, limit_s: float, log: Path, environment: dict[str, str] | None) -> dict:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("a+") as output:
        file = Path(folder) / "rows"
        output.write(f"\n==== {step.name}: {step.what}\n")
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            [*step.command, str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # so that what it starts ends with it
        )
        try:
            process.wait(limit_s)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)
        rows = read_rows(file)
        output.seek(begin)
        last = (output.read().strip().splitlines() or [""])[-1]
    wrong = [row for row in rows if row.get("ok") is False]
    if wrong:
        status, message = "failed", "; ".join(f"{row.get('what', row)} {row.get('error', '')}".strip() for row in wrong)
    elif timed_out:
        status, message = "cut", f"after {limit_s:.0f} s"
    elif process.returncode:
        status, message = "failed", last or f"exit status {process.returncode}"
    else:
        status, message = "ok", ""
    return _result(step, status, time.monotonic() - start, message[:300], rows)


def _end(process: subprocess.Popen) -> None:
    """The step and everything it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # none of them is left
            os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def _result(step: Step, status: str, seconds: float, message: str, rows: list[dict]) -> dict:
    return {"step": step.name, "what": step.what, "status": status, "seconds": seconds, "message": message, "rows": rows}


def read_rows(file: Path) -> list[dict]:
    """The complete rows of a step, which may have been cut while it wrote one."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def write_rows(rows: Iterator[dict], file: Path, say: Callable[[str], None] = print) -> None:
    """What a step does: each row is on disk before the next is computed."""
    with file.open("a") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")
            out.flush()
            say(json.dumps(row)[:300])
            sys.stdout.flush()
