"""Every published form is recognised by its columns and read, alike from a list, a Dataset and a file."""

import copy
import json

import datasets
import pytest

from larpo.data.forms import FORMS, recognise
from larpo.data.loading import as_lists, load_lists, read_lists
from larpo.data.reading import Reading
from tests.helpers.jsonl import write_jsonl
from tests.larpo.data.forms.examples import ASK, EAGLE, EXAMPLES, KIWI, PENGUIN, SYSTEM, TURN, assistant, battle, user


def example(name, **changes):
    rows, *_ = EXAMPLES[name]
    return [{**copy.deepcopy(row), **changes} for row in rows]


def test_every_form_has_an_example():
    assert list(EXAMPLES) == [form.name for form in FORMS]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_form_is_recognised_and_read_from_every_source(name, tmp_path):
    rows, prompt, completions, scores, source = EXAMPLES[name]
    assert recognise(rows[0], Reading()).name == name
    expected = {"prompt": prompt, "completions": completions, "scores": scores}
    expected |= {"source": source} if source else {}
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for place in (rows, datasets.Dataset.from_list(rows), file, tmp_path / "rows.parquet"):
        (found,) = load_lists(place).to_list()
        assert {column: found[column] for column in expected} == expected
        assert not {"scores", "completions", "prompt"} & set(found) - set(expected)
    assert as_lists(as_lists(rows)).to_list() == as_lists(rows).to_list()  # what was read is a list


@pytest.mark.parametrize("name", EXAMPLES)
def test_columns_that_are_not_read_are_kept(name):
    rows = example(name, topic="birds", number=3)
    (found,) = as_lists(rows)
    several = len(rows) if len(rows) > 1 else None  # of rows that are one list, the values of each
    assert found["topic"] == ("birds" if several is None else ["birds"] * several)


def scores(rows, **how):
    (found,) = as_lists(rows, **how)
    return found["scores"]


def test_ultrafeedback_is_scored_by_what_is_asked_for():
    rows = example("UltraFeedback")
    assert scores(rows, score="overall_score") == [9.0, 7.5, 10.0]
    assert scores(rows, score="honesty") == [4.0, 4.0, 1.0]
    assert scores(rows, score={"honesty": 0.5, "helpfulness": 2}) == [10.0, 8.0, 2.5]
    with pytest.raises(
        ValueError, match=r"score: UltraFeedback data has no score 'fine' here; it has fine-grained_score, overall"
    ):
        as_lists(rows, score="fine")
    (found,) = as_lists(rows)
    assert (found["source"], found["prompt_source"]) == (["m-1", "m-2", "m-3"], "birds")


def test_answers_that_were_not_rated_are_left_out_and_counted(caplog):
    """UltraFeedback has N/A for a rating and rows of no answers, distilabel None for a text or a rating."""
    rows = example("UltraFeedback")
    rows[0]["completions"][1]["annotations"]["honesty"]["Rating"] = "N/A"
    (empty,) = example("UltraFeedback", completions=[])
    read = read_lists([empty, *rows], Reading(score="honesty"))
    assert read.lists[0]["completions"] == [PENGUIN, EAGLE] and len(read.lists) == 1
    assert read.lists[0]["source"] == ["m-1", "m-3"]
    assert str(read.left_out) == (
        "1 row was left out: 1 because no answer in it has a score (first: row 0). "
        "1 answer was left out: 1 because it has no score (first: row 1)"
    )
    rows = [{"instruction": ASK, "generations": [PENGUIN, None, EAGLE, KIWI], "ratings": [5, 4, None, 2]}] * 2
    for data in (rows, datasets.Dataset.from_list(rows)):
        caplog.clear()
        lists = as_lists(data)
        assert [(row["completions"], row["scores"]) for row in lists] == [([PENGUIN, KIWI], [5.0, 2.0])] * 2
        (said,) = caplog.messages
        assert said.startswith("4 answers were left out: 2 because it has no text (first: ")
    with pytest.raises(ValueError, match=r"row 0: field 'model_names\[\]' has length 1; expected 4"):
        as_lists([rows[0] | {"model_names": ["m-1"]}])
    assert scores([{"instruction": ASK, "generations": [PENGUIN, EAGLE], "ratings": ["5", "1.5"]}]) == [5.0, 1.5]


def test_an_object_of_lists_is_a_list_of_objects():
    """Older versions of datasets hold a Sequence of objects so."""
    (row,) = example("Nectar")
    answers = {key: [answer[key] for answer in row["answers"]] for key in row["answers"][0]}
    assert as_lists([row | {"answers": answers}]).to_list() == as_lists([row]).to_list()


def test_nemo_rl_may_be_scored_by_its_rewards():
    (row,) = example("NeMo-RL")
    for completion, reward in zip(row["completions"], (0.5, -1, 0.25), strict=True):
        completion["reward"] = reward
    assert scores([row]) == [2.0, 0.0, 1.0]
    assert scores([row], score="reward") == [0.5, -1.0, 0.25]


def test_helpsteer_attributes_are_weighed_and_rows_of_a_prompt_become_one_list():
    rows = example("HelpSteer2")
    assert scores(rows, score={"helpfulness": 0.5, "verbosity": -1}) == [1.0, -2.5]
    other = {**rows[0], "prompt": "Hello?", "response": "Hello."}
    for data in ([rows[0], other, rows[1]], datasets.Dataset.from_list([rows[0], other, rows[1]])):
        first, second = as_lists(data)
        assert (first["completions"], first["scores"], first["coherence"]) == ([PENGUIN, EAGLE], [4.0, 1.0], [4, 4])
        assert (second["prompt"], second["completions"]) == ([user("Hello?")], ["Hello."])


def test_helpsteer3_is_the_other_way_round_above_0_and_a_tie_at_0():
    assert scores(example("HelpSteer3", overall_preference=1)) == [0.0, 1.0]
    assert scores(example("HelpSteer3", overall_preference=0)) == [0.0, 0.0]


def test_pku_may_be_scored_by_safety_and_a_third_answer_is_refused():
    assert scores(example("PKU-SafeRLHF"), score="safer_response_id") == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"row 0: field 'better_response_id' holds 2; expected one of 0, 1"):
        as_lists(example("PKU-SafeRLHF", better_response_id=2))


def test_pairs_of_reddit_become_lists_of_all_answers_to_a_post():
    (row,) = example("SHP")
    second = row | {"human_ref_A": KIWI, "score_A": 20, "human_ref_B": EAGLE, "labels": 1}
    for data in ([row, second], datasets.Dataset.from_list([row, second])):
        (found,) = as_lists(data, group_by="post_id")
        assert (found["completions"], found["scores"]) == ([PENGUIN, EAGLE, KIWI], [42.0, 7.0, 20.0])
    with pytest.raises(ValueError, match=r"group_by='post_id' makes one list of several rows, and scores of SHP data .*labels"):
        as_lists([row, second], group_by="post_id", score="labels")
    with pytest.raises(ValueError, match=r"rows with the same 'post_id' differ in 'prompt'"):
        as_lists([row, second | {"history": "Another post"}], group_by="post_id")


@pytest.mark.parametrize("said", ["tie", "tie (bothbad)", "both_bad"])
def test_a_battle_without_winner_is_a_tie(said):
    assert scores(example("arena", winner=said)) == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"row 0: field 'winner' holds 'A'; expected one of 'model_a', 'model_b', 'tie', "):
        as_lists(example("arena", winner="A"))


def test_a_battle_whose_contents_are_parts_or_json_text_is_read_too():
    (row,) = example("arena")
    parts = {
        f"conversation_{side}": [
            m | {"content": [{"type": "text", "text": m["content"], "image": None}]} for m in row[f"conversation_{side}"]
        ]
        for side in "ab"
    }
    (found,) = as_lists([row | parts])
    assert found["prompt"] == parts["conversation_a"][:1]
    assert found["completions"] == [parts["conversation_a"][1:], parts["conversation_b"][1:]]
    (found,) = as_lists([row | {f"conversation_{side}": json.dumps(row[f"conversation_{side}"]) for side in "ab"}])
    assert found["completions"] == [battle(EAGLE)[1:], battle(PENGUIN)[1:]]


def test_a_battle_of_55k_without_an_answer_is_left_out_and_counted():
    rows = [*example("arena-55k"), *example("arena-55k", response_b=json.dumps([EAGLE, None]))]
    read = read_lists(rows, Reading())
    assert len(read.lists) == 1
    assert str(read.left_out) == ("1 row was left out: 1 because one of the answers that it compares is missing (first: row 1)")
    assert scores(example("arena-55k", winner_model_a=0, winner_tie=1)) == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"row 0: field 'winner_model_a' holds 1; expected a 1 in one of winner_model_a, "):
        as_lists(example("arena-55k", winner_model_b=1))


def test_a_rejected_answer_takes_the_place_of_the_last_one():
    dialogue = [user("Hi"), assistant("Hello!"), *TURN]
    (found,) = as_lists([{"messages": [*dialogue, assistant(PENGUIN)], "rejected_response": EAGLE, "margin": 0.5}])
    assert found == {"prompt": dialogue, "completions": [[assistant(PENGUIN)], [assistant(EAGLE)]], "scores": [0.5, 0.0]}
    with pytest.raises(ValueError, match=r"row 0: field 'messages' .* expected messages that end with an answer"):
        as_lists([{"messages": dialogue, "rejected_response": EAGLE}])


def test_tools_may_be_empty_text():
    from larpo.data.chat_template import template_keywords

    (found,) = as_lists(example("LLaMA-Factory, sharegpt", tools=""))
    assert template_keywords(found) == {}


def test_calls_and_results_of_functions_are_read_from_sharegpt():
    call = {"name": "birds", "arguments": {"fly": False}}
    (row,) = example("LLaMA-Factory, sharegpt", system="Be brief.", tools=json.dumps([{"name": "birds"}]))
    row["conversations"] += [{"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "[kiwi]"}]
    (found,) = as_lists([row])
    called = {"role": "assistant", "content": "", "tool_calls": json.dumps([{"type": "function", "function": call}])}
    assert found["tools"] == row["tools"]
    assert [{k: v for k, v in m.items() if v is not None} for m in found["prompt"]] == [
        *(SYSTEM, *TURN, called),
        {"role": "tool", "content": "[kiwi]"},
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen_rating", "rejected_rating"),
        ("chosen-rating", "rejected-rating"),
        ("rating_chosen", "rating_rejected"),
    ],
)
def test_ratings_of_pairs_are_their_scores(names):
    """They were 1 and 0."""
    row = {"prompt": ASK, "chosen": PENGUIN, "rejected": EAGLE, **dict(zip(names, (4.5, 3), strict=True))}
    assert scores([row]) == [4.5, 3.0]
    assert scores([row], score="preference") == [1.0, 0.0]
    assert scores([row], score=names[0]) == [4.5, 3.0]


def test_a_margin_is_by_how_much_the_chosen_one_is_better():
    row = {"prompt": ASK, "chosen": PENGUIN, "rejected": EAGLE, "margin": 1.5}
    assert scores([row]) == [1.5, 0.0]
    with pytest.raises(
        ValueError, match=r"row 0: field 'margin' holds 0; expected a number above 0.*score='preference' leaves it"
    ):
        as_lists([row | {"margin": 0}])
    assert as_lists([row | {"margin": 0}], score="preference")[0]["margin"] == 0


def test_unpaired_answers_are_good_or_bad():
    for label in (2, "yes", None, 0.5):
        with pytest.raises(ValueError, match=r"row 0: field 'label' holds .*; expected True or False"):
            as_lists(example("unpaired", label=label))


def test_what_data_was_read_as_is_logged(caplog):
    with caplog.at_level("INFO", logger="larpo.data"):
        lists = as_lists(example("UltraFeedback"), score={"honesty": 1, "helpfulness": 0.5})
        as_lists(lists)  # which are lists, and read as such
    weights = "1 × `completions[].annotations.honesty.Rating` + 0.5 × `completions[].annotations.helpfulness.Rating`"
    assert caplog.messages == [f"read as UltraFeedback data, scored by {weights}: 1 lists"]


# --- text and messages


def test_text_becomes_turns_and_turns_text_where_that_is_asked_for():
    (row,) = example("pairs")
    assert as_lists([row], as_messages=True)[0]["prompt"] == TURN
    (row,) = example("UltraFeedback")
    (found,) = as_lists([row], as_messages=False)
    assert (found["prompt"], found["completions"]) == (ASK, [PENGUIN, KIWI, EAGLE])
    with pytest.raises(ValueError, match=r"row 0: field 'prompt' holds .*; expected one turn of the user"):
        as_lists(example("Nectar"), as_messages=False)
    with pytest.raises(ValueError, match=r"row 0: field 'system' holds 'Be brief\.'; expected none"):
        as_lists(example("Orca-DPO"), as_messages=False)
    assert as_lists(example("Orca-DPO", system=""), as_messages=False)[0]["prompt"] == ASK
    with pytest.raises(ValueError, match=r"row 0: field 'prompt' .*a prompt of its own"):
        as_lists([{"chosen": "The bird is a kiwi", "rejected": "The bird is an eagle"}], as_messages=True)


def test_dialogues_as_text_become_turns():
    text = f"\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: {ASK}\n\nAssistant:"
    (found,) = as_lists([{"chosen": f"{text} {PENGUIN}", "rejected": f"{text} {EAGLE}"}], as_messages=True)
    assert found["prompt"] == [user("Hi"), assistant("Hello!"), *TURN]
    assert found["completions"] == [PENGUIN, EAGLE]
    said = "Human: a\n\nAssistant: b"  # by a user, who is no dialogue
    assert as_lists(example("UltraFeedback", instruction=said))[0]["prompt"] == [user(said)]
    assert as_lists(example("pairs", prompt=said), as_messages=True)[0]["prompt"] == [user(said)]
    for bad in ("\n\nHuman: a\n\nHuman: b\n\nAssistant: ", "\n\nHuman: a", "Hello"):
        with pytest.raises(ValueError, match=r"row 0: field 'prompt' "):
            as_lists(example("Nectar", prompt=bad))


def test_a_system_column_is_the_first_message_unless_there_is_one():
    row = {"prompt": TURN, "completions": [PENGUIN, EAGLE], "scores": [1.0, 0.0], "system": "Be brief."}
    for data in ([row], datasets.Dataset.from_list([row])):
        assert as_lists(data)[0] == {"prompt": [SYSTEM, *TURN], "completions": [PENGUIN, EAGLE], "scores": [1.0, 0.0]}
    assert as_lists([row | {"system": ""}])[0]["prompt"] == TURN
    assert as_lists([row | {"prompt": [{"role": "system", "content": "Own."}, *TURN]}])[0]["prompt"][0]["content"] == "Own."
    with pytest.raises(ValueError, match=r"row 0: field 'system' holds 3; expected a string"):
        as_lists([row | {"system": 3}])


# --- prompts that are not where they are looked for


def test_a_question_in_another_column_is_no_empty_prompt():
    pair = {"chosen": PENGUIN, "rejected": EAGLE}
    for row, column in (
        (pair | {"query": ASK}, "query"),
        (pair | {"frage": "Welcher Vogel fliegt nicht?"}, "frage"),
        ({"chosen": "The bird is a kiwi", "rejected": "The bird is an eagle", "query": ASK}, "query"),
        ({"prompt": "", "completions": [PENGUIN, EAGLE], "scores": [1.0, 0.0], "query": ASK}, "query"),
    ):
        for data in ([row], datasets.Dataset.from_list([row])):
            with pytest.raises(ValueError, match=rf"row 0: field 'prompt' .* columns={{'prompt': '{column}'"):
                as_lists(data)
    how = {"prompt": "query", "completions": ["chosen", "rejected"], "scores": [1, 0]}
    assert as_lists([pair | {"query": ASK}], columns=how)[0]["prompt"] == ASK
    assert as_lists([pair | {"id": "x7"}])[0]["prompt"] == ""
    hh = {side: f"\n\nHuman: {ASK}\n\nAssistant: {pair[side]}" for side in pair}
    assert as_lists([hh | {"query": ASK}])[0]["prompt"] == f"\n\nHuman: {ASK}\n\nAssistant:"


def test_the_lists_of_every_form_are_tokenised_with_their_answers_counted():
    from larpo.data.tokenization import tokenize_lists
    from tests.helpers.tokenizer_families import tiny_tokenizer

    tokenizer = tiny_tokenizer("byte-level")
    for name, (rows, prompt, completions, scores, _) in EXAMPLES.items():
        tokens, report = tokenize_lists(as_lists(rows), tokenizer)
        (row,) = tokens.to_list()
        assert row["scores"] == scores and report.lists == 1, name
        asked = tokenizer.decode(row["prompt_ids"])
        assert ASK in asked and ("<|user|>" in asked) == (not isinstance(prompt, str)), name
        for answer, ids in zip(completions, row["completion_ids"], strict=True):
            said = answer if isinstance(answer, str) else answer[0]["content"]
            assert tokenizer.decode(ids).startswith(said), name
