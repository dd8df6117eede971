"""The loss of a list: the objective over implicit rewards, and the terms that settings add to it.

A list has candidates with rewards r_i, log-likelihoods L_i and scores g_i = beta (L_i - Lref_i). With F the objective,
b its best candidate of n_b counted tokens, and d_i = g_i + margin (r_b - r_i),

    loss = (1 - label_smoothing) F(d) + label_smoothing F'(d) + sft_weight (-log pi(y_b | x) / n_b)

- `ties`: what F does with equal rewards, see `larpo_kernels.objectives`. By default it is the mean over the orders in which
  tied candidates can stand (Efron's form of it for ListMLE). The order of tied candidates in a file is noise; ranking them at
  random has this mean as its expectation. "skip" leaves such lists out, and with them the fact that the tied best are better
  than the rest.
- `margin`: a lead of margin (r_i - r_j) costs what a lead of 0 costs without a margin. In each pair of
  Pairwise and LambdaRank the difference of scores becomes g_i - g_j - margin (r_i - r_j) (Llama 2, arXiv 2307.09288, eq. 2;
  ODPO, arXiv 2402.10571); in each softmax of Contrastive and ListMLE a candidate's score is raised by how much worse than the
  best it is (the softmax margin of Gimpel and Smith 2010).
- `label_smoothing`, eps: the share of judgements taken to be noise. Pairwise, LambdaRank: F' is F of the pairs turned round,
  (1 - eps) l(d) + eps l(-d) (cDPO; Mitchell 2023, "A note on DPO with noisy preferences"). Contrastive, ListNet: the target
  becomes (1 - eps) p_i + eps / m (Szegedy et al., arXiv 1512.00567, section 7), so F' = logsumexp(d) - mean(d).
- `sft_weight`: keeps the best answer likely, which a ranking alone may lower (RPO, arXiv 2404.19733, eq. 1;
  `rpo_alpha` of earlier TRL). Of several best candidates it is the mean, with ties="order" the first, with ties="skip" none.

A column `weight` in the data multiplies the loss of each list, divided by the column's mean: a batch of n lists has the loss
sum w_l loss_l / n, whose mean over the data is the weighted mean. (Were a batch divided by the weights of its own lists, the
weight of a list that is a batch of its own would cancel.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import larpo_kernels as lk
from larpo_kernels.objectives import OBJECTIVES, Objective, implicit_rewards, resolve

from ..runs.checks import is_number

TIES = {"pairwise": "mean", "contrastive": "mean", "listmle": "efron"}  # the defaults
UNIFORM = ("contrastive", "listnet")  # objectives with a distribution for a target


def objective_of(name: str, ties: str | None, options: dict[str, Any] | None) -> Objective:
    """An objective from the settings; raises ValueError for options that it does not have."""
    resolve(name)
    options = dict(options or {})
    if ties is not None and options.get("ties", ties) != ties:
        raise ValueError(f"ties={ties!r}, but objective_options say {options['ties']!r}: leave one of the two out")
    if ties is not None and name not in TIES:
        why = "it forms no pair of tied candidates" if name == "lambdarank" else "it asks for no order"
        raise ValueError(f"ties is for {', '.join(TIES)}, and must be left out with {name}: {why}")
    if name in TIES:
        options = {"ties": ties or TIES[name], **options}
    try:
        return OBJECTIVES[name](**options)
    except TypeError:
        known = list(OBJECTIVES[name].__dataclass_fields__)
        raise ValueError(f"objective_options of {name!r} may hold {known}, got {sorted(options)}") from None


def is_settled(scores: Sequence[float], objective: str) -> bool:
    """Whether the scores of a list settle what the objective asks of its order; where not, ties="skip" leaves the list out."""
    unique = {score for score, times in Counter(scores).items() if times == 1}
    asked = {"contrastive": [max(scores)], "pairwise": [max(scores), min(scores)], "listmle": scores}.get(objective, ())
    return len(scores) == 1 or unique.issuperset(asked)


@dataclass(frozen=True)
class ListLoss:
    """The loss of each list by the formula at the top of this module.

    Raises ValueError for a setting that has no meaning for the objective.
    """

    objective: Objective
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0
    sft_weight: float = 0.0
    length_normalized: bool = False
    backend: str | None = None

    def __post_init__(self):
        for name, below in (("label_smoothing", 0.5), ("margin", math.inf), ("sft_weight", math.inf)):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value < below):
                limits = f">= 0 and below {below}" if below < math.inf else "finite and >= 0"
                raise ValueError(f"{name} must be a number {limits}, got {value!r}")
        name, weighted = self.objective.name, getattr(self.objective, "weighting", None) is not None
        if self.label_smoothing and name == "listmle":
            raise ValueError(
                "label_smoothing must be 0 with listmle: noise in its order would be a mean over all orders, which has no "
                "closed form. contrastive and lambdarank have one"
            )
        if weighted and (self.label_smoothing or self.margin):
            setting = "label_smoothing" if self.label_smoothing else "margin"
            raise ValueError(
                f"{setting} must be 0 with weighting={self.objective.weighting!r}: the weights of pairs are of ranks by score, "
                "and would be those of other scores"
            )
        if self.margin and name == "listnet":
            raise ValueError(
                "margin must be 0 with listnet: its target is a margin already, (r_i - r_j) / temperature; set the temperature"
            )

    def __call__(self, logps: Tensor, ref_logps: Tensor | None, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """-> (loss [L], scores [S], without the margin).

        logps, ref_logps: [S] sums over a candidate's counted tokens, or means with length_normalized; nats.
        inputs: a batch of `ListCollator`: relevance [S], list_sizes [L], num_tokens [S].
        """
        scores = implicit_rewards(logps, ref_logps, self.beta)
        lists = _Lists(inputs["relevance"], inputs["list_sizes"], getattr(self.objective, "ties", "mean"))
        shifted = scores + (self.margin * (lists.top - lists.relevance)).to(scores.dtype) if self.margin else scores
        loss = self._ranking(shifted, self.objective, inputs["relevance"], inputs)
        if self.label_smoothing:
            smooth = self._smooth(shifted, lists, inputs)
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * smooth
        if self.sft_weight:
            nll = -logps if self.length_normalized else -logps / inputs["num_tokens"].clamp(min=1)
            loss = loss + self.sft_weight * lists.sum(nll, lists.best())
        return loss, scores

    def _smooth(self, scores: Tensor, lists: _Lists, inputs: dict[str, Any]) -> Tensor:
        """F': pairs turned round, or the cross entropy with a uniform target."""
        if self.objective.name not in UNIFORM:
            return self._ranking(-scores, self.objective, inputs["relevance"], inputs)
        all_best = lk.Contrastive(ties="mean")  # with equal relevance: every candidate is the best
        uniform = self._ranking(scores, all_best, torch.zeros_like(inputs["relevance"]), inputs)
        return uniform * lists.sum(torch.ones_like(scores), lists.best())  # 0 for a list that is skipped

    def _ranking(self, scores: Tensor, objective: Objective, relevance: Tensor, inputs: dict[str, Any]) -> Tensor:
        return lk.listwise_loss(
            scores, relevance, list_sizes=inputs["list_sizes"], objective=objective, reduction="none", backend=self.backend
        )


def mean_over_lists(losses: Tensor, inputs: dict[str, Any]) -> Tensor:
    """[L] -> the mean over a batch's lists, each times its weight where the data has weights."""
    return (losses * inputs["weight"] if "weight" in inputs else losses).mean()


class _Lists:
    """The lists of a batch, as [S] and [L] tensors, made for the settings that ask for them; nothing waits for the device."""

    def __init__(self, relevance: Tensor, sizes: Tensor, ties: str):
        self.relevance, self.sizes, self.ties, self.num = relevance, sizes, ties, len(sizes)

    @cached_property
    def of(self) -> Tensor:
        """[S]: which list a candidate is of."""
        places = torch.arange(self.num, device=self.relevance.device)
        return torch.repeat_interleave(places, self.sizes.to(places.device), output_size=len(self.relevance))

    @cached_property
    def top(self) -> Tensor:
        """[S]: the best relevance of a candidate's list."""
        lowest = torch.full((self.num,), -torch.inf, dtype=self.relevance.dtype, device=self.relevance.device)
        return lowest.scatter_reduce(0, self.of, self.relevance, "amax")[self.of]

    def best(self) -> Tensor:
        """[S]: 1 for the best candidate of each list, shared evenly where several are."""
        best = self.relevance == self.top
        if self.ties == "order":
            place = torch.arange(len(best), device=best.device)
            first = torch.full((self.num,), len(best), device=best.device)
            first = first.scatter_reduce(0, self.of, place.where(best, len(best)), "amin")[self.of]
            return (place == first).float()
        count = self.sum(best.float())[self.of]
        return torch.where(best, count == 1 if self.ties == "skip" else 1 / count.clamp(min=1), 0).float()

    def sum(self, x: Tensor, share: Tensor | None = None) -> Tensor:
        """[S] -> [L]: the sum over each list, of x or of x times a share where that is not 0."""
        if share is not None:
            x = torch.where(share > 0, share * x, 0)
        return x.new_zeros(self.num).index_add(0, self.of, x)
