"""How much memory a walk takes, and how much is free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from . import tile_shapes

LEAST_SPAN = 256  # rows of a tile that a program of a GPU leaves four sums of (backends/triton/launch.py: tile_span)
PACKED_BYTES = 1 << 20  # oneDNN packs an operand of a bf16 product for AMX: 0.2 to 0.9 MB were seen, below the tile's own size


@dataclass(frozen=True)
class Needs:
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def parameters(self) -> bool:
        return self.weight or self.bias


@dataclass(frozen=True)
class Workload:
    """The sizes and dtypes of a call, which its memory follows from."""

    num_tokens: int  # that are walked
    hidden_size: int
    vocab_size: int  # rows of the weight
    needs: Needs
    given: tuple[torch.dtype, torch.dtype]  # dtypes of hidden and weight
    dtype: torch.dtype  # of the tiles
    stored: torch.dtype  # of E where it is held
    device: torch.device
    whole_vocab_size: int | None = None  # of all ranks, where they share the vocabulary

    @property
    def sums(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def held_bytes(self) -> int:
        """Of E, all of it."""
        return self.vocab_size * self.num_tokens * self.stored.itemsize


def working_bytes(work: Workload, tile: tuple[int, int]) -> int:
    """The most that a walk has allocated at a time, whatever it keeps: forward or backward, each with one tile."""
    (tokens, rows), (hidden, weight), dtype = tile, work.given, work.dtype
    states, block, slab = work.num_tokens * work.hidden_size, tokens * work.hidden_size, rows * work.hidden_size
    both = dtype.itemsize * tokens * rows + hidden.itemsize * states  # a tile, and the tokens that count
    both += dtype.itemsize * block * int(hidden != dtype)
    both += dtype.itemsize * slab * int(weight != dtype)
    if dtype == torch.bfloat16:
        both += dtype.itemsize * tokens * -(-work.vocab_size // tile_shapes.seen_step(work.vocab_size))
        both += min(dtype.itemsize * tokens * rows, PACKED_BYTES)
    spans = 4 * 4 * tokens * -(-rows // LEAST_SPAN) if work.device.type == "cuda" else 0  # while a tile is formed
    return both + max(spans, _backward_bytes(work, tile))


def _backward_bytes(work: Workload, tile: tuple[int, int]) -> int:
    """What a backward takes beside the tile: sums, and one product on its way into a sum."""
    (tokens, rows), (hidden, weight), dtype, sums = tile, work.given, work.dtype, work.sums
    needs, block, slab = work.needs, tokens * work.hidden_size, rows * work.hidden_size
    product = dtype.itemsize * block * int(sums != dtype)
    backward = 0
    if needs.hidden and needs.parameters:
        backward += sums.itemsize * block + hidden.itemsize * work.num_tokens * work.hidden_size  # a block's sum, the result
    if needs.weight:
        backward += dtype.itemsize * block  # hidden states times what each token weighs
        if tokens < work.num_tokens:
            if weight != sums:
                backward += sums.itemsize * work.vocab_size * work.hidden_size  # d weight is summed over blocks of tokens
            product = max(product, dtype.itemsize * slab * int(sums != dtype))
        else:
            product = max(product, dtype.itemsize * slab * int(weight != dtype))
        product = max(product, sums.itemsize * block)
    if needs.bias and sums != dtype:
        product = max(product, sums.itemsize * min(tokens * rows, widened_entries(work.device)))
    return backward + product


def widened_entries(device: torch.device) -> int:
    """Of a tile in half precision, brought to float32 at a time where a sum over tokens must not be rounded."""
    return 1 << 26 if device.type == "cuda" else 1 << 19


def tail_bytes(work: Workload, tile: tuple[int, int]) -> int:
    """What a tail takes beside `working_bytes`: the rows of a tile that are gathered, their d weight, the rest of a block."""
    (tokens, rows), n = tile, work.num_tokens
    slab = rows * work.hidden_size
    gathered = work.dtype.itemsize * (tokens * rows + slab) + work.given[1].itemsize * slab
    return gathered + work.sums.itemsize * (slab + n + -(-n // max(tokens, 1)) * work.hidden_size)


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation could get now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        stats = torch.cuda.memory_stats_as_nested_dict(device)  # memory_reserved and memory_allocated sort all of it, each
        reserved, allocated = (stats[name]["all"]["current"] for name in ("reserved_bytes", "allocated_bytes"))
        return free + reserved - allocated
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 1 << 30
    return min(free, container_bytes(free))


def container_bytes(otherwise: int, folder: str = "/sys/fs/cgroup") -> int:
    """What the limit of a container (cgroup v2) leaves; `otherwise` where there is none."""
    try:
        most, used, parts = (Path(folder, f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        files = next(int(line.split()[1]) for line in parts.splitlines() if line.startswith("file "))  # given up if needed
        return otherwise if most.strip() == "max" else max(0, int(most) - int(used) + files)
    except (OSError, ValueError, StopIteration):
        return otherwise
