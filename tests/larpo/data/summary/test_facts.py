"""Each fact of a few lists against arithmetic written out."""

import json

import numpy as np
import pytest

import larpo
from larpo import LarPOConfig
from larpo.data.summary import DataSummary
from larpo.data.summary.spread import spread_of
from larpo.data.tokenization import tokenize_row
from tests.helpers import tiny
from tests.helpers.jsonl import write_jsonl


def settings(**options):
    return LarPOConfig(report_to=[], use_cpu=True, **options)


LISTS = [
    {"prompt": "the cat", "completions": [" sat", " sat", " ran to the red house", " is"], "scores": [2.0, 0.0, 3.0, 2.0]},
    {"prompt": "a dog", "completions": [" good film", " bad"], "scores": [1.0, 1.0]},
    {"prompt": "the cat", "completions": [" was one two three four"], "scores": [5.0]},
    {"prompt": "one film", "completions": ["", " was good"], "scores": [4.0, 0.5]},
]


def test_lists_repeats_and_ties():
    found = larpo.describe(LISTS, tiny.tokenizer(), settings())
    assert (found.lists, found.lists_read, found.candidates, found.lists_of_one) == (4, 4, 9, 1)
    assert found.sizes.bars == ((1, 1, 1), (2, 2, 2), (4, 4, 1))
    assert (found.prompts_repeated, found.completions_repeated) == (1, 1)  # the third row's, the first row's second
    assert (found.lists_all_tied, found.lists_some_tied) == (1, 1)
    assert (found.pairs, found.pairs_tied) == (6 + 1 + 1, 1 + 1)
    assert found.scores.bars == ((0, 0, 1), (0.5, 0.5, 1), (1, 1, 2), (2, 2, 2), (3, 3, 1), (4, 4, 1), (5, 5, 1))
    assert found.refused is None and found.left_out == () and found.form == "lists"


def test_tokens_are_those_of_training():
    """Prompts and answers before they are cut, and what is left of them."""
    limits = dict(max_length=5, max_prompt_length=1)
    rows = [tokenize_row(row, tiny.tokenizer(), max_length=None, max_prompt_length=None) for row in LISTS]
    cut = [tokenize_row(row, tiny.tokenizer(), **limits) for row in LISTS]
    whole, kept = ([len(ids) for row in found for ids in row["completion_ids"]] for found in (rows, cut))
    prompts, kept_prompts = ([len(row["prompt_ids"]) for row in found] for found in (rows, cut))
    found = larpo.describe(LISTS, tiny.tokenizer(), settings(**limits))
    for spread, lengths in ((found.completion_tokens, whole), (found.prompt_tokens, prompts)):
        assert (spread.least, spread.most, spread.median) == (min(lengths), max(lengths), np.median(lengths))
        assert spread.mean == pytest.approx(sum(lengths) / len(lengths))
    assert found.prompts_cut == sum(a > b for a, b in zip(prompts, kept_prompts, strict=True)) > 0
    assert found.completions_cut == sum(a > b for a, b in zip(whole, kept, strict=True)) > 0
    assert found.completions_empty == 1 and found.completions_with_turns == 0
    assert (found.tokens_counted, found.tokens_read) == (sum(kept), 0)
    sizes = [len(row["scores"]) for row in LISTS]
    assert found.tokens_run == sum(kept) + sum(a * b for a, b in zip(kept_prompts, sizes, strict=True))


def test_answers_that_cutting_makes_equal_are_counted_apart_from_those_that_are():
    row = {"prompt": "the cat", "completions": [" one two three", " one two four", " one two three"], "scores": [1.0, 2.0, 3.0]}
    roomy, tight = (larpo.describe([row, *LISTS], tiny.tokenizer(), settings(max_length=n)) for n in (64, 4))
    assert (roomy.completions_repeated, roomy.completions_equal) == (2, 2)
    assert tight.completions_repeated == 2 and tight.completions_equal >= 3
    assert roomy.lists_all_equal == 0 and tight.lists_all_equal >= 1


def test_whether_the_best_is_the_longest():
    """Of the lists in which scores differ: in the first it is, in the last the worst is."""
    found = larpo.describe(LISTS, tiny.tokenizer(), settings())
    tokens = [[len(ids) for ids in tokenize_row(row, tiny.tokenizer())["completion_ids"]] for row in LISTS]
    assert found.best_is_longest == 1
    assert found.best_tokens == pytest.approx((tokens[0][2] + tokens[3][0]) / 2)
    assert found.worst_tokens == pytest.approx((tokens[0][1] + tokens[3][1]) / 2)


def test_what_the_policy_reads_is_not_counted_and_marked_so():
    from tests.larpo.data.test_turns import CALLS, rows_of_dialogues, with_template

    tokenizer, rows = with_template(CALLS), rows_of_dialogues()
    found = larpo.describe(rows, tokenizer, settings())
    masks = [mask for row in larpo.as_lists(rows) for mask in tokenize_row(row, tokenizer).get("completion_mask", ())]
    assert found.tokens_read == sum(len(mask) - sum(mask) for mask in masks) > 0
    counted = {counted for example in found.examples for answer in example.answers for counted, _ in answer.parts}
    assert counted == {True, False}


def test_examples_show_the_best_first_and_what_was_cut():
    found = larpo.describe(LISTS[:1], tiny.tokenizer(), settings(max_length=5, max_prompt_length=1))
    (example,) = found.examples
    assert [answer.score for answer in example.answers] == [3.0, 2.0, 2.0, 0.0]
    row = tokenize_row(LISTS[0], tiny.tokenizer(), max_length=5, max_prompt_length=1)
    whole = tokenize_row(LISTS[0], tiny.tokenizer(), max_length=None, max_prompt_length=None)
    assert example.prompt_cut == len(whole["prompt_ids"]) - len(row["prompt_ids"]) > 0
    best = example.answers[0]
    assert (best.tokens, best.cut) == (len(row["completion_ids"][2]), len(whole["completion_ids"][2]) - best.tokens)
    assert best.parts == ((True, tiny.tokenizer().decode(row["completion_ids"][2])),)


def test_the_form_and_what_is_left_out_are_told():
    rows = [{"question": f"q {i}", "answers": [{"text": " a", "votes": i}, {"text": " b", "votes": 1}]} for i in range(3)]
    rows[1]["answers"] = []
    columns = {"prompt": "question", "completions": "answers[].text", "scores": "answers[].votes"}
    found = larpo.describe(rows, tiny.tokenizer(), settings(), columns=columns, bad_rows="drop", limit=1)
    (left,) = found.left_out
    assert (left.what, left.count, left.first) == ("row", 1, "row 1")
    assert (found.lists, found.lists_read) == (1, 2)
    assert "votes" in found.scored_by


def test_streams_and_mixtures_are_described_too(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", LISTS)
    whole = larpo.describe(str(file), tiny.tokenizer(), settings())
    stream = larpo.describe(str(file), tiny.tokenizer(), settings(), streaming=True, limit=3)
    assert (stream.lists, stream.lists_read, stream.candidates) == (3, None, 7)
    mixed = larpo.describe([{"path": str(file)}, {"path": str(file), "weight": 2}], tiny.tokenizer(), settings(), seed=1)
    assert mixed.lists >= 2 * whole.lists and mixed.scores.bars[-1][0] == 5


def test_data_that_training_refuses_is_described_all_the_same():
    found = larpo.describe([{"prompt": "a", "completions": [" b", " b"], "scores": [1.0, 0.0]}], tiny.tokenizer(), settings())
    assert "nothing to learn from" in found.refused and found.lists_all_equal == 1


def test_facts_survive_a_file_of_json():
    found = larpo.describe(LISTS, tiny.tokenizer(), settings())
    assert DataSummary.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("limit", [0, True, 1.5])
def test_a_limit_that_is_no_count_is_refused(limit):
    with pytest.raises(ValueError, match="limit must be None or an int >= 1"):
        larpo.describe(LISTS, tiny.tokenizer(), settings(), limit=limit)


@pytest.mark.parametrize(
    "numbers",
    [
        np.arange(1000),
        np.r_[np.arange(100), [10**6]],
        np.linspace(-1, 1, 500) ** 3,
        np.r_[np.linspace(0, 1, 999), 1e9],
        np.array([-1.7e308, *range(50), 1.7e308, 1.7e308]),
        np.array([7]),
    ],
    ids=["integers", "one far away", "floats", "a float far away", "huge", "one"],
)
def test_every_number_is_in_one_bar(numbers):
    found = spread_of(numbers)
    bars = found.bars
    assert np.isfinite([found.least, found.mean, found.median, found.high, found.most]).all()
    assert sum(n for _, _, n in bars) == len(numbers)
    whole = numbers.dtype.kind == "i"
    for i, (low, high, n) in enumerate(bars):
        inside = (numbers >= low) & ((numbers <= high) if whole or low == high or i == len(bars) - 1 else (numbers < high))
        assert inside.sum() == n
