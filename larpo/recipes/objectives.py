"""Objectives of other papers over the numbers that LarPO's have: log-likelihoods, a reference's, lengths and rewards.

With l_i the log-likelihood of candidate i (a sum over its n_i tokens), r_i its reward, s_i = beta (l_i - l_i^ref) and
p_i = l_i / n_i, the loss of one list is

    LiPO-lambda   arXiv 2402.01878   sum_{r_i > r_j} |G_i - G_j| |1 / D_i - 1 / D_j| log(1 + e^-(s_i - s_j))
                                     with G = 2^r - 1 and D = log(1 + rank by s), constants in the gradient
    SimPO         arXiv 2405.14734   -log sigmoid(beta p_w - beta p_l - margin), best w against worst l
    RRHF          arXiv 2304.05302   sum_{r_i > r_j} max(0, p_j - p_i) - l_best
    PRO           arXiv 2306.17492   -sum_k log [e^(p_k / T_kk) / (e^(p_k / T_kk) + sum_{i > k} e^(p_i / T_ki))] - w l_best
                                     with T_ki = 1 / (r_k - r_i) and T_kk = min_i T_ki

The last three have no reference. LiPO-lambda is LambdaRank("dcg") of larpo_kernels without its norm: LambdaRank divides gains
by the list's ideal DCG, and its logarithm has base 2. So per list LiPO = LambdaRank * ideal DCG / log 2.

Each function here is a `harness.trainer.Loss`: it returns the mean over lists and the scores that it orders by. Lists of
one candidate count in the mean; of them only the last terms of RRHF and PRO see anything. Candidates that tie form no pair
in LiPO-lambda, RRHF and PRO. SimPO, as larpo_kernels' Pairwise, takes the first of the best and the last of the worst.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import larpo_kernels as lk
from larpo.candidates import PromptList
from larpo.modeling.policy import detach
from larpo.retrieval import kl_estimate
from larpo.sampling import TransformersSampler
from larpo.training.metrics import list_metrics
from larpo_kernels.objectives import implicit_rewards

from .harness import report
from .harness.lists import best, ideal_dcg, pairs
from .harness.recipe import Arm, Columns, Recipe, Row, commands
from .harness.trainer import Loss, counts_in_words, logps_of, train
from .tasks import naming

Numbers = tuple[Tensor, Tensor]


def larpo(logps, ref_logps, num_tokens, relevance, list_sizes, *, objective, beta: float = 0.1) -> Numbers:
    """LarPO's own objectives (arXiv 2502.03699): any of larpo_kernels over s."""
    scores = implicit_rewards(logps, ref_logps, beta)
    return lk.listwise_loss(scores, relevance, list_sizes=list_sizes, objective=objective), scores


def lipo_lambda(logps, ref_logps, num_tokens, relevance, list_sizes, *, beta: float = 0.1) -> Numbers:
    scores = implicit_rewards(logps, ref_logps, beta)
    normed = lk.listwise_loss(
        scores, relevance, list_sizes=list_sizes, objective=lk.LambdaRank(weighting="dcg"), reduction="none"
    )
    return (normed * ideal_dcg(relevance, list_sizes).to(normed) / math.log(2)).mean(), scores


def simpo(logps, ref_logps, num_tokens, relevance, list_sizes, *, beta: float = 2.0, margin: float = 0.5) -> Numbers:
    """Taking the margin off the best candidate's score turns the pairwise loss into SimPO's."""
    scores = beta * logps / num_tokens.clamp(min=1)
    shifted = scores.index_add(0, best(relevance, list_sizes), scores.new_full((len(list_sizes),), -margin))
    return lk.listwise_loss(shifted, relevance, list_sizes=list_sizes, objective="pairwise"), scores


def rrhf(logps, ref_logps, num_tokens, relevance, list_sizes) -> Numbers:
    scores = logps / num_tokens.clamp(min=1)
    better, worse = pairs(relevance, list_sizes)
    hinge = (scores[worse] - scores[better]).relu().sum()
    return (hinge - logps[best(relevance, list_sizes)].sum()) / len(list_sizes), scores


def pro(logps, ref_logps, num_tokens, relevance, list_sizes, *, sft_weight: float = 0.05) -> Numbers:
    """A sum of contrastive losses: each candidate k against those worse than it, at its own temperatures.

    The paper's reward gaps are never 0; here a candidate that ties with k is no negative of k.
    """
    scores = logps / num_tokens.clamp(min=1)
    better, worse = pairs(relevance, list_sizes)
    gap = (relevance[better] - relevance[worse]).to(scores)
    heads, sizes = better.unique_consecutive(return_counts=True)
    widest = gap.new_zeros(len(logps)).scatter_reduce(0, better, gap, "amax")
    # per head a list: the head itself, then what is worse than it
    owner = torch.cat([heads, better])
    order = owner.argsort(stable=True)
    temperatured = torch.cat([scores[heads] * widest[heads], scores[worse] * gap])[order]
    is_head = torch.cat([torch.ones_like(heads), torch.zeros_like(better)])[order]
    ranked = lk.listwise_loss(temperatured, is_head, list_sizes=sizes + 1, objective="contrastive", reduction="sum")
    return (ranked - sft_weight * logps[best(relevance, list_sizes)].sum()) / len(list_sizes), scores


OBJECTIVES = {
    "pairwise (DPO)": partial(larpo, objective="pairwise"),
    "contrastive": partial(larpo, objective="contrastive"),
    "LambdaRank": partial(larpo, objective="lambdarank"),
    "ListMLE": partial(larpo, objective="listmle"),
    "LiPO-lambda": lipo_lambda,
    "SimPO": simpo,
    "RRHF": rrhf,
    "PRO": pro,
}


class Start(NamedTuple):
    """What all arms of a seed start from."""

    tokenizer: Any
    policy: Any
    lists: list[PromptList]  # trained on
    held_out: list[PromptList]


@dataclass
class Objectives(Recipe):
    """Every objective over the same lists of the naming task, each with the beta of its definition."""

    name = "objectives"
    heading = "objective"
    digits: ClassVar[dict[str, int]] = {"margin, nats": 1, "KL to start, nats": 2}
    objectives: Sequence[str] = tuple(OBJECTIVES)
    train_lists: int = 256
    test_lists: int = 128
    list_size: int = 6
    steps: int = 48
    batch_size: int = 16
    learning_rate: float = 3e-4
    fit_steps: int = 300
    drawn_per_prompt: int = 8

    def start(self, seed: int) -> Start:
        tokenizer = naming.tokenizer()
        return Start(
            tokenizer,
            naming.start_policy(tokenizer, seed=seed, steps=self.fit_steps),
            naming.lists(tokenizer, self.train_lists, self.list_size, seed=1000 + seed),
            naming.lists(tokenizer, self.test_lists, self.list_size, seed=2000 + seed),
        )

    def arms(self) -> dict[str, Arm]:
        losses = {"start policy": None} | {name: OBJECTIVES[name] for name in self.objectives}
        return {name: partial(self.trained, loss=loss) for name, loss in losses.items()}

    def trained(self, start: Start, seed: int, *, loss: Loss | None) -> Row:
        """loss: None measures the start policy, and orders the lists by its log-likelihoods."""
        model, counts = copy.deepcopy(start.policy), {}
        if loss is not None:
            settings = dict(max_steps=self.steps, per_device_train_batch_size=self.batch_size, learning_rate=self.learning_rate)
            counts = {"counts": train(model, start.tokenizer, start.lists, loss, seed=seed, **settings)}
        test = dict(tokenizer=start.tokenizer, held_out=start.held_out, drawn_per_prompt=self.drawn_per_prompt, seed=seed)
        return measure(model, loss or by_likelihood, start=start.policy, **test) | counts

    def columns(self, row: Row) -> Columns:
        return {
            "NDCG, held out": row["ndcg"],
            "margin, nats": row["margin"],
            "reward of completions drawn": row["reward"],
            "KL to start, nats": row["kl"],
        }

    def notes(self, rows: Sequence[Row]) -> list[str]:
        return [counts_in_words(row["counts"] for row in rows if "counts" in row)]

    def plot(self, figure, rows: Sequence[Row]) -> None:
        axes = figure.subplots()
        for name, found in report.by_arm(rows).items():
            axes.scatter([row["kl"] for row in found], [row["reward"] for row in found], label=name, s=24)
        axes.set(xlabel="KL to the start policy, nats per completion", ylabel="reward of completions drawn")
        axes.legend(fontsize=7)


def by_likelihood(logps, *_) -> tuple[None, Tensor]:
    """No loss: lists are ordered by the log-likelihoods as they are."""
    return None, logps


def measure(model, loss: Loss, *, start, tokenizer, held_out, drawn_per_prompt: int, seed: int) -> dict[str, float]:
    """ndcg: of held-out lists, ordered by the objective's own scores. margin: mean l - l_ref of the best candidates minus that
    of the others, nats. reward, kl: of completions drawn, that many for every prompt, and to the start policy."""
    relevance = torch.tensor([c.score for one in held_out for c in one.candidates])
    sizes = torch.tensor([len(one.candidates) for one in held_out])
    ref_logps, lengths = logps_of(start, tokenizer, held_out)
    logps, _ = logps_of(model, tokenizer, held_out)
    _, scores = loss(logps, ref_logps, lengths, relevance, sizes)
    sampler = TransformersSampler(detach(model), tokenizer, naming.MOST_WORDS + 1, batch_size=1024)
    drawn = naming.scored(naming.PROMPTS, sampler(naming.PROMPTS, drawn_per_prompt, 1.0, seed=seed))
    ours, theirs = (logps_of(one, tokenizer, drawn)[0].numpy() for one in (model, start))
    return {
        "ndcg": list_metrics(scores, relevance, sizes)["ndcg"],
        "margin": list_metrics(logps - ref_logps, relevance, sizes)["rewards/margins"],
        "reward": sum(c.score for one in drawn for c in one.candidates) / (drawn_per_prompt * len(drawn)),
        "kl": kl_estimate(ours, theirs).mean,
    }


run, main = commands(Objectives)

if __name__ == "__main__":
    main()
