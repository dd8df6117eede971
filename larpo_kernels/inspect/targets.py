"""The GPUs kernels are compiled for: what one multiprocessor has, and how many warps of a kernel fit on it.

Limits are the vendors': CUDA programming guide, table "Technical specifications per compute capability"; AMD Instinct
MI300 ISA guide and LLVM's AMDGPU usage guide. On AMD a warp is a wavefront and a multiprocessor a compute unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

QUARTERS = 4  # each multiprocessor has four schedulers, with a register file each
REGISTERS = 512  # 32-bit registers per lane in a quarter's file
REGISTER_STEP = 8  # registers are given to a thread in steps of this many


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    warps: int  # most warps on a multiprocessor
    blocks: int  # most programs on a multiprocessor
    shared_per_sm: int  # bytes
    shared_per_block: int  # bytes a program may ask for
    shared_reserved: int  # bytes the system takes for each program


KB = 1024
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 64, 32, 164 * KB, 163 * KB, KB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 64, 32, 228 * KB, 227 * KB, KB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 64, 32, 228 * KB, 227 * KB, KB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 32, 32, 64 * KB, 64 * KB, 0),
}


@dataclass(frozen=True)
class Occupancy:
    warps: int  # resident on a multiprocessor, if there are programs enough
    most: int  # the target's limit
    limit: str  # what is used up first: "warps", "registers", "shared memory" or "programs"


def occupancy(target: Target, registers: int, shared: int, warps: int) -> Occupancy:
    """An estimate for programs of `warps` warps with `registers` per thread and `shared` bytes; SGPRs are not counted."""
    step = REGISTER_STEP
    per_quarter = REGISTERS // max(-(-registers // step) * step, step)
    programs = {
        "warps": target.warps // warps,
        "registers": QUARTERS * per_quarter // warps,
        "programs": target.blocks,
    }
    if shared + target.shared_reserved:
        programs["shared memory"] = target.shared_per_sm // (shared + target.shared_reserved)
    limit = min(programs, key=programs.__getitem__)
    return Occupancy(programs[limit] * warps, target.warps, limit)
