"""The whole loop of LarPO: sample, score, build lists, train, evaluate, and again (arXiv 2502.03699, algorithm 1).

    import larpo
    larpo.align(model="smollm2", prompts="imdb", reward="imdb_sentiment", output_dir="runs/reviews")

is `run(AlignConfig(...))`. Start it again after an interruption, and it goes on. `load_config` reads the same settings from
a YAML file. `python -m larpo.align.demo` is an example that needs no model hub and no GPU.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

from .config import AlignConfig, load_config

if TYPE_CHECKING:
    from .loop import Result

__all__ = ["AlignConfig", "load_config", "run"]


def run(config: AlignConfig, *, progress: bool = True) -> Result:
    """See `larpo.align.loop.run`."""
    from .loop import run

    return run(config, progress=progress)


class _Callable(types.ModuleType):
    """`larpo.align` is this package, and is called as the function that it is about."""

    def __call__(self, config: AlignConfig | None = None, *, progress: bool = True, **settings: Any) -> Result:
        """`run` of a config, or of the settings given by name."""
        if config is not None and settings:
            raise ValueError(f"give either a config or settings by name, got a config and {sorted(settings)}")
        return run(AlignConfig(**settings) if config is None else config, progress=progress)


sys.modules[__name__].__class__ = _Callable
