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

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import larpo_kernels as lk

from .harness import report
from .harness.lists import best, ideal_dcg, implicit_rewards, pairs

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
    """The margin is taken off the best candidate's score: so it works in any of the list objectives."""
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


# --- the run: equal data, equal steps ----------------------------------------------------------------------------


def run(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    objectives: Sequence[str] = tuple(OBJECTIVES),
    train_lists: int = 256,
    test_lists: int = 128,
    list_size: int = 6,
    steps: int = 48,
    batch_size: int = 16,
    learning_rate: float = 3e-4,
    fit_steps: int = 300,
    drawn_per_prompt: int = 8,
) -> dict[str, Any]:
    """Every objective from the same start policy over the same lists; the naming task of `larpo.recipes.tasks.naming`.

    Per objective and seed: ndcg of held-out lists ordered by the objective's own scores; margin = mean (l - l_ref) of the best
    candidates minus that of the others, nats; reward of and KL to the start policy in drawn_per_prompt completions per prompt.
    """
    import copy

    from tqdm import tqdm

    from .harness.trainer import said, train
    from .tasks import naming

    tokenizer = naming.tokenizer()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ["start policy", *objectives]}
    counted: Counter[str] = Counter()
    with tqdm(total=len(seeds) * len(objectives), desc="objectives", unit="run") as bar:
        for seed in seeds:
            start = naming.start_policy(tokenizer, seed=seed, steps=fit_steps)
            data = naming.lists(tokenizer, train_lists, list_size, seed=1000 + seed)
            test = dict(
                start=start,
                tokenizer=tokenizer,
                held_out=naming.lists(tokenizer, test_lists, list_size, seed=2000 + seed),
                drawn_per_prompt=drawn_per_prompt,
                seed=seed,
            )
            runs["start policy"].append(measure(start, lambda logps, *_: (None, logps), **test))
            for name in objectives:
                model, loss = copy.deepcopy(start), OBJECTIVES[name]
                counted.update(
                    train(
                        model, tokenizer, data, loss, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed
                    )
                )
                runs[name].append(measure(model, loss, **test))
                bar.update()
    table = [
        {
            "objective": name,
            "NDCG, held out": report.over_seeds([x["ndcg"] for x in found]),
            "margin, nats": report.over_seeds([x["margin"] for x in found], 1),
            "reward of completions drawn": report.over_seeds([x["reward"] for x in found]),
            "KL to start, nats": report.over_seeds([x["kl"] for x in found], 2),
        }
        for name, found in runs.items()
    ]
    return {
        "settings": dict(
            train_lists=train_lists, test_lists=test_lists, list_size=list_size, steps=steps, batch_size=batch_size,
            learning_rate=learning_rate,
        ),
        "runs": runs,
        "table": table,
        "notes": [said(counted)],
    }  # fmt: skip


def measure(model, loss, *, start, tokenizer, held_out, drawn_per_prompt: int, seed: int) -> dict[str, float]:
    """What a run's table shows, of one policy: see `run`."""
    from larpo.modeling.policy import detach
    from larpo.retrieval import kl_estimate
    from larpo.sampling import TransformersSampler
    from larpo.training.metrics import list_metrics

    from .harness.trainer import logps_of
    from .tasks import naming

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


def plot(figure, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    for name, found in result["runs"].items():
        axes.scatter([x["kl"] for x in found], [x["reward"] for x in found], label=name, s=24)
    axes.set(xlabel="KL to the start policy, nats per completion", ylabel="reward of completions drawn")
    axes.legend(fontsize=7)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return report.main(argv, name="objectives", doc=__doc__, run=run, plot=plot)


if __name__ == "__main__":
    main()
