"""In which dtype a head is computed, and in which E is held."""

from __future__ import annotations

import platform

import torch


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
