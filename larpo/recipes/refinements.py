"""Refinements as candidates: the policy is asked for a better answer than its own, given feedback on it.

`refine` works with any sampler, feedback, reward and objective. For a chat model and a critique in words:

    def ask(prompt, candidate):
        return [*prompt, *candidate.completion, {"role": "user", "content": f"{critique(candidate)} Answer again."}]

    lists, gains, counts = refine(TransformersSampler(model, tokenizer, 256), lists, ask, reward, seed=0)
    LarPOTrainer(model, args=config, train_dataset=Dataset.from_list(to_rows(lists)), processing_class=tokenizer).train()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from larpo.candidates import Candidate, PromptList, deduplicate, rank, top_bottom
from larpo.rewards import Reward, Text, score, text_of
from larpo.sampling import Sampled, Sampler

ORIGINAL, REFINEMENT = "original", "refinement"  # `Candidate.source`

Ask = Callable[[Text, Candidate], Text]  # (prompt, one of its candidates) -> the prompt for a better one: both and a critique


class Refined(NamedTuple):
    lists: list[PromptList]  # originals and refinements as one list per prompt, ranked by the reward
    gains: list[float]  # of each refinement sampled: its reward less its original's, where both have one
    counts: dict[str, int]  # refinements; of them empty, unchanged; duplicates, no longer in the lists; unscored, there


def refine(
    sampler: Sampler,
    lists: Sequence[PromptList],
    ask: Ask,
    reward: Reward | Sequence[Reward],
    *,
    k: int = 1,
    promising: int | None = None,
    temperature: float = 1.0,
    seed: int,
) -> Refined:
    """Adds refinements of its candidates to every list, which keeps its prompt and prompt_ids.

    A refinement has the tokens that were sampled, or no completion_ids where its original has none: a list has exact tokens
    for all candidates or for none. `source` says which is which; an original that has a source already keeps it. Of equal
    candidates, such as an original and a refinement that repeats it, the first stays and the others are counted. Empty
    refinements and lists without candidates stay. So do candidates to which the reward gives None: they come last, and are
    counted (`larpo.candidates.rank` drops them).

    Args:
        sampler: draws from the policy.
        lists: the policy's own answers.
        ask: the prompt for a better answer, of the same kind as the list's prompt: text, or messages.
        reward: see `larpo.rewards`; asked about all candidates without a score.
        k: refinements of each candidate.
        promising: refines only that many of the best of each list; None for all.
        temperature, seed: the sampler's.
    """
    if k < 1 or (promising is not None and promising < 1):
        raise ValueError(f"expected k >= 1 and promising >= 1 or None, got k={k} and promising={promising}")
    marked = [tuple(replace(c, source=c.source or ORIGINAL) for c in one.candidates) for one in lists]
    lists = _scored([replace(a, candidates=b) for a, b in zip(lists, marked, strict=True)], reward)
    chosen = lists if promising is None else top_bottom(lists, promising, 0)
    asked = [(i, old) for i, one in enumerate(chosen) for old in one.candidates]
    sampled = sampler([ask(lists[i].prompt, old) for i, old in asked], k, temperature, seed=seed) if asked else []
    drawn: list[list[tuple[Candidate, Candidate]]] = [[] for _ in lists]  # originals with their refinements
    for (i, old), several in zip(asked, sampled, strict=True):
        drawn[i] += [(old, _refinement(old, one)) for one in several]
    refined = _scored([replace(a, candidates=tuple(new for _, new in b)) for a, b in zip(lists, drawn, strict=True)], reward)
    pools = [replace(a, candidates=a.candidates + b.candidates) for a, b in zip(lists, refined, strict=True)]
    distinct, duplicates = deduplicate(pools)
    ranked, unscored = rank(distinct, unscored="last")
    olds, news = [old for one in drawn for old, _ in one], [new for one in refined for new in one.candidates]
    both = list(zip(olds, news, strict=True))
    return Refined(
        ranked,
        [new.score - old.score for old, new in both if new.score is not None and old.score is not None],
        {
            "refinements": len(news),
            "empty": sum(not text_of(new.completion) for new in news),
            "unchanged": sum(text_of(new.completion) == text_of(old.completion) for old, new in both),
            "duplicates": duplicates,
            "unscored": unscored,
        },
    )


def _refinement(original: Candidate, sampled: Sampled) -> Candidate:
    """The refinement in the form of its original: text or a message, with or without tokens."""
    return Candidate(
        sampled.text if isinstance(original.completion, str) else [{"role": "assistant", "content": sampled.text}],
        source=REFINEMENT,
        completion_ids=None if original.completion_ids is None else sampled.token_ids,
    )


def _scored(lists: Sequence[PromptList], reward: Reward | Sequence[Reward]) -> list[PromptList]:
    """The lists with a reward for every candidate that had none."""
    asked = [(one.prompt, c.completion) for one in lists for c in one.candidates if c.score is None]
    given = iter(score(reward, None, [prompt for prompt, _ in asked], [completion for _, completion in asked]))
    return [
        replace(one, candidates=tuple(replace(c, score=next(given)) if c.score is None else c for c in one.candidates))
        for one in lists
    ]
