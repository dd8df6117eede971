"""Training on ranked candidate lists, on transformers, accelerate, peft and datasets.

`import larpo` loads none of them: names are looked up when they are used.
"""

from __future__ import annotations

import importlib

_WHERE = {
    "LarPOConfig": "config",
    "LarPOTrainer": "trainer",
    "as_lists": "data",
    "describe": "data.preprocessing",
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

__all__ = sorted([*_WHERE, "align"])

INSTALL = "pip install 'larpo_kernels[train]'"


def __getattr__(name: str):
    if name == "align":  # a package that can be called: larpo.align(...)
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
