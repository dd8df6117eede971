"""Objectives of lists, and lists to try them on."""

import torch

import larpo_kernels as lk

OBJECTIVES = {
    "pairwise": lk.Pairwise(),
    "contrastive": lk.Contrastive(),
    "listmle": lk.ListMLE(),
    "lambdarank": lk.LambdaRank(),
    "lambdarank_dcg": lk.LambdaRank(weighting="dcg"),
    "lambdarank_dcg_k": lk.LambdaRank(weighting="dcg", k=2),
    "lambdarank_dcg2": lk.LambdaRank(weighting="dcg2"),
    "lambdarank_dcg2_k": lk.LambdaRank(weighting="dcg2", k=2),
    "listnet": lk.ListNet(),
    "listnet_cold": lk.ListNet(temperature=0.25),
}
TIES = {
    "pairwise_skip": lk.Pairwise(ties="skip"),
    "pairwise_mean": lk.Pairwise(ties="mean"),
    "contrastive_skip": lk.Contrastive(ties="skip"),
    "contrastive_mean": lk.Contrastive(ties="mean"),
    "listmle_skip": lk.ListMLE(ties="skip"),
    "listmle_efron": lk.ListMLE(ties="efron"),
}
EVERY = {**OBJECTIVES, **TIES}
NAMES = ["pairwise", "contrastive", "listmle", "lambdarank", "listnet"]
VARIED = [*NAMES, lk.LambdaRank(weighting="dcg"), lk.LambdaRank(weighting="dcg2", k=2), lk.ListNet(temperature=0.5)]
PLAIN = ["pairwise", "contrastive", "listmle", "lambdarank"]  # the paper's: relevance only orders the list
# Three candidates; by falling relevance their scores are 1, 3, 2.
SCORES, RELEVANCE = [2.0, 1.0, 3.0], [0.1, 0.9, 0.5]


def graded_lists(list_sizes, seed=0, dtype=torch.float64):
    """scores and relevance grades 0..3 (ties included) of the given lists."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(sum(list_sizes), generator=generator, dtype=torch.float64)
    relevance = torch.randint(0, 4, (sum(list_sizes),), generator=generator)
    return scores.to(dtype), relevance.to(dtype)
