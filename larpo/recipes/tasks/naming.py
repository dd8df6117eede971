"""The toy task of the recipes that train on lists: "name animals and colours", with a reward that can be checked.

A completion is up to three words. Each word on a topic that was asked for earns its worth, once; a word off topic, a repeated
one and every word after the third cost 1. The reward is what was earned, at least 0, over what is possible: in [0, 1].

The speaker whose text the start policy is fitted to knows the cheap words best: of a topic's six words, the k-th is said half
as often as the one before, and the last two earn three times as much. So the best completions are rare at the start: a
policy that only sharpens what it says already does not find them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from larpo.candidates import Candidate, PromptList

from . import toy_lm

TOPICS = {
    "animals": ("dog", "cat", "cow", "owl", "yak", "emu"),
    "colours": ("red", "blue", "green", "pink", "teal", "ochre"),
    "foods": ("bread", "rice", "soup", "figs", "leek", "quince"),
    "tools": ("saw", "axe", "drill", "file", "awl", "adze"),
}
WORTH = (1, 1, 1, 1, 3, 3)
FREQUENCIES = (32, 16, 8, 4, 2, 1)  # of a topic's words in the speaker's answers, relative
MOST_WORDS = 3
PROMPTS = [f"name {topic}" for topic in TOPICS] + [f"name {a} and {b}" for a, b in combinations(TOPICS, 2)]
WORDS = [word for words in TOPICS.values() for word in words]


def worth_of_words(prompt: str) -> dict[str, int]:
    """What each word on the topics of this prompt is worth."""
    return {word: worth for topic in TOPICS if topic in prompt for word, worth in zip(TOPICS[topic], WORTH, strict=True)}


def reward(prompt: str, completion: str) -> float:
    """The reward in [0, 1] by the rule above.

    >>> reward("name animals", "dog cat emu"), reward("name animals", "dog red"), reward("name animals", "")
    (0.7142857142857143, 0.0, 0.0)
    """
    worth, words = worth_of_words(prompt), completion.split()
    earned = sum(worth[w] if w in worth and w not in words[:i] and i < MOST_WORDS else -1 for i, w in enumerate(words))
    return max(0, earned) / (3 + 3 + 1 if prompt.count("and") == 0 else 9)


def tokenizer() -> PreTrainedTokenizerFast:
    return toy_lm.tokenizer(["name", "and", *TOPICS, *WORDS])


def spoken_answer(prompt: str, draw: random.Random) -> str:
    """What the speaker answers: one to three words, each on topic four times out of five."""
    asked = [topic for topic in TOPICS if topic in prompt]
    topics = [draw.choice(asked if draw.random() < 0.8 else list(TOPICS)) for _ in range(draw.randint(1, MOST_WORDS))]
    return " ".join(draw.choices(TOPICS[topic], FREQUENCIES)[0] for topic in topics)


def random_words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def start_policy(tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int = 300) -> PreTrainedModel:
    """A tiny LM fitted to the speaker's text."""
    draw = random.Random(seed)
    texts = [(prompt, spoken_answer(prompt, draw)) for prompt in PROMPTS for _ in range(200)]
    return toy_lm.fitted(tokenizer, texts, seed=seed, steps=steps)


def lists(tokenizer: PreTrainedTokenizerFast, n: int, m: int, *, seed: int) -> list[PromptList]:
    """n lists of m scored candidates: half of each is what the speaker says, the others are words at random."""
    draw = random.Random(seed)
    made = []
    for i in range(n):
        prompt = PROMPTS[i % len(PROMPTS)]
        texts = [spoken_answer(prompt, draw) if j % 2 else random_words(draw, 1, MOST_WORDS) for j in range(m)]
        candidates = [
            Candidate(text, reward(prompt, text), completion_ids=tuple(toy_lm.completion_ids(tokenizer, text, end=True)))
            for text in texts
        ]
        made.append(PromptList(prompt, tuple(candidates), prompt_ids=tuple(toy_lm.prompt_ids(tokenizer, prompt))))
    return made


def scored(prompts: Sequence[str], completions: Sequence[Sequence], source: str = "") -> list[PromptList]:
    """Lists of what a sampler gave (`larpo.sampling.Sampled`), with exact tokens and rewards."""
    return [
        PromptList(
            prompt,
            tuple(Candidate(c.text, reward(prompt, c.text), source, completion_ids=c.token_ids) for c in sampled),
            prompt_ids=sampled[0].prompt_ids,
        )
        for prompt, sampled in zip(prompts, completions, strict=True)
    ]
