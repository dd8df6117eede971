"""Ranking losses over the scores of one list: what each is, and `listwise_loss`, the op that computes them.

All of them read a list of m candidates with scores g_1..g_m (differentiable) and relevance r_1..r_m (it only orders
the list, except in ListNet and the DCG weights). Write 1..m for the order of falling relevance, equal relevance kept
in input order unless `ties` says otherwise (below). Two families cover everything, and both backends implement just these two:

    suffixes   sum_i a_i [ logsumexp_{j >= i} g_j - g_i ]              Contrastive, ListMLE, ListNet
    pairs      sum_{i before j} w_ij log(1 + exp(g_j - g_i))           Pairwise, LambdaRank

With m = 2, Pairwise, Contrastive, ListMLE and LambdaRank are the same number: the DPO loss.

Equal relevance leaves the order open, but Pairwise, Contrastive and ListMLE ask for one. Their `ties` is

    "order"    input order decides (the paper's formulas as written): the order of the data then decides what is learned
    "skip"     a list whose order is not settled where the objective asks for it has loss 0 and gradient 0, and counts as
               a list: the best must be unique (Contrastive), the best and the worst (Pairwise), every candidate (ListMLE)
    "mean"     Pairwise and Contrastive: the mean of the loss over all orders of the tied candidates
    "efron"    ListMLE, where that mean has no closed form: Efron's form for tied events in Cox regression (1977)

Under the last two the order in which tied candidates stand changes nothing. LambdaRank forms no pair of tied candidates and
ListNet no order.

A score of -inf is that of an answer to which the policy gives no probability. A term that prefers it to an answer with a
finite score is +inf. A term that only compares scores at -inf, a pair of them or a suffix of nothing else, says nothing
about the policy: it is left out of the loss and has no gradient.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from . import backends, ops, validation


@dataclass(frozen=True)
class Pairwise:
    """Best against worst: -log sigmoid(g_1 - g_m). DPO (arXiv 2305.18290, eq. 7) when m = 2.

    ties "mean": the mean over all pairs of one of the tied best and another one of the tied worst.
    """

    ties: Literal["order", "skip", "mean"] = "order"
    name: ClassVar[str] = "pairwise"

    def __post_init__(self):
        _check_ties(self, ("order", "skip", "mean"))


@dataclass(frozen=True)
class Contrastive:
    """Best against all: -log softmax(g)_1 (LarPO, arXiv 2502.03699, table 1).

    ties "mean": logsumexp(g) less the mean score of the tied best.
    """

    ties: Literal["order", "skip", "mean"] = "order"
    name: ClassVar[str] = "contrastive"

    def __post_init__(self):
        _check_ties(self, ("order", "skip", "mean"))


@dataclass(frozen=True)
class ListMLE:
    """Plackett-Luce likelihood of the whole order: -sum_i log [e^g_i / sum_{j >= i} e^g_j] (LarPO, table 1).

    ties "efron": the l-th of k tied candidates (l = 0 .. k - 1) is drawn from all below them and from 1 - l / k of each of the
    k, which is what is left of them on average over their orders (Efron 1977, "The efficiency of Cox's likelihood function
    for censored data"). By Jensen's inequality it is at least the mean of the loss over their orders, a sum of 2^k terms; where
    the tied score the same, both have the same value and gradient.
    """

    ties: Literal["order", "skip", "efron"] = "order"
    name: ClassVar[str] = "listmle"

    def __post_init__(self):
        if self.ties == "mean":
            raise ValueError(
                "ListMLE ties must not be 'mean': over all orders of k tied candidates it is a sum of 2^k terms. 'efron' "
                "bounds it from above and equals it where the tied candidates score the same"
            )
        _check_ties(self, ("order", "skip", "efron"))


@dataclass(frozen=True)
class LambdaRank:
    """All pairs, summed: -sum w_ij log sigmoid(g_i - g_j) over r_i > r_j; tied candidates form no pair.

    weighting None is the paper's form (w = 1). "dcg" and "dcg2" weight a pair by what swapping it would change in
    NDCG, with gains 2^r - 1 and ranks by the current scores, constants in the gradient; they are rax's
    `dcg_lambdaweight` / `dcg2_lambdaweight` with normalize=True, divided by the list size (rax multiplies by it).

        w_ij = |2^r_i - 2^r_j| / |ideal| * change of discount        ideal = sum_n (2^r_n - 1) / log2(1 + n), n = 1..k

    They want graded relevance (0, 1, 2, ...), not raw rewards: gains are exponential. Relevance of any sign and size has
    a right value all the same. A weight is never negative: gains below 0, those of r < 0, make an ideal below 0 too, and
    its size is what counts. An ideal of 0 (all r of the first k are 0) counts as 1. Both are formed relative to the
    largest 2^r, without cancellation: r may be 1e-9 or 1e30, and infinite relevance is the limit of that.

    k: cut-off of the DCG, as rax's `topn`; None for no cut-off.
    """

    weighting: Literal["dcg", "dcg2"] | None = None
    k: int | None = None
    name: ClassVar[str] = "lambdarank"

    def __post_init__(self):
        if self.weighting not in (None, "dcg", "dcg2"):
            raise ValueError(f"LambdaRank weighting must be None, 'dcg' or 'dcg2', got {self.weighting!r}")
        if self.k is not None and (not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1):
            raise ValueError(f"LambdaRank k must be None or an int >= 1, got {self.k!r}")
        if self.k is not None and self.weighting is None:
            raise ValueError("LambdaRank k is a cut-off of the DCG: give weighting='dcg' or 'dcg2' with it")


@dataclass(frozen=True)
class ListNet:
    """Cross entropy between softmax(r / temperature) and softmax(g) (Cao et al. 2007, top-one probabilities)."""

    temperature: float = 1.0
    name: ClassVar[str] = "listnet"

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"ListNet temperature must be a finite float > 0, got {self.temperature!r}")


def implicit_rewards(logps: torch.Tensor, ref_logps: torch.Tensor | None, beta: float) -> torch.Tensor:
    """The scores that a policy gives its candidates: beta * (log pi - log pi_ref); without a reference beta * log pi."""
    return beta * (logps if ref_logps is None else logps - ref_logps)


def _check_ties(objective: Any, allowed: tuple[str, ...]) -> None:
    if objective.ties not in allowed:
        *most, last = map(repr, allowed)
        raise ValueError(f"{type(objective).__name__} ties must be {', '.join(most)} or {last}, got {objective.ties!r}")


Objective = Pairwise | Contrastive | ListMLE | LambdaRank | ListNet
LARGEST_GRADE = 32  # of a gain of 2^grade: beyond, the best candidate of a list is all that weighs
OBJECTIVES: dict[str, type] = {c.name: c for c in (Pairwise, Contrastive, ListMLE, LambdaRank, ListNet)}
BY_NAME = {name: objective() for name, objective in OBJECTIVES.items()}


def resolve(objective: str | Objective) -> Objective:
    """An objective from its name, or the object itself."""
    if isinstance(objective, str) and objective in BY_NAME:
        return BY_NAME[objective]
    if isinstance(objective, Objective):
        return objective
    raise ValueError(f"objective must be one of {sorted(OBJECTIVES)} or an objective object, got {objective!r}")


def checked_relevance(
    x, objective: Objective, cu_lists: torch.Tensor | None, like: torch.Tensor, num_candidates: int
) -> torch.Tensor:
    """The caller's relevance as `ops.scores_and_listwise_loss` takes it for this objective."""
    gains = isinstance(objective, LambdaRank) and objective.weighting is not None
    x = validation.relevance(x, cu_lists, like, num_candidates, by_value=gains or isinstance(objective, ListNet))
    if gains and validation.readable(x) and x.numel() and not bool(((x >= 0) & (x <= LARGEST_GRADE)).all()):
        warn_of_raw_rewards()
    return x


@functools.cache  # once is enough
def warn_of_raw_rewards() -> None:
    warnings.warn(
        f"LambdaRank weights pairs by gains of 2^relevance - 1, and some relevance is below 0 or above {LARGEST_GRADE}, as raw "
        "rewards are: the weights then change with any constant that is added to a reward. Give grades (0, 1, 2, ...) or rank "
        "gains: for each candidate the fraction of its list that is worse",
        stacklevel=5,
    )


def listwise_loss(
    scores: torch.Tensor,
    relevance: torch.Tensor,
    *,
    list_sizes: int | Sequence[int] | torch.Tensor,
    objective: str | Objective = "contrastive",
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Literal["torch", "triton"] | None = None,
) -> torch.Tensor:
    """Ranking loss of each list of candidates, differentiable in `scores`.

    Args:
        scores: [S] floating point, one score per candidate, lists one after the other.
        relevance: [S], higher is better, any real dtype. It only orders the list, exactly at any size of integers;
            ListNet and DCG weights use values, as float64: integers beyond 2^53 are refused (on a GPU give NaN).
        list_sizes: candidates per list: an int m (S = lists * m), or sizes (sequence or int tensor) that sum to S.
        objective: a name from `OBJECTIVES` or an objective object such as `LambdaRank(weighting="dcg", k=5)`.
        reduction: "mean" or "sum" over lists, or "none" for [lists]. Terms inside a list are always summed.
        backend: "torch", "triton" or None for the best one on this device.

    Returns:
        A scalar, or [lists] for reduction "none"; float64 for float64 scores, else float32.
            A list of one candidate contributes 0 and counts in the mean.

    Raises:
        TypeError: an argument has the wrong type or dtype; the message names it.
        ValueError: an argument has the wrong shape or value; the message names it, and says what it should be.

    >>> scores = torch.tensor([0.0, 0.0, 1.0, 3.0])
    >>> relevance = torch.tensor([1.0, 0.0, 5.0, 2.0])
    >>> [round(x, 4) for x in listwise_loss(scores, relevance, list_sizes=2, reduction="none").tolist()]
    [0.6931, 2.1269]
    """
    objective = resolve(objective)
    validation.check_scores(scores)
    validation.check_options(reduction=reduction)
    cu_lists, list_size = validation.lists(list_sizes, scores.shape[0], scores.device)
    relevance = checked_relevance(relevance, objective, cu_lists, scores, scores.shape[0])
    backend = backends.pick(backend, scores)
    op, args = ops.list_step(
        None, None, cu_lists, list_size, relevance, None, objective, beta=1.0, reduction=reduction, backend=backend
    )
    return ops.run(op, op.arguments(scores, *args[1:]))[0]
