"""ref_logps that come with the data: of which tokens they are, of which model, and what training makes of that."""

import copy
import logging
import warnings

import datasets
import pytest
from datasets import Dataset, concatenate_datasets

from larpo.data.scored_tokens import token_hashes
from larpo.scoring import score_lists
from tests.helpers import tiny
from tests.helpers.trainers import moved, trainer

TEMPLATE = (
    "{% for m in messages %}{{ ' one' if m['role'] == 'assistant' else 'the ' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %} one{% endif %}"
)


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list(tiny.lists(4, m=3, seed=3))


@pytest.fixture(scope="module")
def scored(data):
    return score(data)


def score(data, model=None, tokenizer=None, **options):
    model = tiny.causal_lm() if model is None else model
    tokenizer = tokenizer or tiny.tokenizer()
    return score_lists(model, data, tokenizer, ref_model=copy.deepcopy(model), progress=False, **options)


def through_json(data, folder):
    data.to_json(folder / "lists.jsonl")
    return Dataset.from_json(str(folder / "lists.jsonl"), cache_dir=str(folder))


def through_parquet(data, folder):
    data.to_parquet(folder / "lists.parquet")
    return Dataset.from_parquet(str(folder / "lists.parquet"), cache_dir=str(folder))


@pytest.mark.parametrize(
    "through",
    [
        through_json,
        through_parquet,
        lambda data, folder: Dataset.from_pandas(data.to_pandas()),
        lambda data, folder: concatenate_datasets([data.shuffle(seed=1).map(lambda row: row), data.select([0])]),
    ],
    ids=["json", "parquet", "pandas", "map and join"],
)
def test_what_was_scored_is_known_however_it_was_stored(tmp_path, scored, through):
    stored = through(scored, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ref_logps")
        trainer(tmp_path, stored)
    with pytest.raises(ValueError, match=r"row 0: ref_logps is of .*append_eos was True and is False"):
        trainer(tmp_path, stored, append_eos=False)


def test_the_hash_of_a_candidate_is_of_its_prompt_its_tokens_and_which_of_them_count():
    row = dict(prompt_ids=[1, 2], completion_ids=[[3, 4], [3, 4], [34], [3]], completion_mask=[[1, 1], [0, 1], [1], [1]])
    found = token_hashes(row)
    assert len(set(found)) == 4
    assert token_hashes(row | {"prompt_ids": [12]}) != found
    assert token_hashes({k: v for k, v in row.items() if k != "completion_mask"})[::2] == found[::2]


def test_another_truncation_of_the_prompt_is_refused(tmp_path, data):
    kept = score(data, max_prompt_length=3)
    trainer(tmp_path, kept, max_prompt_length=3)
    with pytest.raises(ValueError, match=r"other tokens than .* have now .*truncation_mode was 'keep_end' and is 'keep_start'"):
        trainer(tmp_path, kept, max_prompt_length=3, truncation_mode="keep_start")


def test_another_chat_template_is_refused_even_if_answers_are_as_long(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "completions": row["completions"], "scores": row["scores"]}
        for row in tiny.lists(2, m=3)
    ]
    kept = score(Dataset.from_list(rows), tokenizer=tiny.tokenizer(TEMPLATE))
    trainer(tmp_path, kept, processing_class=tiny.tokenizer(TEMPLATE))
    with pytest.raises(ValueError, match=r"other tokens than .* have now .*chat_template was 'sha256 .*' and is 'sha256"):
        trainer(tmp_path, kept, processing_class=tiny.tokenizer(TEMPLATE.replace("the", "cat")))


def test_another_tokenizer_is_refused_even_if_answers_are_as_long(tmp_path, scored):
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    with pytest.raises(ValueError, match=r"other tokens than .* have now .*tokenizer was 'sha256 .*' and is 'sha256"):
        trainer(tmp_path, scored, processing_class=other)


def test_candidates_that_were_put_in_another_order_are_refused(tmp_path, scored):
    with pytest.raises(ValueError, match=r"ref_logps is of .* tokens"):
        trainer(tmp_path, scored.map(lambda row: {"completions": row["completions"][::-1]}))


def test_a_subset_of_each_list_keeps_what_is_its_own(tmp_path, scored):
    trainer(tmp_path, scored, list_top=1, list_bottom=1)


def test_reference_log_likelihoods_far_from_the_policys_own_are_warned_of_with_figures(tmp_path, scored):
    unnamed = scored.remove_columns(["scored_with"])
    with pytest.warns(UserWarning, match=r"ref_logps of the train data are not those of the policy .* nats a token"):
        trainer(tmp_path, unnamed, moved(tiny.causal_lm()))
    with pytest.warns(UserWarning, match="ref_logps of the eval data are not those of the policy"):
        trainer(tmp_path, None, moved(tiny.causal_lm()), eval_dataset=unnamed)


def test_another_reference_model_is_taken_and_named_in_the_log(tmp_path, data, caplog):
    other = moved(tiny.causal_lm())
    other.name_or_path = "lab/sft"
    with caplog.at_level(logging.WARNING, logger="larpo"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ref_logps")
        trainer(tmp_path, score(data, other))
    assert "ref_logps of the train data are of lab/sft, not of the policy that is trained" in caplog.text


def test_scoring_a_policy_keeps_reference_log_likelihoods_of_the_same_tokens_only(scored):
    again = score_lists(moved(tiny.causal_lm()), scored, tiny.tokenizer(), progress=False)
    assert again["ref_logps"][:] == scored["ref_logps"][:] and again["scored_with"][:] == scored["scored_with"][:]
    assert again["logps"][:] != scored["logps"][:]
    with pytest.raises(ValueError, match="ref_logps is of"):
        score_lists(tiny.causal_lm(), scored, tiny.tokenizer(), progress=False, append_eos=False)


def test_what_it_was_scored_with_is_written_down(scored):
    import json

    found = json.loads(scored[0]["scored_with"])
    assert found["dtype"] == "float32" and found["max_prompt_length"] == 512 and found["append_eos"] is True
    assert found["ref_model"] == "a LlamaForCausalLM without a name" and found["chat_template"] is None
    assert datasets.Value("string") == scored.features["scored_with"]
