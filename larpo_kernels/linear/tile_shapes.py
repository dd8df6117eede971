"""How many tokens and vocabulary rows a tile has, and how tokens are padded and cut into blocks."""

from __future__ import annotations

import torch

# A tile at most. Up to so many tokens every slice of d weight is one GEMM over all of them, and nothing is added up.
CPU_TILE_BYTES, CPU_TILE_TOKENS = 8 << 20, 4096
GPU_TILE_BYTES, GPU_TILE_TOKENS = 1 << 30, 16384
# With a frozen head a block of at least so many tokens with all of the vocabulary: d hidden is one GEMM then, with tiles enough
# for all multiprocessors. By the estimate that saves 8 bytes an entry of d hidden for each slice but the first (0.4 % of the
# GEMMs at 8192 x 4096 x 128256, 1.2 % at 16384), and reads the weight once a block, under GEMMs that wait for no memory.
FUSED_GRAD_TOKENS = 4096
# Of E that is held where it is formed. A matrix has less than 2^31 entries, and a block's slices at least 32768 rows.
HELD_TILE_ENTRIES, HELD_TILE_TOKENS = (1 << 31) - (1 << 24), 65536  # less a few: slices are of 64 rows


def walked_tokens(num_tokens: int) -> int:
    """Tokens that are walked where num_tokens count: zeros fill up to a multiple of 16, so that every row of a tile starts
    aligned. A GPU's loads and tensor cores want that, and GEMMs on a CPU without it took up to 1.4 times as long."""
    return num_tokens + -num_tokens % 16


def seen_step(vocab_size: int) -> int:
    """Every so many rows of the vocabulary are looked at for a shift: 1 in 128, below a hundredth of a GEMM; 256 at least."""
    return max(1, min(128, vocab_size // 256))


TAIL_CPU_TOKENS, TAIL_GPU_TOKENS = 512, 1024  # of a block with a tail; a GPU takes as many as whole vocabularies in a tile


def tail_tokens(num_tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a block whose rows may be merged (tail.py), all blocks about as large.

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
    fuse_hidden_grad: bool = False,
    in_place: bool = False,
) -> tuple[int, int]:
    """Tokens and vocabulary rows of a tile.

    On a CPU thin slices of the vocabulary that stay in the cache. On a GPU so much of it that sums of d hidden over slices
    cost little; none where d hidden is fused into the forward, as long as the tokens of a budget with all of the vocabulary
    fill the GPU; and where a tile takes no memory of its own, all that a matrix may have (docs/performance.md has the
    estimates).

    Args:
        casts: rows of the weight are copied in the dtype of tiles. The copy has to fit the budget too, or few tokens would
            mean a copy of the whole weight.
        fuse_hidden_grad: d hidden is all that is needed, and is formed in the forward.
        in_place: E of every tile is held where it is formed.
    """
    gpu = device.type == "cuda"
    if gpu and in_place and not casts:
        tokens = max(1, min(num_tokens, HELD_TILE_TOKENS))
        slices = -(-tokens * vocab_size // HELD_TILE_ENTRIES)
        return tokens, min(-(-vocab_size // slices // 64) * 64, vocab_size)
    budget, most = (GPU_TILE_BYTES, GPU_TILE_TOKENS) if gpu else (CPU_TILE_BYTES, CPU_TILE_TOKENS)
    tokens = max(1, min(num_tokens, most))
    of_all = budget // (vocab_size * dtype.itemsize) // 16 * 16
    if gpu and fuse_hidden_grad and of_all >= FUSED_GRAD_TOKENS:
        tokens = even_tokens(num_tokens, min(most, of_all))
    copied = hidden_size if casts or not gpu else 0
    rows = budget // (max(tokens, copied) * dtype.itemsize)
    return tokens, vocab_size if rows >= vocab_size else min(max(rows // 64 * 64, 256), vocab_size)


def even_tokens(num_tokens: int, most: int) -> int:
    """Tokens of a block, at most about so many, all blocks about as large."""
    return max(1, min(walked_tokens(-(-num_tokens // max(1, -(-num_tokens // most)))), num_tokens))
