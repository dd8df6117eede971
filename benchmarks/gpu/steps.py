"""Steps of a long check: each in a process of its own with its own time-out, so that a time limit cuts between them.

A process needs seconds to import torch. A step that `waits` imports, then waits for a line on its standard input before it
touches the GPU: it is started while others measure, and told to go when they have ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT_OF_TIME = "not run: the time limit was reached"
GRACE_S = 3.0  # between asking a step to end and ending it
AHEAD = 2  # steps that import while another runs
GO = "go"


@dataclass(frozen=True)
class Step:
    """A command that appends its results to the file that run() is given, one JSON object {"step": its name, ...} a line.

    A row with "ok": false fails the step; so does an exit status other than 0.
    """

    name: str
    what: str
    command: list[str]
    limit_s: float
    least_s: float = 5.0  # with less time left it is not started
    reserved_s: float = 0.0  # seconds that those before it leave
    beside: bool = False  # runs at the same time as the step before it
    waits: bool = False  # see above
    environment: dict[str, str] = field(default_factory=dict)


def run(steps: Sequence[Step], seconds: float, rows: Path, log: Path, start: Callable | None = None) -> Iterator[dict]:
    """Results of the steps as they end: name, status, seconds, message, rows. Nothing a step does stops the next.

    seconds: for all steps. rows: the file that steps append to; what a step wrote before it was cut is kept. What steps print
    goes to the end of `log`. start(step, output) -> a process; default: the step's command.
    """
    end, started, running, start = time.monotonic() + seconds, {}, [], start or popen
    try:
        for first, batch in _batches(steps):
            later = steps[first + len(batch) :]
            left = end - time.monotonic() - sum(step.reserved_s for step in later)
            running = []
            for step in batch:
                if left < step.least_s:
                    yield _result(step, "not run", 0.0, OUT_OF_TIME, [])
                else:
                    running.append(started.pop(step.name, None) or Running(step, start))
                    running[-1].go(min(left, step.limit_s))
            for step in later[:AHEAD]:
                if running and step.waits and step.name not in started:
                    started[step.name] = Running(step, start)
            while running:
                for one in [one for one in running if one.over()]:
                    running.remove(one)
                    yield one.result(rows, log)
                time.sleep(0.02)
    finally:
        for one in [*started.values(), *running]:
            one.end()


def _batches(steps: Sequence[Step]) -> Iterator[tuple[int, list[Step]]]:
    """(index of the first, steps that run at the same time)."""
    first = 0
    while first < len(steps):
        last = first + 1
        while last < len(steps) and steps[last].beside:
            last += 1
        yield first, list(steps[first:last])
        first = last


def popen(step: Step, output) -> subprocess.Popen:
    return subprocess.Popen(
        step.command,
        stdin=subprocess.PIPE if step.waits else subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, **step.environment},
        start_new_session=True,  # so that what it starts ends with it
    )


class Running:
    """A step's process, from its start to its result."""

    def __init__(self, step: Step, start: Callable):
        self.step, self.output = step, tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by result()
        self.process, self.cut = start(step, self.output), False

    def go(self, limit_s: float) -> None:
        self.begin, self.limit_s = time.monotonic(), limit_s
        if self.step.waits:
            with suppress(OSError):  # it has died already
                self.process.stdin.write(f"{GO}\n".encode())
                self.process.stdin.close()

    def over(self) -> bool:
        if self.process.poll() is not None:
            return True
        self.cut = time.monotonic() - self.begin > self.limit_s
        return self.cut

    def end(self) -> None:
        """The step and everything it started."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):  # none of them is left
                os.killpg(self.process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)

    def result(self, rows: Path, log: Path) -> dict:
        self.end()
        seconds = time.monotonic() - self.begin
        self.output.seek(0)
        text = self.output.read()
        self.output.close()
        with log.open("a") as file:
            file.write(f"\n==== {self.step.name}: {self.step.what}\n{text}")
        found = read_rows(rows, self.step.name)
        wrong = [row for row in found if row.get("ok") is False]
        if wrong:
            status, message = "failed", "; ".join(f"{row.get('what', row)} {row.get('error', '')}".strip() for row in wrong)
        elif self.cut:
            status, message = "cut", f"after {self.limit_s:.0f} s"
        elif self.process.returncode:
            last = (text.strip().splitlines() or [""])[-1]
            status, message = "failed", last or f"exit status {self.process.returncode}"
        else:
            status, message = "ok", ""
        return _result(self.step, status, seconds, message[:300], found)


def _result(step: Step, status: str, seconds: float, message: str, rows: list[dict]) -> dict:
    return {"step": step.name, "what": step.what, "status": status, "seconds": seconds, "message": message, "rows": rows}


def read_rows(file: Path, step: str) -> list[dict]:
    """The complete rows of a step, which may have been cut while it wrote one."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if row.pop("step", None) == step:
                rows.append(row)
    return rows


def write_rows(rows: Iterator[dict], file: Path, step: str, say: Callable[[str], None] = print) -> None:
    """What a step does: each row is on disk before the next is computed. Several steps may write to one file."""
    out = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        for row in rows:
            os.write(out, (json.dumps({"step": step, **row}) + "\n").encode())  # whole, whoever else writes
            say(json.dumps(row)[:300])
            sys.stdout.flush()
    finally:
        os.close(out)


def wait_to_go(stream) -> None:
    """Waits for the line that lets the step begin; exits if the stream ends without it."""
    if stream.readline().strip() != GO:
        sys.exit("not told to go")
