"""Coroutines from code that is none: one event loop in a thread, for as long as the process lives."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Coroutine
from typing import Any


def wait_for(coroutine: Coroutine) -> Any:
    """The result of a coroutine.

    All run in one loop, and not each in one of its own, since a client that a judge keeps belongs to the loop in which it was
    first used; and in a thread, since a notebook's own loop is running already.
    """
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop(os.getpid()))
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Of this process: the thread of a parent is not there in a fork."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
