"""Calls of this package's registered ops, kept as they are made, for torch.library's checks."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of an op of this package."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "larpo_kernels":
            copies = tree_map(_copy_of, (args, kwargs or {}))
            self.calls.setdefault(op, []).append(copies)
        return op(*args, **(kwargs or {}))


def _copy_of(x):
    """A copy that asks for a gradient if one was being tracked: backward ops get none."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().clone().requires_grad_(x.requires_grad and torch.is_grad_enabled())


def opcheck(op, calls, most=None):
    """torch.library.opcheck of one call for each set of shapes and dtypes, of `most` at most."""
    seen = {}
    for args, kwargs in calls:
        shapes = tree_map(lambda x: (x.shape, x.dtype, x.requires_grad) if isinstance(x, torch.Tensor) else x, args)
        seen.setdefault(str(shapes), (args, kwargs))
    for args, kwargs in list(seen.values())[:most]:
        torch.library.opcheck(op, args, kwargs)
