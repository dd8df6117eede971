"""One process, or one job of several, at a time in a folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

MOMENT = 0.2  # seconds: `is_locked` may hold the lock for so long


def is_locked(folder: Path) -> bool | None:
    """Whether a process is at work in `folder`; None where that can't be told. To find out takes the lock for a moment."""
    from filelock import FileLock, Timeout

    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except (NotImplementedError, OSError):  # some network file systems; a folder that only others may write to
        return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The lock that a run holds while it works in `folder`. It ends with the process that took it, even if that is killed.

    Raises ValueError if another run has it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=MOMENT)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{str(folder)!r}: another process is at work in this folder") from None
    except NotImplementedError:  # some network file systems
        logger.warning("%s is on a file system without locks: see to it that no other run is at work in it", folder)
    try:
        yield
    finally:
        lock.release()
