"""Feedback on answers to the naming task, word by word, and a start policy that can make something of it.

    name animals and tools | dog good red off emu best | better

asks for a better answer than "dog red emu". Marks of words: best and good (worth 3 and 1), off (no topic that was asked for),
again (said before), long (after the third). The marks tell all that `naming.reward` does, and where; "?" in place of each is
feedback that tells nothing.

The speaker of the naming task heeds marks nineteen times out of twenty: keeps words that are good or best, and puts others in
place of those that are off or said again. Otherwise, and where all marks are "?", a coin decides for each word whether it is
kept. Whatever the marks, words after the third are left out, and where there are fewer than three, one is added. Words put in
are the speaker's own, so the worthy ones are as rare there as in first answers.
"""

from __future__ import annotations

import random

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from . import naming, toy_lm
from .naming import MOST_WORDS, PROMPTS, TOPICS, WORDS, WORTH

MARKS = BEST, GOOD, OFF, AGAIN, LONG = "best", "good", "off", "again", "long"
UNSAID, NOTHING = "?", "nothing"  # no mark; no words
HEED = 0.95


def marks(prompt: str, completion: str) -> list[str]:
    """A mark for each word.

    >>> marks("name animals", "dog red emu yak"), marks("name animals", "dog dog")
    (['good', 'off', 'best', 'long'], ['good', 'again'])
    """
    worth, words = naming.worth_of_words(prompt), completion.split()
    found: list[str] = []
    for i, word in enumerate(words):
        if i >= MOST_WORDS:
            found.append(LONG)
        elif word not in worth:
            found.append(OFF)
        elif word in words[:i]:
            found.append(AGAIN)
        else:
            found.append(BEST if worth[word] == max(WORTH) else GOOD)
    return found


def ask(prompt: str, completion: str, *, blank: bool = False) -> str:
    """The prompt for a better answer than this completion; blank: with "?" for every mark.

    >>> ask("name animals", "dog red"), ask("name animals", "", blank=True)
    ('name animals | dog good red off | better', 'name animals | nothing | better')
    """
    marked = [
        f"{word} {UNSAID if blank else mark}" for word, mark in zip(completion.split(), marks(prompt, completion), strict=True)
    ]
    return f"{prompt} | {' '.join(marked) or NOTHING} | better"


def tokenizer() -> PreTrainedTokenizerFast:
    return toy_lm.tokenizer(["name", "and", *TOPICS, *WORDS, "|", "better", *MARKS, UNSAID, NOTHING])


def rewritten(prompt: str, completion: str, draw: random.Random, *, blank: bool) -> str:
    """The speaker's better answer, by the rule above."""
    heeds = not blank and draw.random() < HEED
    new = []
    for word, mark in zip(completion.split()[:MOST_WORDS], marks(prompt, completion), strict=False):
        kept = mark in (BEST, GOOD) if heeds else draw.random() < 0.5
        new.append(word if kept else _word(prompt, draw))
    return " ".join([*new, _word(prompt, draw)][:MOST_WORDS])


def _word(prompt: str, draw: random.Random) -> str:
    return naming.spoken_answer(prompt, draw).split()[0]


def start_policy(tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int = 600) -> PreTrainedModel:
    """A tiny LM fitted to the speaker's first answers, and to the speaker's better answers with marks and with "?"."""
    draw = random.Random(seed)
    texts = [(prompt, naming.spoken_answer(prompt, draw)) for prompt in PROMPTS for _ in range(200)]
    for prompt in PROMPTS:
        for i in range(1000):
            answer = naming.spoken_answer(prompt, draw) if i % 2 else naming.random_words(draw, 0, MOST_WORDS + 1)
            blank = i % 3 == 0
            texts.append((ask(prompt, answer, blank=blank), rewritten(prompt, answer, draw, blank=blank)))
    return toy_lm.fitted(tokenizer, texts, seed=seed, steps=steps, learning_rate=6e-3)
