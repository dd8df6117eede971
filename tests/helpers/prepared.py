"""Processes that start at once: forked from a server which has imported everything and runs nothing.

One server per test process (of pytest-xdist: per worker), started by the first test that wants such a process.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

IMPORTED = (
    "larpo.align.loop",
    "larpo.align.page",
    "larpo.align.plots",
    "larpo.align.summary",
    "larpo.cli",
    "larpo.commands",
    "larpo.scoring",
    "larpo.trainer",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pyarrow.parquet",
    "tests.helpers.loop_checks",
    "tests.helpers.parallel_checks",
    "tests.helpers.trainer_checks",
    "transformers.models.llama.modeling_llama",
    "tests.helpers.frozen",
)


@functools.cache
def context() -> Any:
    """A context of multiprocessing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(IMPORTED))
    return found


def start(target: Callable, *args: Any) -> BaseProcess:
    """target(*args) in a process of its own; both must be known by import, as in any multiprocessing."""
    process = context().Process(target=target, args=args)
    process.start()
    return process


def run(target: Callable, *args: Any, timeout: float) -> int:
    """The exit code of such a process; a negative number is the signal that killed it."""
    process = start(target, *args)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode
