"""Launch parameters, one table. Every entry says where it came from; nothing is tuned at import or at the first call.

`origin` is "derived" (from register counts and load widths of cross-compiled code) until a card has been measured; a
measured entry names card and date.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache

import torch
from triton.runtime import driver


@dataclass(frozen=True)
class Launch:
    row_block: int  # columns per step of the row kernels
    row_warps: int
    row_registers: int  # of a thread that sums aligned rows in half precision: with 64, 32 warps live on a multiprocessor
    split_columns: int  # rows of more than two of these are summed in parts. By row length only, so that results do not
    # depend on the batch
    row_programs: int  # rows are shared by several programs until there are so many: no sum depends on it
    tile_span: int  # vocabulary rows per program of the tile kernel
    tile_rows: int  # of them per step
    tile_tokens: int  # tokens per program of the tile kernel
    tile_warps: int
    origin: str


# sm_90: each group of values was timed with the others as they were, the chosen ones not yet all together; split_columns
# by calls of many rows, for which 32768 took 0.96 of the time of 8192, and not by those of 4 rows, for which it took 1.4.
TABLE = {
    "sm_80": Launch(4096, 8, 128, 16384, 4096, 256, 16, 256, 4, "derived"),
    "sm_90": Launch(4096, 8, 64, 32768, 4096, 512, 16, 256, 4, "measured, NVIDIA H100 80GB HBM3, 2026-11-26"),
    "sm_100": Launch(4096, 8, 64, 16384, 4096, 256, 16, 256, 4, "derived"),
    "gfx942": Launch(4096, 8, 128, 16384, 4096, 256, 16, 256, 4, "derived"),
}
INTERPRETER = Launch(64, 1, 128, 128, 16, 32, 8, 16, 1, "small, so that tests cross every boundary")


def for_tensor(x: torch.Tensor) -> Launch:
    if x.is_meta:
        arch = _absent_gpu().arch
        return TABLE[arch if isinstance(arch, str) else f"sm_{arch}"]
    return for_device(x.device.index) if x.is_cuda else INTERPRETER


@cache
def for_device(index: int | None) -> Launch:
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        return TABLE.get(name, TABLE["gfx942"])
    major, _ = torch.cuda.get_device_capability(index)
    return TABLE["sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"]


def options(x: torch.Tensor, warps: int = 4, registers: int | None = None) -> dict:
    """Launch options for tensors like x.

    registers: that a thread may take. Left alone, ptxas spills a few to fit more warps on a multiprocessor.
    """
    chosen = {"num_warps": warps, "enable_fp_fusion": True}  # multiply-adds: later Tritons fuse only where asked to
    nvidia = _absent_gpu().backend == "cuda" if x.is_meta else x.is_cuda and not torch.version.hip
    if registers is not None and nvidia:
        chosen["maxnreg"] = registers
    return chosen


def _absent_gpu():
    """What tensors without data are launched for: larpo_kernels.inspect sets Triton's driver to stand for a GPU."""
    return driver.active.get_current_target()


def on_device(x: torch.Tensor):
    """Kernels start on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
