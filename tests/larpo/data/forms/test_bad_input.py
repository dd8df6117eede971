"""Every form with the same damages: what is wrong is said with line and field, and no row goes missing uncounted."""

import copy
import json
import re

import datasets
import pytest

from larpo.data.forms import FORMS
from larpo.data.forms.scores import Numbers, chosen_scores
from larpo.data.loading import as_lists, load_lists, read_lists
from larpo.data.reader import Reader
from larpo.data.reading import Reading
from tests.helpers.jsonl import write_jsonl
from tests.larpo.data.forms.examples import ASK, EAGLE, EXAMPLES, KIWI, PENGUIN

BY_NAME = {form.name: form for form in FORMS}
LISTED = ("prompt", "completions", "scores")


def columns_of(form):
    """The columns that every row must have something in."""
    scores = next(iter(form.scores.values()))
    return {*form.columns, *(column for column in scores.columns if column in EXAMPLES[form.name].rows[0])}


def leaves(value, path=()):
    """Paths to everything in a row, objects and lists too."""
    yield path
    for key, inside in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(inside, (*path, key))


def damaged(row, path, damage):
    row = copy.deepcopy(row)
    *way, last = path
    place = row
    for key in way:
        place = place[key]
    if damage == "missing":
        del place[last]
    else:
        place[last] = damage
    return row


MISSING_OR_WRONG = ["missing", None, 3.5, True, {"x": 1}, [[["x"]]], "{", "[1", float("nan")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_field_that_is_missing_or_holds_something_else_is_named_with_its_place(name):
    """Everything that a form reads in a row, at any depth: it is refused or counted, or no more than a text or a number."""
    form, (rows, *_) = BY_NAME[name], EXAMPLES[name]
    whole = Reader(form, rows[-1], Reading()).read(rows[-1], "row")
    refused = 0
    for path in filter(None, leaves(rows[-1])):
        if path[0] not in columns_of(form) or set(path) & {"model", "annotations", "overall_score"}:
            continue
        for damage in ("missing", None, 3.5, True, {"x": 1}, [[["x"]]], "{", "[1", float("nan")):
            reader = Reader(form, rows[-1], Reading())
            try:
                found = reader.try_read(damaged(rows[-1], path, damage), "rows.jsonl, line 3")
            except ValueError as error:
                said = str(error)
                assert re.match(r"rows\.jsonl, line 3: (field '\S+' |holds \d+ answers)", said), (path, damage, said)
                assert "\n" not in said and ("expected" in said or "is missing; found" in said), (path, damage, said)
                refused += 1
                continue
            if found is None or reader.left_out.answers:
                assert reader.left_out.rows.total() + reader.left_out.answers.total() == 1
                continue
            same = all(found[column] == whole[column] for column in LISTED)
            assert same or isinstance(damage, str | bool | float), (
                path,
                damage,
                found,
            )  # text for a text, a number for a number
    assert refused > 10


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_bad_line_of_a_file_is_named(name, tmp_path):
    rows = EXAMPLES[name].rows
    file, column = tmp_path / "rows.jsonl", BY_NAME[name].columns[-1]
    write_jsonl(file, [*rows, {**rows[-1], column: {"x": 1}}])
    with pytest.raises(ValueError, match=rf"line {len(rows) + 1}: field '{column}\S*' (holds|is missing)"):
        load_lists(file)


@pytest.mark.parametrize("name", EXAMPLES)
def test_rows_that_make_no_list_are_dropped_on_demand_and_counted(name, tmp_path, caplog):
    rows = EXAMPLES[name].rows
    column = BY_NAME[name].columns[-1]
    file = tmp_path / "rows.jsonl"
    bad = [{**rows[0], column: [3]}, {key: value for key, value in rows[0].items() if key != column}]
    write_jsonl(file, [*bad, *rows])
    lists = load_lists(file, bad_rows="drop")
    assert lists.to_list() == as_lists(rows).to_list()
    (said,) = caplog.messages
    assert "2 rows were left out: " in said and f"(first: {file}, line 1)" in said and f"'{column}' is missing" in said
    caplog.clear()
    dataset = as_lists(datasets.Dataset.from_list([*rows, {**rows[0], column: None}]), bad_rows="drop")
    assert dataset.to_list() == as_lists(rows).to_list()
    assert "1 row was left out: " in caplog.text
    with pytest.raises(ValueError, match=r"no row makes a list: 2 rows were left out"):
        as_lists(bad, bad_rows="drop")


TEXTS = {
    "unicode": "naïve 👩‍🚀 مرحبا 你好 \u2028 \x00",
    "HTML": '<p>a &amp; b</p>\n<script>alert("x")</script>',
    "long": "word " * 20_000 + "end",
    "JSON": '{"answer": [1, {"role": "x"}]}',
    "markup": "<|im_start|> [/INST] {{ x }} {% y %}",
}


def retold(value, text):
    """The value with other texts, in JSON that is text too."""
    if isinstance(value, dict):
        return {key: retold(inside, text) for key, inside in value.items()}
    if isinstance(value, list):
        return [retold(inside, text) for inside in value]
    if isinstance(value, str) and value.startswith("["):
        return json.dumps(retold(json.loads(value), text))
    if isinstance(value, str):
        for i, said in enumerate((ASK, PENGUIN, KIWI, EAGLE)):
            value = value.replace(said, f"{i}{text}{i}" if text[0] != "{" else text.replace("1", str(i)))
    return value


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_come_through_as_they_are(text, tmp_path):
    for name, (rows, *expected, _) in EXAMPLES.items():
        told = retold(rows, text)
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in told), encoding="utf-8")
        for source in (file, datasets.Dataset.from_list(told)):
            (found,) = load_lists(source).to_list()
            assert {column: found[column] for column in LISTED} == dict(zip(LISTED, retold(expected, text), strict=True)), name


@pytest.mark.parametrize("name", EXAMPLES)
def test_columns_of_lists_and_objects_may_be_json_text(name):
    """As a .csv file has them. JSON that is cut is named."""
    rows = EXAMPLES[name].rows
    nested = [column for column in columns_of(BY_NAME[name]) if isinstance(rows[0][column], list | dict)]
    if name == "lists":
        nested = []  # the form of larpo itself, in which a string is a string
    for column in nested:
        told = [{**row, column: json.dumps(row[column])} for row in rows]
        assert [{c: row[c] for c in LISTED} for row in as_lists(told)] == [
            {c: row[c] for c in LISTED} for row in as_lists(rows)
        ]
        cut = [{**row, column: json.dumps(row[column])[:-1]} for row in rows]
        with pytest.raises(ValueError, match=rf"row 0: field '{column}' holds .*; expected JSON \("):
            as_lists(cut)


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_answer_alone_and_answers_that_are_all_tied_are_lists(name):
    form, rows = BY_NAME[name], copy.deepcopy(EXAMPLES[name].rows)
    single = rows[:1] if form.group_by else [{column: shortened(column, value, form) for column, value in rows[0].items()}]
    m = len(EXAMPLES[name].completions)
    (found,) = as_lists(single)
    assert len(found["completions"]) == len(found["scores"]) == (1 if single != rows else m)
    scores = chosen_scores(form.scores, None, rows[0], name)
    if isinstance(scores, Numbers):
        (found,) = as_lists([{column: tied(column, value, scores) for column, value in row.items()} for row in rows])
        assert len(set(found["scores"])) == 1 and len(found["scores"]) == m


def shortened(column, value, form):
    listed = isinstance(value, list) and not (value and isinstance(value[0], dict) and {"role", "from"} & set(value[0]))
    return value[:1] if listed and column in {*form.columns, "model_names"} else value


def tied(column, value, scores):
    """The value with 1 in place of every number of the form's scores."""
    if isinstance(value, dict):
        return {key: tied(column, inside, scores) for key, inside in value.items()}
    if isinstance(value, list):
        return [tied(column, inside, scores) for inside in value]
    return 1 if column in scores.columns and isinstance(value, int | float) else value


def test_half_an_emoji_is_named(tmp_path):
    """Which JSON can write, and no text can hold."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "Oh \\ud83d"}')
    with pytest.raises(ValueError, match=r"line 1: field 'rejected' holds 'Oh \\ud83d'; expected whole characters"):
        load_lists(file)


# --- a Dataset is read in batches, whose columns and types need not be those of the first


def test_batches_of_which_nothing_is_left_are_no_lists():
    good, bad = ({"prompt": "a", "responses": ["b", "c"], "rewards": [score, 0.0]} for score in (1.0, None))
    dataset = datasets.Dataset.from_list([bad] * 1500 + [good] * 600 + [bad] * 2000 + [good])
    read = read_lists(dataset, Reading(bad_rows="drop"))
    assert read.lists.to_list() == as_lists([good] * 601).to_list()
    assert read.left_out.rows.total() == 3500 and next(iter(read.left_out.first.values())) == "dataset, row 0"


def test_columns_may_have_other_types_in_later_batches():
    row = {"instruction": "a", "generations": ["b", "c"], "ratings": [1, 2], "model_names": None}
    rows = [row] * 1001 + [row | {"model_names": ["m", "n"]}]
    for data in (rows, datasets.Dataset.from_list(rows)):
        lists = as_lists(data)
        assert (lists[0]["source"], lists[1001]["source"]) == (None, ["m", "n"])
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    turn, answer = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
    row = {"conversations": [turn], "chosen": answer, "rejected": answer | {"value": "c"}}
    later = row | {"conversations": [turn, call, turn]}
    prompts = as_lists(datasets.Dataset.from_list([row] * 1001 + [later]))["prompt"]
    assert json.loads(prompts[1001][1]["tool_calls"])[0]["function"] == {"name": "f", "arguments": {}}


def test_a_tokenizer_without_chat_template_is_told_of_text():
    from larpo.data.tokenization import tokenize_lists
    from tests.helpers.tokenizer_families import with_template

    tokenizer = with_template(None)
    rows = EXAMPLES["UltraFeedback"].rows
    with pytest.raises(ValueError, match=r"row 0: messages need a chat template, .* \(as_messages=False"):
        tokenize_lists(as_lists(rows), tokenizer)
    assert len(tokenize_lists(as_lists(rows, as_messages=False), tokenizer)[0][0]["completion_ids"]) == 3
