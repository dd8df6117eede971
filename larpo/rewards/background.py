"""Coroutines from code that is none: one event loop in a thread, for as long as the process lives."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


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


async def for_each(items: Sequence[T], work: Callable[[T], Awaitable[None]], at_a_time: int) -> None:
    """Does the work for all items, at most so many at a time. After an error no other is begun; those under way are finished,
    so that what was paid for is kept, and the error is raised then."""
    failed: list[Exception] = []
    rest = iter(items)

    async def worker() -> None:
        for item in rest:  # one iterator for all workers
            try:
                await asyncio.create_task(work(item))  # with context variables of its own
            except Exception as error:
                failed.append(error)
            if failed:
                return

    await asyncio.gather(*(worker() for _ in range(min(at_a_time, len(items)))))
    if failed:
        raise failed[0]


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Of this process: the thread of a parent is not there in a fork."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
