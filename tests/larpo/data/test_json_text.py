"""Tool calls and tools on their way through Arrow: what was given is what the template reads."""

import json
import warnings

import datasets
import pytest

from larpo.data.loading import as_lists, load_lists
from larpo.data.tokenization import tokenize_lists, tokenize_row
from tests.helpers.tokenizer_families import with_template

SHOWN = (
    "{{ tools | tojson }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER = {"role": "user", "content": "hello"}
ARGUMENTS = [{"a": 1}, {"t": 2}, {"z": None, "b": [1, "two", {"c": None}], "a": "1"}, {"a": {"deep": 1.5}}, '{"as": "text"}']


def call(arguments):
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


def rows(arguments=ARGUMENTS):
    tools = [[{"z": 1, "a": None}], [{"a": "text"}], None, [{"a": [1]}], [{}]]
    return [
        {
            "prompt": [USER, call(one)],
            "completions": [[call(one)], [{"role": "assistant", "content": "no"}]],
            "scores": [1.0, 0.0],
            "tools": tool,
        }
        for one, tool in zip(arguments, tools, strict=False)
    ]


@pytest.fixture
def tokenizer():
    return with_template(SHOWN)


def texts(row, tokenizer):
    return tokenizer.decode(row["prompt_ids"]), tokenizer.decode(row["completion_ids"][0])


def check(tokens, tokenizer, arguments=ARGUMENTS):
    for row, one in zip(tokens, arguments, strict=True):
        prompt, completion = texts(row, tokenizer)
        assert completion == json.dumps(one, ensure_ascii=False) + "</s>"
        assert prompt.endswith(f"<|user|>hello</s><|assistant|>{json.dumps(one)}</s><|assistant|>")


def test_arguments_of_any_form_come_through_a_list_of_rows_and_a_file(tokenizer, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lists = as_lists(rows())
        check(tokenize_lists(lists, tokenizer)[0], tokenizer)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    check(tokenize_lists(load_lists(file), tokenizer)[0], tokenizer)
    for name, write in (("lists.parquet", lists.to_parquet), ("lists.jsonl", lists.to_json)):
        write(tmp_path / name)
        check(tokenize_lists(load_lists(tmp_path / name), tokenizer)[0], tokenizer)


def test_tools_keep_their_keys_and_types(tokenizer):
    tokens, _ = tokenize_lists(as_lists(rows()), tokenizer)
    starts = ['[{"z": 1, "a": null}]<', '[{"a": "text"}]<', "null<", '[{"a": [1]}]<', "[{}]<"]
    for row, start in zip(tokens, starts, strict=True):
        assert texts(row, tokenizer)[0].startswith(start)


def test_a_function_call_of_the_older_form_is_kept_too(tokenizer):
    tokenizer.chat_template = SHOWN.replace(
        "{% for c in", "{{ m.function_call.arguments | tojson if m.function_call }}{% for c in"
    )
    calls = [{"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": one}} for one in ARGUMENTS]
    tokens, _ = tokenize_lists(as_lists([{"prompt": [USER], "completions": [[c]], "scores": [1.0]} for c in calls]), tokenizer)
    assert [texts(row, tokenizer)[1] for row in tokens] == [json.dumps(one) + "</s>" for one in ARGUMENTS]


def test_pairs_and_settings_of_the_template_too(tokenizer):
    tokenizer.chat_template = "{{ look | tojson }}" + SHOWN
    pairs = [
        {
            "chosen": [USER, call(one)],
            "rejected": [USER, {"role": "assistant", "content": "no"}],
            "chat_template_kwargs": {"look": look},
        }
        for one, look in zip(ARGUMENTS, (1, "a", None, [1], {"b": 2}), strict=True)
    ]
    tokens, _ = tokenize_lists(as_lists(pairs), tokenizer)
    for row, one, look in zip(tokens, ARGUMENTS, ("1", '"a"', "null", "[1]", '{"b": 2}'), strict=True):
        prompt, completion = texts(row, tokenizer)
        assert prompt.startswith(look) and completion == json.dumps(one) + "</s>"


@pytest.mark.parametrize("form", ["lists", "pairs"])
def test_keys_that_a_dataset_filled_in_do_not_reach_the_template_and_this_is_said(tokenizer, form):
    arguments = ARGUMENTS[:2]
    given = rows(arguments)
    for row in given:
        del row["tools"]
    if form == "pairs":
        given = [{"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": row["completions"][1]} for row in given]
    filled = datasets.Dataset.from_list(given)
    with pytest.warns(UserWarning, match=r"dataset: arguments of tool calls held keys that are None, which were left out"):
        lists = as_lists(filled)
    check(tokenize_lists(lists, tokenizer)[0], tokenizer, arguments)


def test_a_dataset_that_keeps_json_as_it_is_keeps_its_nulls(tokenizer):
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no Json")
    arguments = ARGUMENTS[:4]
    given = [{key: value for key, value in row.items() if key != "tools"} for row in rows(arguments)]
    exact = datasets.Dataset.from_list(given, on_mixed_types="use_json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lists = as_lists(exact)
    check(tokenize_lists(lists, tokenizer)[0], tokenizer, arguments)


@pytest.mark.parametrize("calls", ["rain", '{"a": 1}'])
def test_tool_calls_that_are_no_list_are_named(tokenizer, calls):
    row = {"prompt": [USER], "completions": [[{"role": "assistant", "content": "", "tool_calls": calls}]], "scores": [1.0]}
    with pytest.raises(ValueError, match=r"tool_calls must be a list, or JSON text of one; got"):
        tokenize_row(row, tokenizer)


def test_prompts_of_a_parquet_file_lose_the_keys_that_it_filled_in(tmp_path):
    from larpo.align import AlignConfig
    from larpo.align.prompts import load_prompts
    from larpo.data.json_text import read_message

    given = [{"prompt": [{"role": "user", "content": str(one)}, call(one)]} for one in ARGUMENTS[:2]]
    datasets.Dataset.from_list(given).to_parquet(tmp_path / "prompts.parquet")
    config = AlignConfig(
        output_dir=str(tmp_path), model="m", reward="r:r", prompts=str(tmp_path / "prompts.parquet"), eval_prompts=1
    )
    with pytest.warns(UserWarning, match="arguments of tool calls held keys that are None"):
        prompts, held_out = load_prompts(config)
    for row in (*prompts, *held_out):
        user, answer = row["prompt"]
        assert read_message(answer)["tool_calls"][0]["function"]["arguments"] == json.loads(user["content"].replace("'", '"'))
