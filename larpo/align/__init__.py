"""The whole loop of LarPO: sample, score, build lists, train, evaluate, and again (arXiv 2502.03699, algorithm 1).

    import larpo
    larpo.align.run(model="smollm2", prompts="imdb", reward="imdb_sentiment", output_dir="runs/reviews")

Started again after an interruption, a run goes on. `load_config` reads the same settings from a YAML file.
`python -m larpo.align.demo` is an example that needs no model hub and no GPU.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import config as _config
from .config import AlignConfig, load_config

if TYPE_CHECKING:
    from .loop import Result

__all__ = ["AlignConfig", "load_config", "run"]


def run(config: AlignConfig | None = None, *, progress: bool = True, **settings: Any) -> Result:
    """Runs the loop of a config, or of its settings given by name; see `larpo.align.loop.run`."""
    from . import loop

    if config is not None and settings:
        raise ValueError(f"give either a config or settings by name, got a config and {sorted(settings)}")
    return loop.run(AlignConfig(**settings) if config is None else config, progress=progress)


class CallableModule(ModuleType):
    """`larpo.align(...)`, which is short for `larpo.align.run(...)`.

    A function `larpo.align` would be replaced by this package as soon as anything imports from it. So the package itself can be
    called, in the way that Python's data model has for it. Type checkers see this class, which `larpo/__init__.py` names.
    """

    AlignConfig = _config.AlignConfig
    load_config = staticmethod(_config.load_config)
    __call__ = staticmethod(run)
    run = __call__


sys.modules[__name__].__class__ = CallableModule
