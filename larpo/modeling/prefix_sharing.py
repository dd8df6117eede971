"""Prefix sharing: which token of a row "prompt + candidate 1 + ... + candidate m" attends to which.

A token sees the prompt and its own segment, up to its own position, and in a sliding-window layer no further back than the
window. Positions decide, not places in the row: so every candidate sees what it would see in a row of its own.

Tokens bound the speed-up: m (P + R) / (P + m R) for m candidates of R tokens behind a prompt of P. Dropout must be off,
or candidates see one draw of the prompt in common.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Causal decoders whose position comes from position_ids alone and whose layers take the mask they are handed.
# tests/larpo/modeling/test_prefix_families.py compares each with separate rows.
FAMILIES = frozenset(
    {"cohere", "cohere2", "deepseek_v3", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2"}
    | {"gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "internlm3", "llama", "ministral3", "mistral", "mixtral"}
    | {"nemotron", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"}
    | {"stablelm", "starcoder2"}
)

# Completion tokens to put in one row where attention computes what the mask hides (SDPA, eager): beyond, on a CPU, that
# costs more than the prompt saves. None for sparse attention.
DENSE_MASK_TOKENS = 512

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")

# What a token's log-probability may differ by, in nats: rounding in two orders of summation. A missing mask or positions that
# run on are off by far more in a model that attends.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def supports_prefix_sharing(config) -> str | None:
    """None if a model of this config can run prefix-shared rows, else the reason why not.

    Known families only: some models silently ignore a 4-D mask or change it. `check_prefix_sharing` on the first batch covers
    what a config does not tell.
    """
    text = config.get_text_config()
    if text.model_type not in FAMILIES:
        return f"model type {text.model_type!r} is not known to follow a mask of ours"
    if getattr(text, "use_bidirectional_attention", False) is True or getattr(text, "is_causal", True) is False:
        return "attention is not causal"
    other = set(_windows(text)) - {"full_attention", "sliding_attention"}
    if other:
        return f"layer types {', '.join(sorted(other))} carry a state along the row or cut it by place"
    implementation = text._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        return f"attention implementation {implementation!r} takes no mask, expected one of {', '.join(IMPLEMENTATIONS)}"
    return None


def prefix_masks(segments: Tensor, position_ids: Tensor, config, dtype: torch.dtype) -> Tensor | dict:
    """What a transformers backbone of this config takes as attention_mask for prefix-shared rows.

    Args:
        segments: [R, T] integer: 0 the prompt, i >= 1 the i-th candidate of the row, -1 padding.
        position_ids: [R, T] int64.
        config: tells layer types, sliding window (in positions) and the attention implementation.
        dtype: of the queries; SDPA wants the mask in it. Eager attention would add a boolean mask as 0 and 1.

    Returns:
        An additive mask [R, 1, T, T], 0 where seen and the dtype's minimum elsewhere, or for flex_attention a BlockMask
        of as many rows, places and places. A dict of these by layer type where the layers are of several types. Every token
        sees itself, padding too, so no row of the softmax is empty.
    """
    text = config.get_text_config()
    make = _block_mask if text._attn_implementation == "flex_attention" else _additive_mask
    masks = {kind: make(segments, position_ids, window, dtype) for kind, window in _windows(text).items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def check_prefix_sharing(logps_shared: Tensor, logps_separate: Tensor, num_tokens: Tensor, dtype: torch.dtype) -> str | None:
    """Compare log-likelihoods of the same candidates, prefix-shared and each in a row of its own.

    Args:
        logps_shared, logps_separate: [S] sums of token log-probabilities, nats.
        num_tokens: [S] tokens that each sum runs over. Rounding errors of tokens add up like a random walk, so the tolerance
            is `TOLERANCE[dtype]` times the root of their number.
        dtype: what the model computes in, the autocast dtype where there is one.

    Returns:
        None where they agree, else the reason with the worst candidate's figures.

    >>> apart, tokens = torch.tensor([-80.0, -95.0]), torch.tensor([64, 64])
    >>> check_prefix_sharing(apart + 1e-5, apart, tokens, torch.float32)
    >>> check_prefix_sharing(apart - 0.1, apart, tokens, torch.float32)
    'candidate 0 differs by 0.1 nats (-80.1 shared, -80 apart) over 64 tokens, expected at most 0.0008 in float32'
    """
    if not logps_shared.numel():
        return None
    shared, separate = logps_shared.detach().double(), logps_separate.detach().double()
    allowed = TOLERANCE[dtype] * num_tokens.to(shared).clamp(min=1).sqrt()
    difference = (shared - separate).abs()
    excess = (difference / allowed).nan_to_num(nan=torch.inf)
    worst = int(excess.argmax())
    if excess[worst] <= 1:
        return None
    return (
        f"candidate {worst} differs by {difference[worst]:.3g} nats ({shared[worst]:.6g} shared, {separate[worst]:.6g} apart) "
        f"over {int(num_tokens[worst])} tokens, expected at most {allowed[worst]:.3g} in {str(dtype).removeprefix('torch.')}"
    )


def _windows(config) -> dict[str, int | None]:
    """Layer type -> how many positions a token sees, itself included; None for all. One entry a type that occurs."""
    # a window written into a config whose class knows none is ignored by the model too
    window = getattr(config, "sliding_window", None) if hasattr(type(config), "sliding_window") else None
    kinds = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def _visible(segment: Tensor, position: Tensor, key_segment: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """Whether a query sees a key, given segment and position of both. Broadcasts."""
    back = position - key_position
    seen = ((key_segment == segment) | (key_segment == 0)) & (back >= 0)
    return seen if window is None else seen & (back < window)


def _additive_mask(segments: Tensor, position_ids: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    seen = _visible(segments[:, :, None], position_ids[:, :, None], segments[:, None], position_ids[:, None], window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _block_mask(segments: Tensor, position_ids: Tensor, window: int | None, dtype: torch.dtype):
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(row, head, query, key):
        return _visible(segments[row, query], position_ids[row, query], segments[row, key], position_ids[row, key], window)

    rows, length = segments.shape
    compiled = segments.is_cuda  # uncompiled it makes the whole [R, T, T] before it counts blocks
    return create_block_mask(mask_mod, rows, None, length, length, device=segments.device, _compile=compiled)
