"""Progress bars of libraries, switched off while we show one of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bars_of_libraries() -> Iterator[None]:
    """Without a bar for every small table that datasets maps and every model that transformers loads."""
    from datasets.utils import logging as of_datasets
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_datasets, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
