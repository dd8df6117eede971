"""What primitives take that is more than a few tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogitRows(NamedTuple):
    """Rows of given logits with their labels, and how logits become log-probs."""

    logits: Tensor  # [S, T, V] or [N, V], unit stride on V
    labels: Tensor  # [S, T] or [N]
    token_indices: Tensor | None  # [n] positions on the flat token axis of those that count; None: not known, or all if checked
    checked: bool  # the labels have been read: each lies in the vocabulary or is ignored
    ignore_index: int | None
    logit_scale: float
    softcap: float | None


class TargetTerm(NamedTuple):
    """value * weight[labels], a row for each token; nothing where a label is negative: another rank owns the target."""

    value: Tensor  # [n]
    weight: Tensor  # [V, H]
    labels: Tensor  # [n]


class CandidateArguments(NamedTuple):
    """Token log-probs and which candidate they belong to; also the arguments of an op."""

    logps: Tensor  # [N], 0 where ignored; without cu_tokens [S, T]
    mean_mask: Tensor | None  # bool, of the same shape: candidates are means over these tokens; None: they are sums
    cu_tokens: Tensor | None  # [S+1]
    backend: str


class ListwiseArguments(NamedTuple):
    """Token log-probs, how they become scores of candidates, and the loss over lists of these; also the arguments of an op."""

    logps: Tensor  # [N], 0 where ignored; without cu_tokens [S, T], or [S] where a token is a candidate
    mean_mask: Tensor | None  # as in CandidateArguments
    cu_tokens: Tensor | None
    cu_lists: Tensor | None  # [L+1]
    list_size: int  # candidates of every list, without cu_lists
    relevance: Tensor  # [S]
    ref_logps: Tensor | None  # [S]
    beta: float
    objective: str
    weighting: str  # of LambdaRank's pairs
    k: int  # cut-off of LambdaRank's DCG, 0 for none
    temperature: float  # of ListNet
    ties: str
    reduction: str  # done by the op: a backend returns the loss of each list
    backend: str
