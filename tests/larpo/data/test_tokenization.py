"""Tokens of candidate lists: the border of prompt and completion, EOS, chat templates, what is cut and what is counted."""

import warnings

import datasets
import pytest

from larpo.data import prompt_boundary
from larpo.data.loading import as_lists
from larpo.data.tokenization import TokenizationReport, tokenize_lists, tokenize_row
from tests.helpers.optional_hypothesis import given, st
from tests.helpers.tokenizer_families import CHATML, CORPUS, FAMILIES, LOSSY, tiny_tokenizer, with_template

BOS, EOS, END = 1, 2, 3
PIECES = [*"thesanwryiAQ:,.=1\n\t ", "  ", "\n\n", "é", "日", "😀", " yes", " the", "answer", "</s>"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
USER = {"role": "user", "content": "hello"}


def tokens_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def row_of(prompt="Answer:", completions=(" yes", " the rain", " no"), **fields):
    scores = [float(i) for i in range(len(completions))]
    return {"prompt": prompt, "completions": list(completions), "scores": scores, **fields}


@pytest.fixture
def tokenizer():
    return tiny_tokenizer("byte-level")


@pytest.fixture(params=FAMILIES)
def any_tokenizer(request):
    return tiny_tokenizer(request.param)


# --- the border


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_prompt_tokens_are_those_of_the_prompt_alone_and_the_text_survives(prompt, completions):
    for family in FAMILIES:
        tokenizer = tiny_tokenizer(family)
        row = tokenize_row(row_of(prompt, completions), tokenizer, append_eos=False)
        assert row["prompt_ids"] == tokenizer(prompt)["input_ids"]
        for completion, ids in zip(completions, row["completion_ids"], strict=True):
            joint = tokenizer(prompt + completion)["input_ids"]
            assert tokenizer.decode(row["prompt_ids"] + ids) == tokenizer.decode(joint)
            if joint[: len(row["prompt_ids"])] == row["prompt_ids"]:
                assert row["prompt_ids"] + ids == joint


@given(TEXTS, TEXTS)
def test_byte_level_tokens_decode_to_the_text_itself(prompt, completion):
    tokenizer = tiny_tokenizer("byte-level")
    row = tokenize_row(row_of(prompt, [completion]), tokenizer, append_eos=False)
    assert tokenizer.decode(row["prompt_ids"] + row["completion_ids"][0]) == "<s>" + prompt + completion


def test_text_cut_anywhere_comes_back_whole(any_tokenizer):
    """Every cut of real text: within words, before and after spaces and newlines, between bytes of one token."""
    merges = 0
    for text in CORPUS[:4]:
        for at in range(len(text) + 1):
            prompt, completion = text[:at], text[at:]
            ids = tokens_of(any_tokenizer, prompt)
            merges += tokens_of(any_tokenizer, text)[: len(ids)] != ids
            row = tokenize_row(row_of(prompt, [completion]), any_tokenizer, append_eos=False)
            assert row["prompt_ids"] == [BOS, *ids]
            decoded = any_tokenizer.decode(row["prompt_ids"] + row["completion_ids"][0])
            assert decoded.removeprefix("<s>").removeprefix(" ") == text
    assert merges > 20


def test_no_space_enters_where_the_tokenizer_drops_newlines():
    tokenizer = tiny_tokenizer(LOSSY)
    for text in CORPUS[:3]:
        for at in range(len(text) + 1):
            row = tokenize_row(row_of(text[:at], [text[at:]]), tokenizer, append_eos=False)
            assert tokenizer.decode(row["prompt_ids"] + row["completion_ids"][0]) == tokenizer.decode(
                tokenizer(text)["input_ids"]
            )


@pytest.mark.parametrize("family", ["metaspace first", "metaspace always", "unigram first", "llama, normalizer"])
def test_a_space_in_front_of_text_on_its_own_does_not_enter_the_completion(family):
    tokenizer = tiny_tokenizer(family)
    assert tokenizer.convert_ids_to_tokens(tokens_of(tokenizer, "yes"))[0].startswith("▁")
    row = tokenize_row(row_of("Answer: ", ["yes"]), tokenizer, append_eos=False)
    assert "".join(tokenizer.convert_ids_to_tokens(row["completion_ids"][0])) == "yes"


def test_a_tokenizer_that_ends_texts_in_eos_does_not_end_prompts_in_it():
    from tokenizers import processors

    tokenizer = with_template(CHATML)
    post = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = post
    assert tokenizer("Answer:")["input_ids"][-1] == EOS
    row = tokenize_row(row_of(), tokenizer)
    assert row["prompt_ids"] == [BOS, *tokens_of(tokenizer, "Answer:")]
    assert row["completion_ids"][0] == [*tokens_of(tokenizer, " yes"), EOS]


def test_bos_is_not_doubled_where_the_prompt_brings_it(tokenizer):
    assert tokenize_row(row_of("<s>Answer:"), tokenizer) == tokenize_row(row_of("Answer:"), tokenizer)
    assert prompt_boundary.leading_special_tokens(tokenizer) == [BOS]
    assert prompt_boundary.leading_special_tokens(tiny_tokenizer("byte-level", bos=False)) == []


# --- EOS


def test_text_ends_in_one_eos_if_asked_for(tokenizer):
    yes = tokens_of(tokenizer, " yes")
    row = row_of(completions=[" yes", " yes</s>", ""])
    assert tokenize_row(row, tokenizer)["completion_ids"] == [[*yes, EOS], [*yes, EOS], [EOS]]
    assert tokenize_row(row, tokenizer, append_eos=False)["completion_ids"] == [yes, [*yes, EOS], []]


def test_no_eos_token_is_an_error_only_where_one_is_needed():
    tokenizer = with_template(CHATML)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="append_eos=True, but the tokenizer has no eos_token"):
        tokenize_row(row_of(), tokenizer)
    assert len(tokenize_row(row_of(), tokenizer, append_eos=False)["completion_ids"]) == 3


# --- messages


def test_messages_are_the_chat_template_cut_where_the_assistant_starts(tokenizer):
    answers = ["yes it is", " the rain", ""]
    row = tokenize_row(row_of([USER], [[{"role": "assistant", "content": answer}] for answer in answers]), tokenizer)
    assert row["prompt_ids"] == tokens_of(tokenizer, "<s><|user|>\nhello</s>\n<|assistant|>\n")
    assert row["prompt_ids"].count(BOS) == 1
    for answer, ids in zip(answers, row["completion_ids"], strict=True):
        assert tokenizer.decode(ids) == answer + "</s>"
    assert tokenize_row(row_of([USER], answers), tokenizer) == row  # a string is one message of the assistant


def test_a_template_that_leaves_the_turn_open_is_ended():
    bare = CHATML.replace("{{ eos_token }}", "")
    tokenizer = with_template(bare)
    row = tokenize_row(row_of([USER], ["yes", ""]), tokenizer)
    assert [tokenizer.decode(ids) for ids in row["completion_ids"]] == ["yes\n</s>", "\n</s>"]
    row = tokenize_row(row_of([USER], ["yes"]), tokenizer, append_eos=False)
    assert tokenizer.decode(row["completion_ids"][0]) == "yes\n"


def test_an_end_of_turn_of_another_name_is_an_end():
    tokenizer = with_template(CHATML.replace("{{ eos_token }}", "<|end|>"))
    (ids,) = tokenize_row(row_of([USER], ["yes"]), tokenizer)["completion_ids"]
    assert tokenizer.decode(ids) == "yes<|end|>" and END in ids and EOS not in ids


def test_an_answer_in_several_turns_is_one_completion(tokenizer):
    turns = [("assistant", "yes"), ("user", "the answer?"), ("assistant", "46")]
    (ids,) = tokenize_row(row_of([USER], [[{"role": r, "content": c} for r, c in turns]]), tokenizer)["completion_ids"]
    assert tokenizer.decode(ids) == "yes</s>\n<|user|>\nthe answer?</s>\n<|assistant|>\n46</s>"


def test_a_template_that_rewrites_the_prompt_is_an_error_that_shows_where():
    tokenizer = with_template("{{ messages | length }} " + CHATML)
    with pytest.raises(ValueError, match=r"row: the chat template's text of prompt \+ completions\[0\] .*'1 .*' became '2"):
        tokenize_row(row_of([USER], ["yes"]), tokenizer)


def test_keys_that_arrow_fills_in_do_not_reach_the_template():
    tokenizer = with_template("{% for m in messages %}{{ m.keys() | list }}{% endfor %}")
    messages = [USER | {"name": None}]
    row = tokenize_row(row_of(messages, [[{"role": "assistant", "content": "", "tool": None}]]), tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "['role', 'content']"


# --- tokens given


def test_given_tokens_win_over_the_text_and_get_no_eos(tokenizer):
    ids = {"prompt_ids": [7, 8, 9], "completion_ids": [[10, 11], [], [12, EOS]]}
    row = row_of(**ids, ref_logps=[-1.0, -2.0, -3.0], source=["a", "b", "c"])
    expected = ids | {"scores": [0.0, 1.0, 2.0], "ref_logps": [-1.0, -2.0, -3.0], "source": ["a", "b", "c"]}
    assert tokenize_row(row, tokenizer) == expected
    cut = tokenize_row(row, tokenizer, max_length=3, max_prompt_length=2)
    assert cut["prompt_ids"] == [8, 9] and cut["completion_ids"] == [[10], [], [12]]


# --- cutting


def test_a_long_prompt_keeps_its_end_and_its_bos_and_answers_are_cut_on_the_right(tokenizer):
    whole = tokenize_row(row_of("Question: what is the answer?"), tokenizer)
    p = len(whole["prompt_ids"])
    assert p > 6
    cut = tokenize_row(row_of("Question: what is the answer?"), tokenizer, max_length=6, max_prompt_length=5)
    assert cut["prompt_ids"] == [BOS, *whole["prompt_ids"][-4:]]
    assert cut["completion_ids"] == [ids[:1] for ids in whole["completion_ids"]]
    start = tokenize_row(row_of("Question: what is the answer?"), tokenizer, max_prompt_length=5, truncation="keep_start")
    assert start["prompt_ids"] == whole["prompt_ids"][:5]
    assert start["completion_ids"] == whole["completion_ids"]


def test_limits_are_exact_and_none_is_no_limit(tokenizer):
    row = row_of("Question: what is the answer?" * 100)
    whole = tokenize_row(row, tokenizer, max_length=None, max_prompt_length=None)
    p, longest = len(whole["prompt_ids"]), max(map(len, whole["completion_ids"]))
    assert p > 512
    assert len(tokenize_row(row, tokenizer)["prompt_ids"]) == 512
    assert tokenize_row(row, tokenizer, max_length=p + longest, max_prompt_length=p) == whole
    one_less = tokenize_row(row, tokenizer, max_length=p + longest - 1, max_prompt_length=p)
    assert one_less["prompt_ids"] == whole["prompt_ids"]
    assert max(map(len, one_less["completion_ids"])) == longest - 1
    full = tokenize_row(row, tokenizer, max_length=p, max_prompt_length=None)  # a prompt leaves room for one token
    assert len(full["prompt_ids"]) == p - 1 and set(map(len, full["completion_ids"])) == {1}


def test_without_a_limit_of_its_own_a_prompt_gets_half_of_max_length(tokenizer):
    row = row_of("Question: what is the answer?")
    for tokens in (tokenize_row(row, tokenizer, max_length=8), tokenize_lists(as_lists([row]), tokenizer, max_length=8)[0][0]):
        assert tokens == tokenize_row(row, tokenizer, max_length=8, max_prompt_length=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_prompt_length": 1024}, "max_prompt_length=1024 must be below max_length=1024"),
        ({"max_length": 1}, "max_length must be None or an int >= 2, got 1"),
        ({"max_prompt_length": 0}, "max_prompt_length must be None or an int >= 1, got 0"),
        ({"truncation": "left"}, "truncation must be 'keep_end' or 'keep_start', got 'left'"),
    ],
)
def test_bad_options_are_named(options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        tokenize_row(row_of(), tokenizer, **options)
    with pytest.raises(ValueError, match=message):
        tokenize_lists(as_lists([row_of()]), tokenizer, **options)


def test_an_empty_prompt_leaves_something_to_predict_the_first_token_from():
    tokenizer = with_template(CHATML)
    assert tokenize_row(row_of(""), tokenizer)["prompt_ids"] == [BOS]
    ids = {"prompt_ids": [], "completion_ids": [[5], [6], [7]]}
    assert tokenize_row(row_of(**ids), tokenizer) == ids | {"prompt_ids": [BOS], "scores": [0.0, 1.0, 2.0]}
    tokenizer.backend_tokenizer.post_processor = tiny_tokenizer("byte-level", bos=False).backend_tokenizer.post_processor
    tokenizer.bos_token = None
    assert tokenize_row(row_of(""), tokenizer)["prompt_ids"] == [EOS]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="row: the prompt is empty, and the tokenizer has neither"):
        tokenize_row(row_of(""), tokenizer, append_eos=False)


# --- datasets


def test_a_dataset_keeps_every_candidate_and_counts_what_was_cut(tokenizer):
    rows = [
        row_of(topic="a"),
        row_of("Question: what is the answer?", ["", " yes", ""]),
        row_of("the", [" rain in Spain stays mainly in the plain, they say"]),
        row_of("it is", [" so", " not"]) | {"scores": [1.0, 1.0]},
    ]
    with pytest.warns(UserWarning, match=r"1 prompt cut, 1 completion cut, 2 completions empty.*max_prompt_length=5"):
        tokens, report = tokenize_lists(as_lists(rows), tokenizer, max_length=9, max_prompt_length=5)
    assert report == TokenizationReport(
        lists=4,
        candidates=9,
        prompts_truncated=1,
        completions_truncated=1,
        completions_empty=2,
        lists_of_one=1,
        lists_all_tied=1,
    )
    assert tokens.column_names == ["prompt_ids", "completion_ids", "scores"]
    assert tokens.to_list() == [tokenize_row(row, tokenizer, max_length=9, max_prompt_length=5) for row in rows]


@pytest.mark.parametrize("turn", ["\n\nHuman: no?", "<|im_start|>user\nno?"])
def test_text_in_which_a_user_speaks_is_said_to_count(tokenizer, turn):
    with pytest.warns(UserWarning, match=r"1 completion with a user's turn in its text, which counts too \(give messages\)"):
        tokenize_lists(as_lists([row_of("\n\nHuman: hi\n\nAssistant:", [" yes", f" yes{turn}"])]), tokenizer)


def test_nothing_cut_is_no_warning(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = tokenize_lists(as_lists([row_of()]), tokenizer)
    assert str(report) == "1 list of 3 candidates: nothing cut, none empty."
    assert not report.lossy


def test_optional_columns_stay_and_may_miss_in_some_rows(tokenizer):
    extra = {"ref_logps": [-1.0, -2.0, -3.0], "source": ["a", "b", "c"]}
    tokens, _ = tokenize_lists(as_lists([row_of(), row_of(**extra)]), tokenizer)
    assert tokens[1]["ref_logps"] == extra["ref_logps"] and tokens[1]["source"] == extra["source"]
    assert tokens[0]["ref_logps"] is None and tokens[0]["source"] is None


def test_messages_survive_a_dataset(tokenizer):
    rows = [row_of([USER | {"name": "Ann"}], ["yes", "no"]), row_of([{"role": "system", "content": "x"}, USER], ["yes"])]
    tokens, _ = tokenize_lists(as_lists(rows), tokenizer)
    assert tokens.to_list() == [tokenize_row(row, tokenizer) for row in rows]


def test_processes_give_the_same_tokens(tokenizer):
    rows = [row_of(f"{i} + {i} =") for i in range(4)]
    alone, report = tokenize_lists(as_lists(rows), tokenizer)
    shared, same_report = tokenize_lists(as_lists(rows), tokenizer, num_proc=2)
    assert alone.to_list() == shared.to_list() and report == same_report


def test_data_in_memory_is_not_named_after_the_tokenizer_and_data_on_disk_is_found_again(tokenizer, tmp_path, monkeypatch):
    hashed, hash_of = [], datasets.fingerprint.Hasher.hash
    monkeypatch.setattr(datasets.fingerprint.Hasher, "hash", staticmethod(lambda x: (hashed.append(x), hash_of(x))[1]))
    rows = datasets.Dataset.from_list([row_of()])
    tokenize_lists(rows, tokenizer)
    assert not any(map(callable, hashed))
    rows.save_to_disk(tmp_path)
    once, again = (tokenize_lists(datasets.load_from_disk(tmp_path), tokenizer)[0] for _ in range(2))
    assert once.cache_files and once.cache_files == again.cache_files


def test_a_bad_row_of_a_dataset_is_named(tokenizer):
    rows = datasets.Dataset.from_list([row_of(), row_of() | {"scores": [1.0]}])
    with pytest.raises(ValueError, match="row 1: field 'scores' has length 1; expected 3"):
        tokenize_lists(rows, tokenizer)
