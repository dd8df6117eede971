"""The on-policy loop of the exploration recipes: sample, reward, train against the policy as it was, again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from larpo.candidates import PromptList
from larpo.policy import detach
from larpo.sampling import TransformersSampler

from . import naming

Train = Callable[[list[PromptList], int], dict[str, int]]  # (this round's lists, its seed) -> counts; trains in place


def explore(
    model, tokenizer, train: Train, *, rounds: int, k: int, seed: int, prompts: Sequence[str] = tuple(naming.PROMPTS)
) -> dict[str, Any]:
    """Rounds of k completions per prompt at temperature 1; what each round sampled, before it is trained on.

    Returns lists of rounds + 1 values: reward (mean), distinct (share of a round's completions that differ), worthy (different
    rewarded completions found so far), best (mean over prompts of the best reward found so far); and counts.
    """
    curves: dict[str, list[float]] = {"reward": [], "distinct": [], "worthy": [], "best": []}
    counts: Counter[str] = Counter()
    found: dict[tuple[str, str], float] = {}
    for t in range(rounds + 1):
        sampler = TransformersSampler(detach(model), tokenizer, naming.MOST_WORDS + 1, batch_size=1024)
        lists = naming.scored(prompts, sampler(prompts, k, 1.0, seed=1000 * seed + t), source=str(t))
        drawn = [(one.prompt, c.completion, c.score) for one in lists for c in one.candidates]
        found |= {(prompt, text): score for prompt, text, score in drawn}
        curves["reward"].append(sum(score for *_, score in drawn) / len(drawn))
        curves["distinct"].append(len({(prompt, text) for prompt, text, _ in drawn}) / len(drawn))
        curves["worthy"].append(sum(score > 0 for score in found.values()))
        best = [max(score for (p, _), score in found.items() if p == prompt) for prompt in prompts]
        curves["best"].append(sum(best) / len(best))
        if t < rounds:
            counts.update(train(lists, 1000 * seed + t))
    return {**curves, "counts": dict(counts)}


def compare(
    arms: dict[str, Callable[[Any, Any], Train]], seeds: Sequence[int], *, rounds: int, k: int, fit_steps: int, name: str
) -> dict[str, Any]:
    """Every arm from each seed's start policy. arms: name -> (model, tokenizer) -> how that arm trains."""
    import copy

    from tqdm import tqdm

    from . import report
    from .trainer import said

    tokenizer = naming.tokenizer()
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tqdm(total=len(seeds) * len(arms), desc=name, unit="run") as bar:
        for seed in seeds:
            start = naming.start_policy(tokenizer, seed=seed, steps=fit_steps)
            for arm, trained_by in arms.items():
                model = copy.deepcopy(start)
                runs[arm].append(explore(model, tokenizer, trained_by(model, tokenizer), rounds=rounds, k=k, seed=seed))
                bar.update()
    counts = sum((Counter(one["counts"]) for found in runs.values() for one in found), Counter())
    table = [
        {
            "arm": arm,
            "reward, last round": report.over_seeds([x["reward"][-1] for x in found]),
            "distinct, last round": report.over_seeds([x["distinct"][-1] for x in found]),
            "rewarded completions found": report.over_seeds([x["worthy"][-1] for x in found], 0),
            "best found, mean over prompts": report.over_seeds([x["best"][-1] for x in found]),
        }
        for arm, found in runs.items()
    ]
    return {"runs": runs, "table": table, "notes": [said(Counter(counts))]}


def plot(figure, result: dict[str, Any]) -> None:
    from .report import band

    panels = figure.subplots(1, 3)
    for axes, (key, label) in zip(
        panels,
        [("reward", "mean reward"), ("distinct", "share of distinct completions"), ("worthy", "rewarded completions found")],
        strict=True,
    ):
        for arm, found in result["runs"].items():
            curves = [one[key] for one in found]
            band(axes, range(len(curves[0])), curves, arm)
        axes.set(xlabel="round", title=label)
        axes.title.set_size(9)
    panels[0].legend(fontsize=7)
