"""What training makes of its data before the first step: what is refused, and what is said."""

import logging
import warnings

import datasets
import pytest

from larpo import LarPOConfig
from larpo.data.loading import as_lists
from larpo.training.preprocessing import training_lists
from tests.helpers.tokenizer_families import tiny_tokenizer


@pytest.fixture
def tokenizer():
    return tiny_tokenizer("byte-level")


def config(tmp_path, **options):
    return LarPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, **options)


def row_of(prompt, *completions):
    return {"prompt": prompt, "completions": list(completions), "scores": [float(i) for i in range(len(completions))]}


LONG = "Question: what is the answer?" * 5


# --- lists of equal candidates


def test_lists_that_cutting_makes_equal_are_counted_apart_and_refused_where_all_are_so(tokenizer, tmp_path):
    """A prompt that leaves one token of max_length makes candidates that begin alike the same."""
    args = config(tmp_path, max_length=8, max_prompt_length=None)
    cut, other = row_of(LONG, " yes it is", " yes, they say"), row_of("the", " rain", " answer")
    with pytest.warns(UserWarning, match="1 prompt cut, 2 completions cut, 1 list with all candidates equal, which teaches"):
        assert len(training_lists([cut, other], tokenizer, args)) == 2
    for rows in ([cut], [cut, row_of("the", " rain")], [row_of("a", " b", " b")]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match=r"in every list of the train data all candidates are equal.*max_length=8"):
                training_lists(rows, tokenizer, args)
    with pytest.warns(UserWarning, match="2 completions cut"):
        assert len(training_lists([row_of(LONG, " yes", " the rain")], tokenizer, args)) == 1  # they differ in what is left


# --- prompts that are not given


def test_a_prompt_that_is_guessed_is_refused_where_lengths_count(tokenizer, tmp_path):
    """Words that answers share would be taken for the prompt's, and change a mean over tokens."""
    pair = {"chosen": "The answer is a b", "rejected": "The answer is a c d"}
    lists = as_lists([pair])
    assert lists[0]["implicit_prompt"] is True
    given = {"prompt": "x"} | pair
    mixed = [given, pair | {"prompt": None}]
    for data in (mixed, datasets.Dataset.from_list(mixed), datasets.Dataset.from_list(mixed[::-1])):
        assert sorted(map(bool, as_lists(data)["implicit_prompt"])) == [False, True]
    for data in ([pair], lists, datasets.Dataset.from_list([pair])):
        with pytest.raises(ValueError, match=r"length_normalized needs to know where prompts end, and row 0 of the train data"):
            training_lists(data, tokenizer, config(tmp_path, length_normalized=True))
        assert len(training_lists(data, tokenizer, config(tmp_path))) == 1


def test_a_dialogue_without_a_prompt_has_the_lengths_of_one_with_it(tokenizer, tmp_path):
    prompt, answers = "\n\nHuman: the rain?\n\nAssistant:", [" yes, they say", " yes it is, they say"]
    args = config(tmp_path, length_normalized=True)
    columns = ["prompt_ids", "completion_ids"]
    given = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    found = {"chosen": prompt + answers[0], "rejected": prompt + answers[1]}
    expected = training_lists([given], tokenizer, args).select_columns(columns).to_list()
    for data in ([found], datasets.Dataset.from_list([found])):
        assert training_lists(data, tokenizer, args).select_columns(columns).to_list() == expected


# --- what is said


def test_the_report_shows_what_counts(tokenizer, tmp_path, caplog):
    rows = [{"prompt": [{"role": "user", "content": "hello"}], "completions": ["no", "yes"], "scores": [0.0, 1.0]}]
    with caplog.at_level(logging.INFO, logger="larpo.training"):
        training_lists(rows, tokenizer, config(tmp_path), "eval")
    assert caplog.messages == [
        "eval data: 2 candidates a list, scores 0 to 1, tied pairs none; tokens of a prompt 17 (median) to 17, of a completion "
        "2 (median) to 3.",
        "eval data: 1 list of 2 candidates: nothing cut, none empty. What counts is in [[ ]]:\n"
        "<s><|user|>\nhello</s>\n<|assistant|>\n[[yes</s>]]",
    ]
