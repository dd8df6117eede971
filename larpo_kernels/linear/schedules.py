"""Schedules: what the walk over hidden x weight (walk.py) keeps for the backward, what it costs, and which to take.

    score_only    nothing                                                              1 GEMM
    frozen_head   E^T W, summed up at once: the gradient of hidden up to c             2 GEMMs
    list_hold     E, in half precision where the operands are: backward is GEMMs only  3 GEMMs
    recompute     k and s; backward forms E again                                      4 GEMMs

E of some of the vocabulary may be held and the rest formed again: `auto` does so when the budget allows only a part.
"""

from __future__ import annotations

import functools
import math
import os
import platform
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

SCHEDULES = ("auto", "score_only", "frozen_head", "list_hold", "recompute")


@dataclass(frozen=True)
class Plan:
    """A schedule and what it costs. `print(plan(...))` shows it in one line."""

    schedule: str
    reason: str
    gemms: float  # GEMMs of tokens x hidden x vocabulary, forward and backward together
    extra_bytes: int  # memory beyond the inputs, their gradients and one number per token
    held_rows: int = 0  # vocabulary rows whose E is held for the backward
    tail_threshold: float | None = None  # gradients of the rows that some token gives more; the figures above are then bounds
    tail_tile: tuple[int, int] | None = None  # tokens and rows of a tile then
    note: str = ""  # what the caller may not expect
    one_tile: bool = False  # all logits are formed at once (ops/small_linear.py) and held for the backward
    if_flat: Plan | None = field(default=None, repr=False)  # what is done where a few tokens show no tail (flat.py)

    def __str__(self) -> str:
        held = f", E of {self.held_rows} vocabulary rows held" if self.held_rows else ""
        text = f"{self.schedule}: {self.gemms:.2g} GEMMs, {self.extra_bytes / 2**20:.1f} MiB extra{held} ({self.reason})"
        text += f"; {self.note}" if self.note else ""
        if self.tail_threshold is None:
            return text
        return (
            f"{text}; all but the first GEMM, and what is held, only of the rows that some token of a block gives "
            f"more than {self.tail_threshold:.2g}" + ("; of all rows where logits are flat" if self.if_flat else "")
        )


FLOAT16_ON_A_GPU = "SLOW: float16 is multiplied in float32 on a GPU, without tensor cores; bfloat16 is many times faster"


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def parameters(self) -> bool:
        return self.weight or self.bias


def make_plan(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    needs: Needs,
    given: tuple[torch.dtype, torch.dtype],
    dtype: torch.dtype,
    stored: torch.dtype,
    device: torch.device,
    schedule: str = "auto",
    memory_budget: int | None = None,
    tail_threshold: float | None = None,
    whole_vocab_size: int | None = None,
) -> Plan:
    """Picks a schedule by what needs a gradient, sizes and budget; checks one that the caller picked.

    given: dtypes of hidden and weight; dtype: of the tiles; stored: of E where it is held; whole_vocab_size: of all ranks
    that share the vocabulary. What they do together, block of tokens after block, must not depend on a rank's own rows.
    """
    options = (
        num_tokens, hidden_size, vocab_size, needs, given, dtype, stored, device, schedule, memory_budget,
    )  # fmt: skip
    plan = _make_plan(*options, tail_threshold, whole_vocab_size)
    if plan.tail_threshold is None or num_tokens < FLAT_TOKENS:
        return plan
    exact = _make_plan(*options, None, whole_vocab_size)
    extra = max(plan.extra_bytes, exact.extra_bytes, few_bytes(vocab_size, dtype))
    return replace(plan, extra_bytes=extra, if_flat=exact)


def _make_plan(
    num_tokens, hidden_size, vocab_size, needs, given, dtype, stored, device, schedule, memory_budget, tail_threshold,
    whole_vocab_size,
) -> Plan:  # fmt: skip
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if memory_budget is not None and (
        isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 0
    ):
        raise ValueError(f"memory_budget must be None or a number of bytes >= 0, got {memory_budget!r}")
    slow = device.type == "cuda" and torch.float16 in given and dtype == torch.float32
    planned = functools.partial(Plan, note=FLOAT16_ON_A_GPU if slow else "")
    shared = whole_vocab_size is not None
    whole_vocab_size = whole_vocab_size or vocab_size
    if whole_vocab_size * hidden_size < TAIL_HEAD or hidden_size < tail_width(needs, dtype, device):
        tail_threshold = None
    in_place = stored == dtype
    if tail_threshold is None:
        casts = given[1] != dtype
        shape = functools.partial(tile_shape, num_tokens, hidden_size, vocab_size, dtype, device, casts=casts)
        usual, of_one_pass, of_held = shape(), shape(one_pass=not shared), shape(in_place=in_place and not shared)
        tail = {}
    else:
        tokens = tail_tokens(num_tokens, whole_vocab_size, dtype, device)
        usual = of_one_pass = of_held = tile_shape(tokens, hidden_size, vocab_size, dtype, device)
        tail = {"tail_threshold": tail_threshold, "tail_tile": usual}

    def working(tile: tuple[int, int]) -> int:
        size = working_bytes(num_tokens, hidden_size, vocab_size, tile, needs, given, dtype, device)
        return size + tail_bytes(num_tokens, hidden_size, tile, given, dtype) if tail else size

    (_, rows), tile = usual, working(usual)
    held = vocab_size * num_tokens * stored.itemsize
    whole = working(of_held) + held
    if in_place and not tail:
        whole -= math.prod(of_held) * dtype.itemsize  # tiles are formed where they stay
    wanted = sum((needs.hidden, needs.weight))

    if schedule == "score_only" and (needs.hidden or needs.parameters):
        raise ValueError("schedule='score_only' keeps nothing for a backward, but a gradient is needed: detach, or use 'auto'")
    if schedule == "frozen_head" and needs.parameters:
        raise ValueError("schedule='frozen_head' gives no gradient to weight or bias, but one requires grad: use 'auto'")
    if not (needs.hidden or needs.parameters):
        return planned("score_only", "nothing requires grad", 1, tile)
    if schedule == "list_hold":
        return planned("list_hold", "asked for", 1 + wanted, whole, vocab_size, **tail)
    if schedule == "recompute":
        return planned("recompute", "asked for", 2 + wanted, tile, **tail)
    if not needs.parameters:
        once = working(of_one_pass) + 4 * num_tokens * hidden_size
        return planned("frozen_head", "only hidden requires grad", 2, once, **tail)
    budget, source = (
        (memory_budget, "memory_budget") if memory_budget is not None else (free_bytes(device) // 2, "half of free memory")
    )
    source = f"{source} = {budget / 2**20:.0f} MiB"
    if budget >= whole:
        return planned("list_hold", f"all E fits {source}", 1 + wanted, whole, vocab_size, **tail)
    part = min(max(budget - tile, 0) // max(num_tokens * stored.itemsize, 1), vocab_size - 1) // rows * rows
    share = part / vocab_size
    reason = f"E would take {held / 2**20:.0f} MiB, {source}"
    extra = tile + part * num_tokens * stored.itemsize
    return planned("recompute", reason, 2 + wanted - share, extra, part, **tail)


LEAST_SPAN = 256  # rows of a tile that a program of a GPU leaves four sums of (backends/triton/launch.py: tile_span)
PACKED_BYTES = 1 << 20  # oneDNN packs an operand of a bf16 product for AMX: 0.2 to 0.9 MB were seen, below the tile's own size


def working_bytes(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    tile: tuple[int, int],
    needs: Needs,
    given: tuple[torch.dtype, torch.dtype],
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """The most that a walk has allocated at a time, whatever it keeps: forward or backward, each with one tile."""
    (tokens, rows), (hidden, weight) = tile, given
    sums = torch.promote_types(dtype, torch.float32)
    states, block, slab = num_tokens * hidden_size, tokens * hidden_size, rows * hidden_size
    both = dtype.itemsize * tokens * rows + hidden.itemsize * states  # a tile, and the tokens that count
    both += dtype.itemsize * block * int(hidden != dtype)
    both += dtype.itemsize * slab * int(weight != dtype)
    if dtype == torch.bfloat16:
        both += dtype.itemsize * tokens * -(-vocab_size // seen_step(vocab_size))
        both += min(dtype.itemsize * tokens * rows, PACKED_BYTES)
    product = dtype.itemsize * block * int(sums != dtype)  # of a tile, on its way into a sum
    backward = 0
    if needs.hidden and needs.parameters:
        backward += sums.itemsize * block + hidden.itemsize * states  # a block's sum, all of the result
    if needs.weight:
        backward += dtype.itemsize * block  # hidden states times what each token weighs
        if tokens < num_tokens:
            if weight != sums:
                backward += sums.itemsize * vocab_size * hidden_size  # d weight is summed over blocks of tokens
            product = max(product, dtype.itemsize * slab * int(sums != dtype))
        else:
            product = max(product, dtype.itemsize * slab * int(weight != dtype))
        product = max(product, sums.itemsize * block)
    if needs.bias and sums != dtype:
        product = max(product, sums.itemsize * min(tokens * rows, widened_entries(device)))
    spans = 4 * 4 * tokens * -(-rows // LEAST_SPAN) if device.type == "cuda" else 0  # while a tile is formed
    return both + max(spans, backward + product)


def widened_entries(device: torch.device) -> int:
    """Of a tile in half precision, brought to float32 at a time where a sum over tokens must not be rounded."""
    return 1 << 26 if device.type == "cuda" else 1 << 19


def tail_bytes(
    num_tokens: int, hidden_size: int, tile: tuple[int, int], given: tuple[torch.dtype, torch.dtype], dtype: torch.dtype
) -> int:
    """What a tail takes beside `working_bytes`: the rows of a tile that are gathered, their d weight, the rest of a block."""
    tokens, rows = tile
    sums, slab = torch.promote_types(dtype, torch.float32), rows * hidden_size
    gathered = dtype.itemsize * (tokens * rows + slab) + given[1].itemsize * slab
    return gathered + sums.itemsize * (slab + num_tokens + -(-num_tokens // max(tokens, 1)) * hidden_size)


def one_tile_plan(hidden, weight, num_tokens: int, needs: Needs, compute: torch.dtype) -> Plan | None:
    """Of a call whose logits are one tile on a CPU: they are formed and held as they are. None if they are more, or bfloat16,
    which would round what is not centred."""
    (h, v), size = (hidden.shape[-1], weight.shape[0]), compute.itemsize
    if compute == torch.bfloat16 or tile_shape(num_tokens, h, v, compute, hidden.device) != (num_tokens, v):
        return None
    extra = 2 * num_tokens * v * size  # the logits, and E or their gradient
    extra += num_tokens * h * (size * int(hidden.dtype != compute) + hidden.dtype.itemsize)
    extra += v * h * size * int(weight.dtype != compute)
    if not (needs.hidden or needs.parameters):
        return Plan("score_only", "nothing requires grad", 1, extra, one_tile=True)
    if not needs.parameters:
        return Plan("frozen_head", "only hidden requires grad", 2, extra, one_tile=True)
    return Plan("list_hold", "all logits fit one tile", 1 + sum((needs.hidden, needs.weight)), extra, v, one_tile=True)


def plan_for(
    hidden, weight, bias, num_tokens, schedule, memory_budget, tail_threshold=None, whole_vocab_size=None, one_tile=False
) -> Plan:
    """`make_plan` for the tensors of a call, num_tokens of which count.

    whole_vocab_size: where weight is one rank's rows. one_tile: nothing but their size stands against forming all logits.
    """
    enabled = torch.is_grad_enabled()
    wants = lambda x: enabled and x is not None and x.requires_grad  # noqa: E731
    needs = Needs(wants(hidden), wants(weight), wants(bias))
    if is_recorded(hidden):
        tail_threshold = None  # how many rows count is known to the device alone
        if schedule == "auto":  # free memory and the number of tokens belong to a run, not to a graph
            schedule = "recompute" if needs.parameters else "frozen_head" if needs.hidden else "score_only"
    compute = dtype_of_tiles(hidden, weight, sharded=whole_vocab_size is not None)
    small = tail_threshold is None or weight.numel() < TAIL_HEAD
    if one_tile and small and schedule == "auto" and memory_budget is None:
        plan = one_tile_plan(hidden, weight, num_tokens, needs, compute)
        if plan is not None:
            return plan
    return make_plan(
        walked_tokens(num_tokens), hidden.shape[-1], weight.shape[0], needs, (hidden.dtype, weight.dtype), compute,
        stored_dtype(compute, hidden.dtype), hidden.device, schedule, memory_budget, tail_threshold,
        whole_vocab_size,
    )  # fmt: skip


def is_recorded(x: torch.Tensor) -> bool:
    """Whether what runs is recorded, to be played on other values: torch.compile, or a CUDA graph that is captured."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


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


def _cpu_has_bf16() -> bool:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


CPU_HAS_BF16 = _cpu_has_bf16()  # once: the question can't be traced


SMALL_HEAD = 1 << 18  # elements of a weight below which float32 GEMMs cost nothing that is noticed


def native_bf16(device_type: str, head_size: int = SMALL_HEAD) -> bool:
    """Whether bf16 GEMMs are worth their rounding: they run on bf16 hardware (elsewhere they are many times slower than
    float32 ones), and there is more to do than for a head of few elements, where sums average no rounding out either."""
    return head_size >= SMALL_HEAD and (CPU_HAS_BF16 or device_type != "cpu")


def compute_dtype(hidden: torch.dtype, weight: torch.dtype, device_type: str, head_size: int = SMALL_HEAD) -> torch.dtype:
    """Dtype of the GEMM operands and tiles: bfloat16 where asked for and native, float64 where given, else float32.

    head_size: elements of the weight; of one that is cut over ranks left out, since all ranks need one answer. Tiles of
    the weight are brought to this dtype one at a time. float16 computes in float32: E spans more than its range.
    """
    if torch.float64 in (hidden, weight):
        return torch.float64
    asked = {hidden, weight}
    if torch.is_autocast_enabled(device_type):
        asked.add(torch.get_autocast_dtype(device_type))
    return torch.bfloat16 if torch.bfloat16 in asked and native_bf16(device_type, head_size) else torch.float32


def dtype_of_tiles(hidden: torch.Tensor, weight: torch.Tensor, sharded: bool) -> torch.dtype:
    """`compute_dtype` for the tensors of a call."""
    return compute_dtype(hidden.dtype, weight.dtype, hidden.device.type, SMALL_HEAD if sharded else weight.numel())


def stored_dtype(compute: torch.dtype, hidden: torch.dtype) -> torch.dtype:
    """Dtype in which E is held: half precision if the hidden states are bfloat16 (E outgrows float16's range)."""
    return torch.bfloat16 if hidden == torch.bfloat16 else compute


# A tile at most. Up to so many tokens every slice of d weight is one GEMM over all of them, and nothing is added up.
CPU_TILE_BYTES, CPU_TILE_TOKENS = 8 << 20, 4096
GPU_TILE_BYTES, GPU_TILE_TOKENS = 1 << 30, 16384
# With a frozen head a block of at least so many tokens with all of the vocabulary: d hidden is one GEMM then, with tiles enough
# for all multiprocessors. By the estimate that saves 8 bytes an entry of d hidden for each slice but the first (0.4 % of the
# GEMMs at 8192 x 4096 x 128256, 1.2 % at 16384), and reads the weight once a block, under GEMMs that wait for no memory.
ONE_PASS_TOKENS = 4096
# Of E that is held where it is formed. A matrix has less than 2^31 entries, and a block's slices at least 32768 rows.
HELD_TILE_ENTRIES, HELD_TILE_TOKENS = (1 << 31) - (1 << 24), 65536  # less a few: slices are of 64 rows


def walked_tokens(num_tokens: int) -> int:
    """Tokens that are walked where num_tokens count: zeros fill up to a multiple of 16, so that every row of a tile starts
    aligned. A GPU's loads and tensor cores want that, and GEMMs on a CPU without it took up to 1.4 times as long."""
    return num_tokens + -num_tokens % 16


def seen_step(vocab_size: int) -> int:
    """Every so many rows of the vocabulary are looked at for a centre: 1 in 128, below a hundredth of a GEMM; 256 at least."""
    return max(1, min(128, vocab_size // 256))


TAIL_HEAD = 1 << 22  # elements of a weight below which looking for its tail takes as long as it saves
TAIL_CPU_TOKENS, TAIL_GPU_TOKENS = 512, 1024  # of a block with a tail; a GPU takes as many as whole vocabularies in a tile

FLAT_TOKENS = 512  # from so many on a few of them are looked at first (flat.py), which takes 1 % of their time
FEW_TOKENS = 16  # that are looked at; a multiple of 8, so that rows of their tile start aligned


def few_bytes(vocab_size: int, dtype: torch.dtype) -> int:
    """What looking at a few tokens holds: E of all rows, and each one's share in float32."""
    return FEW_TOKENS * vocab_size * (dtype.itemsize + 4 + 1)


def tail_width(needs: Needs, dtype: torch.dtype, device: torch.device) -> int:
    """Hidden states narrower than this have no tail told apart: looking at a tile would take longer than its GEMMs.

    In bfloat16 on a CPU with AMX (two cores of a Xeon, peaked logits, 512 tokens, V 49152): at a width of 576 a tail takes
    1.07 (list_hold) and 1.2 (frozen_head) times as long as none, at 1024 0.78 and 1.23, at 2048 0.71 and 0.94.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return 0
    return TAIL_AMX_WIDTH if needs.parameters else 2 * TAIL_AMX_WIDTH


TAIL_AMX_WIDTH = 1024


def tail_tokens(num_tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a block where a tail is told apart (tail.py), all blocks about as large.

    Fewer tokens need fewer rows of the vocabulary, but d weight is added up over blocks of them.
    """
    most = TAIL_CPU_TOKENS
    if device.type == "cuda":
        most = max(TAIL_GPU_TOKENS, GPU_TILE_BYTES // (vocab_size * dtype.itemsize))
    return even_tokens(num_tokens, most)


def tile_shape(
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    casts: bool = True,
    one_pass: bool = False,
    in_place: bool = False,
) -> tuple[int, int]:
    """Tokens and vocabulary rows of a tile.

    casts: whether rows of the weight are copied in the dtype of tiles; they fit the budget too, or few tokens would mean a
    copy of the whole weight. one_pass: d hidden is all that is wanted, and is formed at once. in_place: E of every tile is
    held where it is formed.

    On a CPU thin slices of the vocabulary that stay in the cache. On a GPU so much of it that sums of d hidden over slices
    cost little; none in one pass, as long as the tokens of a budget with all of the vocabulary fill the GPU; and where a
    tile takes no memory of its own, all that a matrix may have (docs/performance.md has the estimates).
    """
    gpu = device.type == "cuda"
    if gpu and in_place and not casts:
        tokens = max(1, min(num_tokens, HELD_TILE_TOKENS))
        slices = -(-tokens * vocab_size // HELD_TILE_ENTRIES)
        return tokens, min(-(-vocab_size // slices // 64) * 64, vocab_size)
    budget, most = (GPU_TILE_BYTES, GPU_TILE_TOKENS) if gpu else (CPU_TILE_BYTES, CPU_TILE_TOKENS)
    tokens = max(1, min(num_tokens, most))
    of_all = budget // (vocab_size * dtype.itemsize) // 16 * 16
    if gpu and one_pass and of_all >= ONE_PASS_TOKENS:
        tokens = even_tokens(num_tokens, min(most, of_all))
    copied = hidden_size if casts or not gpu else 0
    rows = budget // (max(tokens, copied) * dtype.itemsize)
    return tokens, vocab_size if rows >= vocab_size else min(max(rows // 64 * 64, 256), vocab_size)


def even_tokens(num_tokens: int, most: int) -> int:
    """Tokens of a block, at most about so many, all blocks about as large."""
    return max(1, min(walked_tokens(-(-num_tokens // max(1, -(-num_tokens // most)))), num_tokens))
