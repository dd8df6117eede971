"""Whether a model computes on rows as training lays them out what it computes on a candidate alone.

Two things go wrong without an error. What is passed beside the tokens: position ids count from 0, in RoBERTa from behind the
padding token; padding is to the right, CPM-Ant takes it to be to the left. And the step from hidden states to logits, see
`lm_heads`. Both are compared on a few tokens, in the very call that training makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import lm_heads, row_layouts
from .eval_mode import in_eval_mode
from .row_layouts import TokenizedCandidate

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOKENS, LEAST_TOKENS = 16, 4  # of the longer candidate that is compared
# How many roundings two orders of the same sums may be apart after all layers, and what is allowed where these are fine.
# Positions that are off by one are off by far more in a model that reads them.
ROUNDINGS, LEAST = 8, 1e-4
HIDDEN = 1e4  # logits beyond it are none: some models hide entries of the vocabulary


class Call(NamedTuple):
    """How a model is called for the log-likelihoods of rows."""

    with_positions: bool  # position_ids are passed
    why_logits: str | None  # why they come from the model's logits; None: from hidden states


@torch.no_grad()
def choose(lm: PreTrainedModel, rows: Mapping[str, Tensor], forward: Callable, dtype: torch.dtype, agreed: Callable) -> Call:
    """The call whose results are those of transformers for each candidate alone, given only its tokens.

    Args:
        rows: the first batch. Its layout is taken, and its first tokens. For prefix-shared rows only the head is compared:
            `larpo.modeling.prefix_sharing` compares them with separate ones.
        forward: the model's own.
        dtype: what attention computes in.
        agreed: a reason or None -> the same one on every process.

    Raises ValueError where there is no such call.
    """
    few, candidates = _few_rows(rows, lm.config)
    reasons = []
    with in_eval_mode(lm):
        alone = [] if "segments" in few else [_alone(forward, one, few["predictor_positions"].device) for one in candidates]
        rounding = _rounding(lm, dtype, *(one.dtype for one in alone))
        for with_positions in (True, False) if "attention_mask" in few else (True,):
            inputs = inputs_of(few, lm.config, dtype, with_positions)
            reasons.append(agreed(_compare(forward, inputs, few["predictor_positions"], alone, rounding) if alone else None))
            if reasons[-1] is None:
                return Call(with_positions, agreed(lm_heads.check(lm, inputs, forward, few["predictor_positions"])))
    raise ValueError(
        f"{type(lm).__name__} gives tokens other probabilities in {row_layouts.layout_of(few)} rows of candidates than in a "
        f"candidate alone ({reasons[-1]}): something else than the model would be trained, so its family is refused"
    )


def inputs_of(rows: Mapping[str, Tensor], config: PretrainedConfig, dtype: torch.dtype, with_positions: bool) -> dict[str, Any]:
    """`row_layouts.backbone_inputs`, with or without position_ids, and without what a config asks a router for."""
    inputs = row_layouts.backbone_inputs(rows, config, dtype)
    if not with_positions:
        del inputs["position_ids"]
    if getattr(config.get_text_config(), "output_router_logits", False):
        inputs["output_router_logits"] = False
    return inputs


def _few_rows(rows: Mapping[str, Tensor], config: PretrainedConfig) -> tuple[dict[str, Tensor], list[TokenizedCandidate]]:
    """Two candidates of the first tokens of `rows`, one about half as long as the other, in the same layout."""
    ids = rows["input_ids"][0]
    if "segments" in rows:
        ids = ids[rows["segments"][0] >= 0]
    elif "attention_mask" in rows:
        ids = ids[rows["attention_mask"][0] == 1]
    else:
        ids = ids[: int(rows["cu_seqlens_q"][1])]
    ids = ids[:TOKENS].tolist()
    if len(ids) < LEAST_TOKENS:  # nothing would be compared, and the answer holds for all batches
        ids = (ids * LEAST_TOKENS)[:LEAST_TOKENS]
    prompt, half = ids[: -(-len(ids) // 4)], len(ids) * 5 // 8
    candidates = [TokenizedCandidate(prompt, ids[len(prompt) :]), TokenizedCandidate(prompt, ids[len(prompt) : half])]
    if row_layouts.layout_of(rows) == "packed":
        few = row_layouts.packed_rows(candidates)
    elif row_layouts.layout_of(rows) == "shared":
        few = row_layouts.shared_rows(candidates, _padding(rows, config))
    else:
        multiple = 1 if rows["input_ids"].shape[1] % 8 else 8  # of a length, as Reformer wants it
        few = row_layouts.padded_rows(candidates, _padding(rows, config), multiple)
    device = rows["input_ids"].device
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in few.items()}, candidates


def _padding(rows: Mapping[str, Tensor], config: PretrainedConfig) -> int:
    """The token that fills rows: the batch's, or where none had to be filled the model's."""
    empty = rows["segments"] < 0 if "segments" in rows else rows["attention_mask"] == 0
    filled = rows["input_ids"][empty]
    if len(filled):
        return int(filled[0])
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    return 0 if pad is None else pad


def _alone(forward: Callable, candidate: TokenizedCandidate, device: torch.device) -> Tensor:
    """Logits of the completion's tokens, [N, V]."""
    ids = torch.tensor([[*candidate.prompt_ids, *candidate.completion_ids]], device=device)
    return forward(input_ids=ids, use_cache=False).logits[0, len(candidate.prompt_ids) - 1 : -1]


def _compare(forward: Callable, inputs: dict[str, Any], at: Tensor, alone: Sequence[Tensor], rounding: float) -> str | None:
    """None if the logits at the completions' places in rows equal those of the candidates alone up to rounding, else why."""
    try:
        logits = forward(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, at)
    except TypeError as error:  # a forward without position_ids
        return str(error)
    for in_rows, by_itself in zip(logits.split([len(one) for one in alone]), alone, strict=True):
        if len(by_itself):
            difference, size = _difference(in_rows.float(), by_itself.float())
            if difference > max(ROUNDINGS * rounding, LEAST) * size:
                return f"off by {difference:.2g} nats rms"
    return None


def _difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Of logits [N, V]: how far they are apart but for a constant (rms, the median over tokens: an expert that rounding
    switches moves few of them) and how large they are (rms). 0 where there is nothing to compare."""
    known = theirs.abs() < HIDDEN  # not where it is nan
    count = known.sum(1).clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return x.masked_fill(~known, 0.0).sum(1) / count

    apart = ours - theirs
    spread = mean((apart - mean(apart)[:, None]).square()).sqrt()
    return spread.nan_to_num(nan=torch.inf).median().item(), mean(theirs.square()).mean().sqrt().item()


def _rounding(lm: PreTrainedModel, *dtypes: torch.dtype) -> float:
    """Of the coarsest numbers that the model computes with. dtypes: of its attention and its logits."""
    if getattr(lm, "is_quantized", False):  # some quantise activations, by what stands beside them in the batch
        return 2.0**-7
    if any(
        hasattr(p, "full_tensor") for p in lm.parameters()
    ):  # FSDP2 may compute in bf16 with shards that it holds in float32
        return torch.finfo(torch.bfloat16).eps
    found = [torch.finfo(x).eps for x in (*dtypes, lm.get_input_embeddings().weight.dtype)]
    if lm.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        found.append(2.0**-10)
    return max(found)
