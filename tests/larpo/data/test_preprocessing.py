"""What training makes of its data before the first step: what is refused, and what is said."""

import logging
import warnings

import pytest

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from larpo import LarPOConfig
from larpo.data.preprocessing import training_lists
from tests.helpers.tokenizer_families import tiny_tokenizer

datasets.disable_progress_bars()


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


# --- what is said


def test_the_report_shows_what_counts(tokenizer, tmp_path, caplog):
    rows = [{"prompt": [{"role": "user", "content": "hello"}], "completions": ["no", "yes"], "scores": [0.0, 1.0]}]
    with caplog.at_level(logging.INFO, logger="larpo.data"):
        training_lists(rows, tokenizer, config(tmp_path), "eval")
    assert caplog.messages == [
        "eval data: 1 list of 2 candidates: nothing cut, none empty. What counts is in [[ ]]:\n"
        "<s><|user|>\nhello</s>\n<|assistant|>\n[[yes</s>]]"
    ]
