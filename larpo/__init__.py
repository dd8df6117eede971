"""Training on ranked candidate lists, on transformers, accelerate, peft and datasets.

`import larpo` loads none of them: names are looked up when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .align import CallableModule
    from .candidates import Candidate, PromptList
    from .config import LarPOConfig
    from .data import as_lists, from_candidate_lists, load_lists
    from .data.tokenization import tokenize_lists
    from .sampling import TransformersSampler, VLLMSampler
    from .scoring import score_lists
    from .trainer import LarPOTrainer
    from .training.metrics import list_metrics
    from .training.preprocessing import describe

    align: CallableModule

_WHERE = {
    "LarPOConfig": "config",
    "LarPOTrainer": "trainer",
    "as_lists": "data",
    "describe": "training.preprocessing",
    "from_candidate_lists": "data",
    "load_lists": "data",
    "tokenize_lists": "data.tokenization",
    "list_metrics": "training.metrics",
    "score_lists": "scoring",
    "Candidate": "candidates",
    "PromptList": "candidates",
    "TransformersSampler": "sampling",
    "VLLMSampler": "sampling",
}

__all__ = [
    "Candidate",
    "LarPOConfig",
    "LarPOTrainer",
    "PromptList",
    "TransformersSampler",
    "VLLMSampler",
    "align",
    "as_lists",
    "describe",
    "from_candidate_lists",
    "list_metrics",
    "load_lists",
    "score_lists",
    "tokenize_lists",
]

INSTALL = "pip install 'larpo_kernels[train]'"


def __getattr__(name: str):
    if name == "align":
        return importlib.import_module(".align", __name__)
    if name not in _WHERE:
        raise AttributeError(f"module 'larpo' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("larpo"):
            raise
        raise ImportError(f"larpo.{name} needs {error.name}: {INSTALL}") from error


def __dir__():
    return sorted([*globals(), *__all__])
