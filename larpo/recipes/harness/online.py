"""The on-policy loop of the exploration recipes: sample, reward, train against the policy as it was, again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from larpo.candidates import PromptList
from larpo.modeling.policy import detach
from larpo.sampling import Sampler, TransformersSampler

from ..tasks import naming

Train = Callable[[list[PromptList], int], dict[str, int]]  # (this round's lists, its seed) -> counts; trains in place
# (the policy's sampler, this round's lists of k first answers, its seed) -> (lists to train on, measures of the round)
Source = Callable[[Sampler, list[PromptList], int], tuple[list[PromptList], dict[str, float]]]


def explore(
    model,
    tokenizer,
    train: Train,
    *,
    rounds: int,
    k: int,
    seed: int,
    prompts: Sequence[str] = tuple(naming.PROMPTS),
    source: Source = lambda sampler, lists, seed: (lists, {}),
) -> dict[str, Any]:
    """Rounds of k completions per prompt at temperature 1; what each round sampled, before it is trained on.

    source: makes the candidates that are trained on out of these first answers; without it they are the candidates.

    Returns lists of rounds + 1 values: of the first answers reward (mean) and distinct (share of a round's completions that
    differ); of the candidates worthy (different rewarded completions found so far) and best (mean over prompts of the best
    reward found so far); and what the source measures; and counts.
    """
    curves: dict[str, list[float]] = {"reward": [], "distinct": [], "worthy": [], "best": []}
    counts: Counter[str] = Counter()
    found: dict[tuple[str, str], float] = {}
    for t in range(rounds + 1):
        sampler = TransformersSampler(detach(model), tokenizer, naming.MOST_WORDS + 1, batch_size=1024)
        lists = naming.scored(prompts, sampler(prompts, k, 1.0, seed=1000 * seed + t), source=str(t))
        drawn = [(one.prompt, c.completion, c.score) for one in lists for c in one.candidates]
        lists, measures = source(sampler, lists, 1000 * seed + t)
        found |= {(one.prompt, c.completion): c.score for one in lists for c in one.candidates}
        for name, value in measures.items():
            curves.setdefault(name, []).append(value)
        curves["reward"].append(sum(score for *_, score in drawn) / len(drawn))
        curves["distinct"].append(len({(prompt, text) for prompt, text, _ in drawn}) / len(drawn))
        curves["worthy"].append(sum(score > 0 for score in found.values()))
        best = [max(score for (p, _), score in found.items() if p == prompt) for prompt in prompts]
        curves["best"].append(sum(best) / len(best))
        if t < rounds:
            counts.update(train(lists, 1000 * seed + t))
    return {**curves, "counts": dict(counts)}


def compare(
    arms: dict[str, Callable[[Any, Any], Train]],
    seeds: Sequence[int],
    *,
    rounds: int,
    k: int,
    fit_steps: int,
    name: str,
    sources: Mapping[str, Source] | None = None,
    start=naming,
) -> dict[str, Any]:
    """Every arm from each seed's start policy. arms: name -> (model, tokenizer) -> how that arm trains.

    sources: where an arm's candidates come from, see `explore`. start: a module with `tokenizer` and `start_policy`.
    """
    import copy

    from tqdm import tqdm

    from . import report
    from .trainer import said

    tokenizer = start.tokenizer()
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tqdm(total=len(seeds) * len(arms), desc=name, unit="run") as bar:
        for seed in seeds:
            first = start.start_policy(tokenizer, seed=seed, steps=fit_steps)
            for arm, trained_by in arms.items():
                model = copy.deepcopy(first)
                own = {"source": sources[arm]} if sources else {}
                runs[arm].append(explore(model, tokenizer, trained_by(model, tokenizer), rounds=rounds, k=k, seed=seed, **own))
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


PANELS = (
    ("reward", "mean reward"),
    ("distinct", "share of distinct completions"),
    ("worthy", "rewarded completions found"),
)


def plot(figure, result: dict[str, Any], panels: Sequence[tuple[str, str]] = PANELS) -> None:
    """A panel per curve of `explore` (its name, a title), with the arms that have it, in the same colours everywhere."""
    from .report import band

    axes = figure.subplots(1, len(panels))
    for one, (key, label) in zip(axes, panels, strict=True):
        for place, (arm, found) in enumerate(result["runs"].items()):
            if curves := [run[key] for run in found if key in run]:
                band(one, range(len(curves[0])), curves, arm, color=f"C{place}")
        one.set(xlabel="round", title=label)
        one.title.set_size(9)
    handles, arms = axes[0].get_legend_handles_labels()
    figure.legend(handles, arms, loc="outside lower center", ncols=len(arms), fontsize=7)
