"""Messages through the chat template: what training, sampling and reward models make of them is one text."""

import json

import datasets
import pytest

from larpo.data.chat_template import template_keywords, whole_text
from larpo.data.loading import as_lists
from larpo.data.tokenization import tokenize_lists, tokenize_row
from larpo.sampling import Distinct, Sampled, prompt_tokens
from tests.helpers.tokenizer_families import CHATML, tiny_tokenizer, with_template

USER = {"role": "user", "content": "hello"}
BEGUN = {"role": "assistant", "content": "the answer is"}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"in": {"type": "string"}}}}
SHOWN = "{% if tools %}{{ tools | tojson }}{% endif %}{% if terse is defined %}terse={{ terse }}{% endif %}" + CHATML


@pytest.fixture
def tokenizer():
    return tiny_tokenizer("byte-level")


@pytest.fixture
def showing():
    """A tokenizer whose template writes what it is given beside the messages."""
    return with_template(SHOWN)


def row_of(prompt, completions, **fields):
    return {"prompt": prompt, "completions": completions, "scores": [0.0] * len(completions), **fields}


def texts(row, tokenizer):
    tokens = tokenize_row(row, tokenizer)
    return [tokenizer.decode(ids) for ids in (tokens["prompt_ids"], *tokens["completion_ids"])]


@pytest.mark.parametrize("kind", ["text", "messages", "parts"])
def test_a_completion_goes_on_in_the_answer_that_the_prompt_began(tokenizer, kind):
    answers = {
        "text": " 46",
        "messages": [{"role": "assistant", "content": " 46"}],
        "parts": [{"role": "assistant", "content": [{"type": "text", "text": " 46"}]}],
    }
    if kind == "parts":
        render = "(m['content'] if m['content'] is string else m['content'] | map(attribute='text') | join)"
        tokenizer = with_template(CHATML.replace("m['content']", render))
        assert render in tokenizer.chat_template
    prompt, completion = texts(row_of([USER, BEGUN], [answers[kind]]), tokenizer)
    assert prompt == "<s><|user|>\nhello</s>\n<|assistant|>\nthe answer is"
    assert completion == " 46</s>"


def test_later_turns_follow_the_answer_that_was_begun(tokenizer):
    turns = [{"role": "assistant", "content": " 46"}, USER, {"role": "assistant", "content": "yes"}]
    _, completion = texts(row_of([USER, BEGUN], [turns]), tokenizer)
    assert completion == " 46</s>\n<|user|>\nhello</s>\n<|assistant|>\nyes</s>"


def test_a_call_of_a_tool_at_the_end_of_a_prompt_is_a_whole_turn(tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "rain"}}]}
    prompt, completion = texts(row_of([USER, call], ["yes"]), tokenizer)
    assert prompt.endswith("</s>\n<|assistant|>\n") and completion == "yes</s>"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER]},
        {"prompt": [USER, BEGUN]},
        {"prompt": [USER], "tools": [TOOL], "chat_template_kwargs": {"terse": True}},
        {"prompt": [USER, BEGUN], "tools": json.dumps([TOOL])},
    ],
)
def test_what_is_sampled_behind_is_what_is_trained_behind(showing, row):
    trained = tokenize_row(row_of(completions=["yes"], **row), showing)["prompt_ids"]
    assert list(prompt_tokens(showing, row["prompt"], template_keywords(row))) == trained


def test_tools_and_template_settings_of_a_row_reach_the_template(showing):
    prompt, _ = texts(row_of([USER], ["yes"], tools=[TOOL], chat_template_kwargs={"terse": False}), showing)
    assert prompt.startswith(json.dumps([TOOL])) and "terse=False" in prompt
    plain, _ = texts(row_of([USER], ["yes"], tools=[], chat_template_kwargs=None), showing)
    assert plain.startswith("<s><|user|>")


def test_keys_that_arrow_fills_in_do_not_reach_the_template(showing):
    other = {"type": "function", "function": {"name": "sun", "parameters": {"at": {"type": "string"}}}}
    pairs = (TOOL, {"terse": True}), (other, {"long": True})
    rows = [row_of([USER], ["yes"], tools=[tool], chat_template_kwargs=more) for tool, more in pairs]
    tokens, _ = tokenize_lists(as_lists(datasets.Dataset.from_list(rows)), showing)
    assert tokens.to_list() == [tokenize_row(row, showing) for row in rows]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": "rain"}, "row: tools must be a list of JSON schemas, or JSON text of one; got 'rain'"),
        ({"tools": {"a": 1}}, "row: tools must be a list"),
        ({"chat_template_kwargs": "terse"}, "row: chat_template_kwargs must be a dict, or JSON text of one; got 'terse'"),
    ],
)
def test_bad_template_columns_are_named(tokenizer, fields, message):
    with pytest.raises(ValueError, match=message):
        tokenize_row(row_of([USER], ["yes"], **fields), tokenizer)


def test_a_distinct_sampler_hands_on_the_keywords_of_the_prompts_that_it_asks_again():
    asked = []

    def sampler(prompts, k, temperature, *, seed, template):
        asked.append((list(prompts), list(template)))
        return [[Sampled("x", (0 if prompt == "a" else len(asked),), True, (0,))] for prompt in prompts]

    Distinct(sampler, tries=2)(["a", "b"], 2, 1.0, seed=0, template=[{}, {"terse": True}])
    assert asked[0] == (["a", "a", "b", "b"], [{}, {}, {"terse": True}, {"terse": True}])
    assert asked[1] == (["a", "b"], [{}, {"terse": True}])


def test_a_reward_model_reads_the_text_that_is_trained_on(showing):
    from larpo.rewards import SequenceClassifier

    row = {"tools": [TOOL], "chat_template_kwargs": {"terse": True}}
    judge = SequenceClassifier.__new__(SequenceClassifier)
    judge.tokenizer, judge.max_length = showing, None
    text = whole_text(showing, [USER, BEGUN], " 46", template_keywords(row))
    assert text.endswith("the answer is 46</s>\n") and "terse=True" in text
    assert judge._encode([USER, BEGUN], " 46", row) == showing(text, add_special_tokens=False).input_ids


# --- parts of contents


PARTS = CHATML.replace(
    "{{ m['content'] }}", "{% for p in m['content'] %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
)
BOTH = CHATML.replace(
    "{{ m['content'] }}", "{{ m['content'] if m['content'] is string else m['content'] | map(attribute='text') | join }}"
)


@pytest.mark.parametrize("template", [CHATML, PARTS, BOTH])
def test_parts_of_text_and_strings_are_one_text_for_every_template(template):
    tokenizer = with_template(template)
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    expected = ["<s><|user|>\nhello</s>\n<|assistant|>\n", "yes</s>", "no</s>"]
    for content in ("hello", parts):
        prompt = [{"role": "user", "content": content}]
        answer = [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}]
        assert texts(row_of(prompt, [[{"role": "assistant", "content": "yes"}], answer]), tokenizer) == expected
        assert tokenizer.decode(prompt_tokens(tokenizer, prompt)) == expected[0]


IMAGE = {"type": "image", "image": "cat.png"}


@pytest.mark.parametrize(
    "convert", [tokenize_row, lambda row, _: as_lists([row]), lambda row, _: as_lists(datasets.Dataset.from_list([row]))]
)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": [{"role": "user", "content": [IMAGE]}]}, r"field 'prompt\[0\].content\[0\]' .*expected a part of text"),
        ({"completions": [[{"role": "assistant", "content": [IMAGE]}]]}, r"field 'completions\[0\]\[0\].content\[0\]'"),
        ({"images": ["cat.png"]}, r"field 'images' .*expected no such column: models of text alone are trained"),
        ({"image": "cat.png"}, "field 'image'"),
        ({"videos": ["a"]}, "field 'videos'"),
        ({"audio": "a"}, "field 'audio'"),
    ],
)
def test_images_and_sound_are_refused(tokenizer, convert, fields, message):
    with pytest.raises(ValueError, match=message):
        convert(row_of([USER], [[{"role": "assistant", "content": "yes"}]]) | fields, tokenizer)


def test_a_column_of_images_that_is_empty_is_no_image(tokenizer):
    assert as_lists([row_of([USER], ["yes"], images=[], audio=None)])


def test_the_sampler_refuses_images_too(tokenizer):
    with pytest.raises(ValueError, match=r"content\[0\] of a message holds .*expected a part of text"):
        prompt_tokens(tokenizer, [{"role": "user", "content": [IMAGE]}])
