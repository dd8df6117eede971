"""Candidate lists as data: every published form becomes one, and a bad row is named by its place and field."""

import json

import datasets
import pytest

from larpo.data.forms.shared_start import split_text
from larpo.data.loading import as_lists, check_row, from_candidate_lists, load_lists
from tests.helpers.jsonl import write_jsonl
from tests.larpo.data.forms.examples import assistant, user

ROWS = [
    {"prompt": "2 + 2 =", "completions": [" 4", " 5", ""], "scores": [1.0, 0.5, -2.0]},
    {"prompt": "", "completions": ["Hello"], "scores": [3.0]},
]


SYSTEM = {"role": "system", "content": "Be kind."}


def one_row(row):
    """The row that comes out, alike from a list of dicts and from a Dataset."""
    (converted,) = as_lists([row])
    assert as_lists(datasets.Dataset.from_list([row]))[0] == converted
    return converted


# --- where lists come from


@pytest.mark.parametrize("kind", ["lines", "array", "lines in .json", "parquet", "folder", "splits", "Dataset", "list"])
def test_lists_come_back_whole_from_every_source(kind, tmp_path):
    rows = [ROWS[0] | {"topic": "sums"}, ROWS[1] | {"topic": "greetings"}]
    dataset = datasets.Dataset.from_list(rows)
    if kind in ("lines", "lines in .json"):
        source = write_jsonl(tmp_path / ("lists.jsonl" if kind == "lines" else "lists.json"), rows)
    elif kind == "array":
        source = tmp_path / "lists.json"
        source.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif kind == "parquet":
        source = str(tmp_path / "lists.parquet")
        dataset.to_parquet(source)
    elif kind in ("folder", "splits"):
        source = tmp_path / "saved"
        (dataset if kind == "folder" else datasets.DatasetDict(train=dataset, test=dataset)).save_to_disk(source)
    else:
        source = dataset if kind == "Dataset" else rows
    assert load_lists(source).to_list() == rows


def test_a_missing_split_says_which_there_are(tmp_path):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), heldout=datasets.Dataset.from_list(ROWS[:1]))
    assert len(load_lists(splits, split="heldout")) == 1
    splits.save_to_disk(tmp_path / "saved")
    for source in (splits, tmp_path / "saved"):
        with pytest.raises(ValueError, match=r"has the splits \['heldout', 'train'\], not 'test'"):
            load_lists(source, split="test")


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "lists.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(ROWS[0]).encode() + b"\r\n\r\n")
    assert load_lists(path).to_list() == ROWS[:1]


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    row = {"prompt": "a\u2028b", "completions": ["c\u0085d"], "scores": [0.0]}
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert load_lists(path)[0] == row


def test_lists_to_be_scored_may_come_without_scores(tmp_path):
    rows = [{name: row[name] for name in ("prompt", "completions")} for row in ROWS[:2]]
    sources = [rows, datasets.Dataset.from_list(rows), write_jsonl(tmp_path / "lists.jsonl", rows)]
    for source in sources:
        assert load_lists(source, scored=False).to_list() == rows
        with pytest.raises(ValueError, match="no known form of candidate lists"):
            load_lists(source)
    for bad, said in (
        (rows[0] | {"completions": []}, r"holds \[\]; expected"),
        ({"prompt": "a"}, r"is missing; found \['prompt'\]"),
    ):
        with pytest.raises(ValueError, match=f"line 2: field 'completions' {said}"):
            load_lists(write_jsonl(tmp_path / "bad.jsonl", [rows[0], bad]), scored=False)
    assert load_lists(ROWS, scored=False).to_list() == load_lists(ROWS).to_list()


def test_offline_lists_become_rows():
    from larpo.offline import CandidateList

    dataset = from_candidate_lists([CandidateList("Cows eat", (" grass", " cats", " dogs"), (1.0, 0.0, 0.0))])
    assert dataset.to_list() == [{"prompt": "Cows eat", "completions": [" grass", " cats", " dogs"], "scores": [1.0, 0.0, 0.0]}]


def test_whole_numbers_and_fractions_are_one_type(tmp_path):
    path = write_jsonl(tmp_path / "lists.jsonl", [ROWS[0] | {"scores": [1, 0, 2]}, ROWS[1] | {"scores": [0.5]}])
    assert load_lists(path)["scores"][:] == [[1.0, 0.0, 2.0], [0.5]]


def test_optional_fields_may_be_in_some_rows_only(tmp_path):
    full = ROWS[0] | {"source": ["t=1", "t=1", "random"], "ref_logps": [-1, -2.5, -3], "prompt_ids": [1, 2]}
    full["completion_ids"] = [[3], [4, 5], []]
    dataset = load_lists(write_jsonl(tmp_path / "lists.jsonl", [ROWS[1], full]))
    assert dataset[1] == full
    assert dataset[0]["ref_logps"] is None and dataset[0]["completion_ids"] is None
    assert as_lists(dataset).to_list() == dataset.to_list()  # what was loaded is valid


# --- what a bad file says


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{'prompt': 1}", "invalid JSON: Expecting property name"),
        ('["a", "b"]', "holds list; expected an object"),
        ({"prompt": "a", "completions": ["b"]}, r"field 'scores' is missing; found \['completions', 'prompt'\]"),
        ({"prompt": None}, "field 'prompt' holds None; expected a string or a list of messages"),
        ({"prompt": [{"content": "a"}]}, r"field 'prompt\[0\]' holds {'content': 'a'}; expected a message"),
        ({"prompt": [{"role": "user", "content": 3}]}, r"field 'prompt\[0\]\.content' holds 3; expected a string"),
        ({"completions": "abc"}, "field 'completions' holds 'abc'; expected a list of at least one completion"),
        ({"completions": [], "scores": []}, r"field 'completions' holds \[\]; expected a list of at least one"),
        ({"completions": ["a", 7, "c"]}, r"field 'completions\[1\]' holds 7; expected a string or a list of messages"),
        ({"completions": ["a", [assistant("b")], "c"]}, r"'completions\[1\]' .*expected a string, as in completions\[0\]"),
        ({"completions": [[assistant("b")]] * 3}, "field 'prompt' holds '2 .*'; expected messages, as in 'completions'"),
        ({"scores": [1.0, 2.0]}, "field 'scores' has length 2; expected 3, one for each completion"),
        ({"scores": 1.0}, "field 'scores' holds 1.0; expected a list of 3"),
        ({"scores": [1.0, None, 2.0]}, r"field 'scores\[1\]' holds None; expected a finite number"),
        ({"scores": [1.0, 2.0, float("nan")]}, r"field 'scores\[2\]' holds nan; expected a finite number"),
        ({"scores": [float("inf"), 2.0, 1.0]}, r"field 'scores\[0\]' holds inf; expected a finite number"),
        ({"scores": ["1.0", 2.0, 1.0]}, r"field 'scores\[0\]' holds '1\.0'; expected a finite number"),
        ({"scores": [True, 2.0, 1.0]}, r"field 'scores\[0\]' holds True; expected a finite number"),
        ({"source": ["a"]}, "field 'source' has length 1; expected 3"),
        ({"source": ["a", "b", 3]}, r"field 'source\[2\]' holds 3; expected a string"),
        ({"ref_logps": [-1.0]}, "field 'ref_logps' has length 1; expected 3"),
        ({"ref_logps": [-1.0, None, -1.0]}, r"field 'ref_logps\[1\]' holds None; expected a finite number"),
        ({"completion_ids": [[1], [2], [3]]}, "field 'prompt_ids' holds None; .* together or not at all"),
        ({"prompt_ids": [1], "completion_ids": [[1], [2]]}, "field 'completion_ids' has length 2; expected 3"),
        ({"prompt_ids": [1], "completion_ids": [[1], [-2], []]}, r"'completion_ids\[1\]' holds \[-2\]; expected .* tokens"),
        ({"prompt_ids": [1.5], "completion_ids": [[1], [2], []]}, r"'prompt_ids' holds \[1\.5\]; expected .* tokens"),
    ],
)
def test_a_bad_line_is_named_with_its_field_and_what_is_expected(bad, message, tmp_path):
    if isinstance(bad, dict) and set(bad) != {"prompt", "completions"}:
        bad = ROWS[0] | bad
    path = write_jsonl(tmp_path / "lists.jsonl", [ROWS[0], "", bad, ROWS[1]])
    with pytest.raises(ValueError, match=message) as error:
        load_lists(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["array", "parquet", "Dataset"])
def test_a_bad_row_is_named_where_there_are_no_lines(kind, tmp_path):
    rows = [ROWS[0], ROWS[1] | {"scores": [None]}]
    source = datasets.Dataset.from_list(rows)
    place = "dataset"
    if kind == "array":
        source = place = tmp_path / "lists.json"
        source.write_text(json.dumps(rows))
    elif kind == "parquet":
        source.to_parquet(tmp_path / "lists.parquet")
        source = place = tmp_path / "lists.parquet"
    with pytest.raises(ValueError) as error:
        load_lists(source)
    assert str(error.value) == f"{place}, row 1: field 'scores[0]' holds None; expected a finite number"


def test_rows_of_different_kinds_are_an_error_that_names_both(tmp_path):
    path = write_jsonl(tmp_path / "lists.jsonl", [ROWS[0], ROWS[1] | {"prompt": [user("Hi")]}])
    with pytest.raises(ValueError, match=r"line 2: field 'prompt' holds messages; expected a string, as in .*line 1"):
        load_lists(path)
    path = write_jsonl(tmp_path / "lists.jsonl", [ROWS[0] | {"level": 1}, ROWS[1] | {"level": "hard"}])
    with pytest.raises(ValueError, match=r"lists\.jsonl: field 'level' holds values of different types"):
        load_lists(path)


def test_what_is_no_data_is_said_plainly(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nowhere\.jsonl"):
        load_lists(tmp_path / "nowhere.jsonl")
    (tmp_path / "lists.txt").write_text("prompt,completions,scores")
    with pytest.raises(ValueError, match=r"lists\.txt: expected a file that ends in \.jsonl, \.json, \.csv, \.parquet"):
        load_lists(tmp_path / "lists.txt")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: holds no rows"):
        load_lists(tmp_path / "empty.jsonl")
    (tmp_path / "lists.parquet").write_text("not this")
    with pytest.raises(ValueError, match=r"lists\.parquet: not a parquet file"):
        load_lists(tmp_path / "lists.parquet")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"prompt": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 2: not UTF-8 text"):
        load_lists(tmp_path / "latin.jsonl")
    (tmp_path / "cut.json").write_text('[\n{"prompt": "a",\n')
    with pytest.raises(ValueError, match=r"cut\.json, line 3: invalid JSON"):
        load_lists(tmp_path / "cut.json")
    with pytest.raises(ValueError, match=r"written by Dataset\.save_to_disk.*one kind; found \.json, \.jsonl, \.parquet"):
        load_lists(tmp_path)
    with pytest.raises(TypeError, match=r"dataset must be a datasets\.Dataset or a list of dicts, got int"):
        load_lists(3)


def test_a_valid_row_passes_with_none_for_what_is_optional():
    check_row(ROWS[0] | {"source": None, "ref_logps": None, "prompt_ids": None, "completion_ids": None})


# --- pairs


def test_pairs_of_text_with_a_prompt():
    row = one_row({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "level": "easy"})
    assert row == {"prompt": "2 + 2 =", "completions": [" 4", " 5"], "scores": [1.0, 0.0], "level": "easy"}


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")])
def test_pairs_keep_their_own_scores(names):
    row = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"} | dict(zip(names, (7, 6.5), strict=True))
    assert one_row(row) == {"prompt": "2 + 2 =", "completions": [" 4", " 5"], "scores": [7.0, 6.5]}
    with pytest.raises(ValueError, match=f"row 0: field '{names[1]}' holds None; expected a finite number"):
        as_lists([row | {names[1]: None}])


def test_pairs_of_messages_with_a_prompt():
    row = {"prompt": [SYSTEM, user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("What?")]}
    expected = {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "scores": [1.0, 0.0]}
    assert one_row(row) == expected
    repeated = row | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    assert one_row(repeated) == expected


@pytest.mark.parametrize("before", [[], [SYSTEM]])
def test_a_prompt_string_beside_messages_is_the_users_message(before):
    row = {"prompt": "Hi", "chosen": [*before, user("Hi"), assistant("Hello!")]}
    row["rejected"] = [*before, user("Hi"), assistant("What?")]
    expected = {"prompt": [*before, user("Hi")], "completions": [[assistant("Hello!")], [assistant("What?")]]}
    assert one_row(row) == expected | {"scores": [1.0, 0.0]}
    if not before:
        assert one_row(row | {side: row[side][1:] for side in ("chosen", "rejected")}) == expected | {"scores": [1.0, 0.0]}


def test_a_prompt_string_that_opens_a_dialogue_leaves_the_last_turn_to_the_candidates():
    dialogue = [user("Hi"), assistant("Hello!"), user("How are you?")]
    row = one_row({"prompt": "Hi", "chosen": [*dialogue, assistant("Fine.")], "rejected": [*dialogue, assistant("Bad.")]})
    assert row["prompt"] == dialogue
    assert row["completions"] == [[assistant("Fine.")], [assistant("Bad.")]]


def test_the_prompt_of_messages_is_what_they_share_up_to_the_answer():
    prompt = [SYSTEM, user("Hi")]
    row = one_row({"chosen": [*prompt, assistant("Hello!")], "rejected": [*prompt, assistant("What?")]})
    assert row["prompt"] == prompt
    assert row["completions"] == [[assistant("Hello!")], [assistant("What?")]]
    same_answer = [assistant("Hello!"), user("Bye"), assistant("Bye!")], [assistant("Hello!"), user("Stay"), assistant("Ok.")]
    row = one_row({"chosen": [*prompt, *same_answer[0]], "rejected": [*prompt, *same_answer[1]]})
    assert row["prompt"] == prompt  # an answer is never the end of a prompt
    assert row["completions"] == list(map(list, same_answer))
    row = one_row({"chosen": [user("Hi"), assistant("Same.")], "rejected": [user("Hi"), assistant("Same.")]})
    assert row["completions"] == [[assistant("Same.")]] * 2


@pytest.mark.parametrize(
    ("texts", "prompt"),
    [
        (["Human: hi\n\nAssistant: Hello", "Human: hi\n\nAssistant: Hey"], "Human: hi\n\nAssistant:"),
        (["Q: a?\nA:\nyes", "Q: a?\nA:\nno"], "Q: a?\nA:\n"),
        (["say a", "say a b"], "say"),
        (["say a\nb", "say a c"], "say a"),
        (["same text", "same text"], "same"),
        (
            ["Assistant: hi\n\nHuman: b\n\nAssistant: a c", "Assistant: hi\n\nHuman: b\n\nAssistant: a d"],
            "Assistant: hi\n\nHuman: b\n\nAssistant:",
        ),
        (["<|im_start|>assistant\na b", "<|im_start|>assistant\na c"], "<|im_start|>assistant\n"),
        (["USER: hi ASSISTANT: a b", "USER: hi ASSISTANT: a c"], "USER: hi ASSISTANT:"),
        (["a b\n", "a b\nc"], "a"),
        (["one", "two"], ""),
        (["", "x"], ""),
    ],
)
def test_the_prompt_of_texts_is_what_they_share_up_to_the_answer_or_in_whole_words(texts, prompt):
    found, completions, guessed = split_text(texts)
    assert (found, completions) == (prompt, [text[len(prompt) :] for text in texts])
    assert guessed == (prompt != "" and "ssistant" not in prompt.lower())
    row = one_row({"chosen": texts[0], "rejected": texts[1]})
    assert [row["prompt"] + completion for completion in row["completions"]] == texts


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]}, "field 'chosen' .*'prompt' column"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "field 'rejected' holds None; expected a string or"),
        ({"prompt": "a", "chosen": "b", "rejected": [assistant("c")]}, "field 'rejected' .* expected the kind of 'chosen'"),
        ({"prompt": "a", "chosen": [user("b"), assistant("c")], "rejected": [user("b"), assistant("d")]}, "repeat 'prompt'"),
        ({"prompt": [user("a")], "chosen": [user("a"), assistant("c")], "rejected": [assistant("d")]}, "in all candidates"),
        ({"prompt": [user("a")], "chosen": [user("a")], "rejected": [user("a"), assistant("d")]}, "an answer after the prompt"),
        ({"prompt": "a", "chosen": [SYSTEM, user("a"), assistant("c")], "rejected": [user("a"), assistant("d")]}, "the same"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "scores": [1.0, 2.0]}, r"columns \['scores'\] are in the way"),
    ],
)
def test_pairs_that_make_no_list_say_why(row, message):
    with pytest.raises(ValueError, match=message):
        as_lists([row])


# --- candidates with rewards


@pytest.mark.parametrize("names", [("responses", "rewards"), ("all_generated_responses", "all_rm_scores")])
def test_candidates_with_rewards_as_text_or_as_messages_that_repeat_the_prompt(names):
    def row(prompt, candidates):
        return {"prompt": prompt, names[0]: candidates, names[1]: [0.25, 3, -1.0], "prompt_id": "x7"}

    texts = ["Hello!", "What?", ""]
    scores = {"scores": [0.25, 3.0, -1.0], "prompt_id": "x7"}
    assert one_row(row("Hi", texts)) == {"prompt": "Hi", "completions": texts, **scores}
    answers = [[assistant(text)] for text in texts]
    expected = {"prompt": [user("Hi")], "completions": answers, **scores}
    for prompt in ("Hi", [user("Hi")]):
        assert one_row(row(prompt, [[user("Hi"), *answer] for answer in answers])) == expected
        assert one_row(row(prompt, answers)) == expected
    with pytest.raises(ValueError, match=rf"row 0: field '{names[1]}\[2\]' holds None; expected a finite number"):
        as_lists([row("Hi", texts) | {names[1]: [1.0, 2.0, None]}])
    with pytest.raises(ValueError, match=rf"row 0: field '{names[0]}' holds None; expected a list of at least one"):
        as_lists([row("Hi", None)])


def test_whole_lists_win_over_the_pair_made_from_them():
    row = {"prompt": "Hi", "all_generated_responses": ["a", "b", "c"], "all_rm_scores": [0.1, 0.2, 0.3]}
    pair = {"chosen": [user("Hi"), assistant("c")], "rejected": [user("Hi"), assistant("a")]}
    assert one_row(row | pair) == {"prompt": "Hi", "completions": ["a", "b", "c"], "scores": [0.1, 0.2, 0.3], **pair}


def test_the_origin_of_a_row_is_the_source_of_each_candidate():
    row = one_row({"prompt": "Hi", "chosen": "a", "rejected": "b", "source": "webgpt"})
    assert row["source"] == ["webgpt", "webgpt"]


def test_keys_that_arrow_fills_in_do_not_part_prompt_and_completion():
    row = {"prompt": [user("Hi") | {"name": None}], "chosen": [user("Hi"), assistant("a") | {"name": "Ann"}]}
    row["rejected"] = [user("Hi"), assistant("b")]
    (converted,) = as_lists(datasets.Dataset.from_list([row]))
    assert [[message["content"] for message in completion] for completion in converted["completions"]] == [["a"], ["b"]]


# --- what pandas and others hand over


def test_rows_of_numpy_arrays_are_rows(tmp_path):
    import pandas

    messages = [{"prompt": [user("2 + 2 =")], "completions": [[assistant("4")], [assistant("5")]], "scores": [1.0, 0.0]}]
    for rows in (ROWS, messages, [ROWS[0] | {"ref_logps": [-1.0, -2.5, -3.0], "source": ["a", "b", "c"]}]):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "lists.parquet")
        records = pandas.read_parquet(tmp_path / "lists.parquet").to_dict("records")
        assert type(records[0]["scores"]).__name__ == "ndarray"
        assert as_lists(records).to_list() == as_lists(rows).to_list()


def test_scores_are_taken_as_tensors_and_as_numbers_of_numpy():
    import numpy
    import torch

    for scores in (torch.tensor([1.0, 0.5, -2.0]), numpy.float32([1, 0.5, -2]), [*numpy.float64([1, 0.5, -2])]):
        assert as_lists([{**ROWS[0], "scores": scores}])[0] == ROWS[0]


def test_a_number_that_is_none_is_named_in_an_array_too():
    import numpy

    with pytest.raises(ValueError, match=r"row 0: field 'scores\[1\]' holds nan; expected a finite number"):
        as_lists([{**ROWS[0], "scores": numpy.array([1.0, numpy.nan, 0.0])}])


@pytest.mark.parametrize("columns", [("completions", "scores"), ("responses", "rewards"), ("chosen", "rejected")], ids="-".join)
def test_one_source_is_that_of_every_candidate(columns):
    first, second = (" 4", " 5") if columns[0] == "chosen" else ([" 4", " 5"], [1.0, 0.0])
    row = {"prompt": "2 + 2 =", columns[0]: first, columns[1]: second, "source": "sums"}
    assert one_row(row)["source"] == ["sums", "sums"]
    assert [r["source"] for r in as_lists([row, row | {"source": None}])] == [["sums", "sums"], None]


def test_other_containers_are_refused_with_what_to_do():
    import pandas

    dataset = datasets.Dataset.from_list(ROWS)
    for value, message in (
        (datasets.DatasetDict(train=dataset, test=dataset), r"a list of dicts, got DatasetDict with the splits train, test: "),
        (
            datasets.IterableDatasetDict(train=dataset.to_iterable_dataset()),
            r"the splits train: choose one, as in dataset\['train'\]",
        ),
        (iter(ROWS), r"got list_iterator; .*list\(\.\.\.\)"),
        ({"prompt": [], "completions": [], "scores": []}, r"got dict; .*from_dict"),
        (pandas.DataFrame(ROWS), r"got DataFrame; .*to_dict\('records'\)"),
        ("lists.jsonl", "got str$"),
    ):
        with pytest.raises(TypeError, match=message):
            as_lists(value)


@pytest.mark.parametrize("read", [load_lists, as_lists])
def test_a_misspelt_keyword_is_refused_with_those_that_there_are(read):
    with pytest.raises(TypeError, match=rf"{read.__name__} takes columns, .*scored, not 'groupby'; did you mean 'group_by'\?"):
        read(ROWS, groupby="prompt")


def test_data_that_is_cut_or_damaged_is_named(tmp_path):
    lists = datasets.Dataset.from_list(ROWS * 200)
    lists.to_parquet(tmp_path / "lists.parquet")
    content = bytearray((tmp_path / "lists.parquet").read_bytes())
    (tmp_path / "cut.parquet").write_bytes(content[:-30])
    content[4 : len(content) // 3] = bytes(len(content) // 3 - 4)  # what says where the columns are comes last
    (tmp_path / "zeros.parquet").write_bytes(content)
    lists.save_to_disk(tmp_path / "saved")
    (part,) = (tmp_path / "saved").glob("*.arrow")
    part.write_bytes(part.read_bytes()[:200])
    lists.save_to_disk(tmp_path / "state")
    (tmp_path / "state" / "state.json").write_text("{")
    for name in ("cut.parquet", "zeros.parquet", "saved", "state"):
        with pytest.raises(ValueError, match=rf"{name}: .*(cut|damaged)"):
            load_lists(tmp_path / name)
