"""Data of no known form: a mapping reads it, and without one it is refused with the mapping that would."""

import copy
import json
import pickle

import datasets
import pytest

from larpo.data.forms import UNSCORED, recognise
from larpo.data.loading import as_lists, load_lists
from larpo.data.reader import Reader
from larpo.data.reading import Reading
from larpo.data.validation import BadRow
from tests.helpers.jsonl import write_jsonl

POST = {
    "question": "Why is the sky blue?",
    "info": {"topic": "light"},
    "answers": [
        {"text": "Scattering.", "votes": 7, "place": 1, "by": "ann"},
        {"text": "Paint.", "votes": -2, "place": 2, "by": "bob"},
    ],
}
WHERE = {"prompt": "question", "completions": "answers[].text", "scores": "answers[].votes"}


def one(rows, **how):
    """The list that comes out, alike from a list of rows and from a Dataset."""
    (found,) = as_lists(rows, **how)
    assert as_lists(datasets.Dataset.from_list(rows), **how).to_list() == [found]
    return found


def test_a_mapping_reads_nested_columns_and_the_rest_is_kept():
    found = one([POST], columns={**WHERE, "source": "answers[].by"})
    expected = {"prompt": "Why is the sky blue?", "completions": ["Scattering.", "Paint."], "scores": [7.0, -2.0]}
    assert found == {**expected, "source": ["ann", "bob"], "info": {"topic": "light"}}


def test_a_mapping_may_be_json_text_as_on_a_command_line():
    assert as_lists([POST], columns=json.dumps(WHERE)).to_list() == as_lists([POST], columns=WHERE).to_list()


def test_ranks_are_best_where_they_are_lowest():
    where = {"prompt": "question", "completions": "answers[].text", "rank": "answers[].place"}
    assert one([POST], columns=where)["scores"] == [1.0, 0.0]


def test_columns_may_be_one_for_each_answer_with_numbers_for_scores():
    row = {"q": "2 + 2", "good": "4", "bad": "5", "s1": 0.5, "s2": -1}
    where = {"prompt": "q", "completions": ["good", "bad"]}
    assert one([row], columns={**where, "scores": [1, 0]})["scores"] == [1.0, 0.0]
    assert one([row], columns={**where, "scores": ["s1", "s2"]})["scores"] == [0.5, -1.0]
    assert one([{"q": {"text": "2 + 2"}, "good": "4", "bad": "5"}], columns={**where, "prompt": "q.text", "scores": [1, 0]})


def test_columns_of_lists_need_no_brackets():
    row = {"q": "2 + 2", "candidates": ["4", "5"], "rewards": [1.0, 0.0]}
    where = {"prompt": "q", "completions": "candidates", "scores": "rewards"}
    assert one([row], columns=where)["completions"] == ["4", "5"]
    assert one([row], columns={**where, "completions": "candidates[]", "scores": "rewards[]"})["completions"] == ["4", "5"]


def test_rows_of_one_answer_become_lists_wherever_they_stand():
    rows = [
        {"q": q, "a": a, "s": s, "id": i}
        for i, (q, a, s) in enumerate([("x", "1", 3), ("y", "2", 1), ("x", "3", -1), ("x", "1", 3)])
    ]
    where = {"prompt": "q", "completions": "a", "scores": "s", "group_by": "q"}
    for data in (rows, datasets.Dataset.from_list(rows)):
        first, second = as_lists(data, columns=where)
        assert first == {"prompt": "x", "completions": ["1", "3", "1"], "scores": [3.0, -1.0, 3.0], "id": [0, 2, 3]}
        assert (second["prompt"], second["completions"]) == ("y", ["2"])
    assert as_lists(rows, columns={k: v for k, v in where.items() if k != "group_by"}, group_by="q").to_list() == [
        first,
        second,
    ]
    with pytest.raises(ValueError, match=r"line 1: field 'q' holds None; expected what rows of one list share"):
        load_lists_of([{"q": None, "a": "1", "s": 3, "p": "x"}], columns={**where, "prompt": "p"})


def test_ranks_of_rows_of_one_answer_are_ahead_of_the_last_of_their_list(tmp_path):
    """As in docs/data.md; lists that start at 0 and at 1 are the same, ties too, and a stream has them."""
    places = [("x", "1", 2), ("x", "2", 1), ("x", "3", 2), ("y", "4", 0), ("y", "5", 3)]
    rows = [{"question": q, "answer": a, "place": p} for q, a, p in places]
    where = {"prompt": "question", "completions": "answer", "rank": "place", "group_by": "question"}
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    for found in (as_lists(rows, columns=where), load_lists(file, columns=where, streaming=True)):
        assert [one["scores"] for one in found] == [[0.0, 1.0, 0.0], [3.0, 0.0]]
    ranked = {"prompt": "question", "completions": ["good", "bad"], "rank": ["first", "second"], "group_by": "question"}
    row = {"question": "x", "good": "1", "bad": "2", "first": 0, "second": 1}
    with pytest.raises(ValueError, match=r"group_by='question' makes one list of several rows, and scores of columns data"):
        as_lists([row], columns=ranked)


def load_lists_of(rows, **how):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        file = write_jsonl(Path(folder) / "rows.jsonl", rows)
        return load_lists(file, **how)


def test_rows_that_only_compare_cannot_be_grouped():
    pair = {"prompt": "x", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=r"group_by='prompt' makes one list of several rows, and scores of pairs data"):
        as_lists([pair], group_by="prompt")
    scored = pair | {"score_chosen": 2.0, "score_rejected": 1.0}
    other = scored | {"chosen": "c", "score_chosen": 3.0}
    assert one([scored, other], group_by="prompt")["completions"] == ["a", "b", "c"]


def test_columns_of_the_list_must_agree_in_rows_of_one():
    rows = [{"q": "x", "a": "1", "s": 1, "weight": 1.0}, {"q": "x", "a": "2", "s": 0, "weight": 2.0}]
    where = {"prompt": "q", "completions": "a", "scores": "s", "group_by": "q"}
    with pytest.raises(ValueError, match=r"row 0: rows with the same 'q' differ in 'weight'"):
        as_lists(rows, columns=where)
    assert one([row | {"weight": 2.0} for row in rows], columns=where)["weight"] == 2.0


def test_lists_of_this_library_can_be_grouped_and_scored_without_scores():
    rows = [{"prompt": "x", "completions": ["1"], "scores": [1.0]}, {"prompt": "x", "completions": ["2"], "scores": [0.0]}]
    assert one(rows, group_by="prompt") == {"prompt": "x", "completions": ["1", "2"], "scores": [1.0, 0.0]}
    where = {"prompt": "question", "completions": "answers[].text"}
    assert as_lists([POST], columns=where, scored=False).column_names == ["prompt", "completions", "info"]
    assert recognise(["prompt", "completions"], Reading(), scored=False) is UNSCORED


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"prompt": "questions"},
            r"prompt is at 'questions', but there is no column 'questions'; did you mean 'question'\?; found",
        ),
        (
            {"scores": "answers[].vote"},
            r"row 0: field 'answers\[0\]\.vote' is missing; found \['by', 'place', 'text', 'votes'\]",
        ),
        ({"completions": "info[].text"}, r"row 0: field 'info' holds .*; expected a list of at least one completion"),
        ({"scores": "answers[].text"}, r"row 0: field 'answers\[0\]\.text' holds 'Scattering\.'; expected a finite number"),
        ({"scores": "question"}, r"row 0: field 'question' holds 'Why is the sky blue\?'; expected a finite number"),
        ({"scores": [1, 0, 0]}, "row 0: field 'scores' has length 3; expected 2, one for each completion"),
        ({"rank": "answers[].place"}, "columns must name scores or rank, not both"),
        ({"score": "answers[].votes"}, "columns has no 'score'; did you mean 'scores'"),
        ({"completions": "answers[].x[].text"}, r"columns\['completions'\] must have \[\] once at most"),
        ({"prompt": 3}, r"columns\['prompt'\] must be the name of a column, or a path"),
        ({"prompt": ["question"]}, r"columns\['prompt'\] must be the name of a column"),
        ({"scores": [1, "answers"]}, r"columns\['scores'\] must be columns or numbers, not both"),
    ],
)
def test_a_mapping_that_reads_nothing_says_why(change, said):
    with pytest.raises(ValueError, match=said):
        as_lists([POST], columns={**WHERE, **change})


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"columns": {"prompt": "question"}}, "columns must name 'completions'; it names prompt"),
        (
            {"columns": {"prompt": "question", "completions": "answers[].text"}},
            "columns must name 'scores', of which the highest",
        ),
        ({"columns": "[1]"}, "columns must be a dict or JSON text of one"),
        ({"columns": WHERE, "score": "votes"}, "columns say where the scores are, so form and score must be left out"),
        ({"form": "nectar"}, "form: none is called 'nectar'; did you mean 'Nectar'"),
        ({"form": "Nectar"}, r"form Nectar \{prompt, answers\} needs columns \['prompt'\], which are not among"),
        ({"columns": WHERE, "bad_rows": "skip"}, "bad_rows must be 'raise' or 'drop', got 'skip'"),
        ({"columns": WHERE, "as_messages": "yes"}, "as_messages must be None, True or False, got 'yes'"),
        ({"columns": WHERE, "group_by": "topic"}, "group_by: there is no column 'topic'; found"),
    ],
)
def test_settings_of_reading_that_say_nothing_sensible_are_refused(how, said):
    with pytest.raises(ValueError, match=said):
        as_lists([POST], **how)


def test_unknown_columns_are_refused_with_the_mapping_that_would_read_them():
    with pytest.raises(ValueError) as error:
        as_lists([POST])
    said = str(error.value)
    assert said.startswith("the list of rows: no known form of candidate lists in columns ['answers', 'info', 'question']; ")
    assert "the nearest is Nectar {prompt, answers}, which needs prompt too" in said
    assert f"columns={WHERE}" in said
    way = eval(said[said.index("columns=") + len("columns=") : said.index(" (all forms")])
    assert as_lists([POST], columns=way)[0]["scores"] == [7.0, -2.0]
    for row, way in (
        (
            {"query": "a", "answer": "b", "rating": 3},
            "{'prompt': 'query', 'completions': 'answer', 'scores': 'rating', 'group_by': 'query'}",
        ),
        ({"a": "b"}, "{'prompt': 'THE_QUESTION', 'completions': 'THE_ANSWERS', 'scores': 'THE_SCORES'}"),
        (
            {"question": "a", "responses": ["b"], "ranks": [1]},
            "{'prompt': 'question', 'completions': 'responses', 'rank': 'ranks'}",
        ),
    ):
        with pytest.raises(ValueError) as error:
            as_lists([row])
        assert f"columns={way}" in str(error.value)


def test_a_form_can_be_named_where_columns_fit_several():
    both = {"prompt": "x", "chosen": "a", "rejected": "b", "responses": ["a", "b", "c"], "rewards": [3.0, 2.0, 1.0]}
    assert len(one([both])["completions"]) == 3
    assert one([both], form="pairs")["completions"] == ["a", "b"]


def test_reading_a_row_changes_nothing_but_what_it_returns():
    """So that rows of a stream can be read one by one, in any order and process."""
    reader, row = Reader(recognise(POST, Reading(columns=WHERE), row=POST), POST, Reading(columns=WHERE)), copy.deepcopy(POST)
    assert reader.read(row, "row 0") == reader.read(row, "row 0")
    assert row == POST
    stream = datasets.Dataset.from_list([POST, POST]).to_iterable_dataset()
    assert [found["scores"] for found in stream.map(lambda row: reader.read(row, "row"))] == [[7.0, -2.0]] * 2


def test_a_bad_row_can_be_sent_from_one_process_to_another():
    error = BadRow("rows.jsonl, line 3", "field 'a' holds 1; expected: text", "'a' is not text")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason) == ("rows.jsonl, line 3: field 'a' holds 1; expected: text", "'a' is not text")
