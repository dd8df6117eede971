"""Two backends, one set of primitives. A backend is a module with

token_logps, token_logps_backward           rows of given logits (one read; one read and one write)
candidate_logps, scores_and_listwise_loss   a few numbers per candidate
scale_rows                                  hidden states times a number per token (one read and one write)
ForwardTiles, Tiles                         tiles of logits formed from hidden x weight (linear/walk.py walks them)

arguments.py says what they take.

`pytorch` (backend="torch") serves every device and dtype; `triton` serves GPUs (and, for tests, CPU tensors in Triton's
interpreter).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

MODULES = {"torch": ".pytorch", "triton": ".triton"}  # a subpackage named torch would hide torch here


@cache  # asked of by every op; imported when needed, as Triton may not be there
def get(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name], __name__)


_HAS_TRITON = importlib.util.find_spec("triton") is not None  # once: the question can't be traced


def has_triton() -> bool:
    return _HAS_TRITON


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def pick(backend: str | None, x: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """The backend to use for tensors like x; the caller's choice if it can serve them. dtype: computed in, by default x's."""
    dtype = x.dtype if dtype is None else dtype
    if backend is None:
        return "triton" if x.is_cuda and dtype != torch.float64 and has_triton() else "torch"
    if backend not in MODULES:
        raise ValueError(f"backend must be None or one of {list(MODULES)}, got {backend!r}")
    if backend == "triton":
        if not has_triton():
            raise ValueError("backend='triton' needs the package triton, which is not installed; 'torch' works everywhere")
        if not (x.is_cuda or interpreting()):
            raise ValueError(
                f"backend='triton' needs tensors on a GPU, got {x.device}; on a CPU use backend='torch' "
                "(or TRITON_INTERPRET=1 in the environment to run the kernels in Triton's interpreter)"
            )
        if dtype == torch.float64:
            raise TypeError("backend='triton' computes in float32, got float64; use backend='torch'")
    return backend
