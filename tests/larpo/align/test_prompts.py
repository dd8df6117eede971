"""Prompts of the loop: from where they are read, which are left out, and in what order iterations have them."""

import datetime
import warnings

import pytest

from larpo.align.prompts import load_prompts, of_iteration
from tests.helpers import align_runs, tiny
from tests.helpers.align_runs import align, config


def test_messages_are_prompts_too(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    model = tiny.save(tmp_path / "model", spread=2.0, chat_template=template)
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return align_runs.count_o([one[0]["content"] for one in completions])

    def called(arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "a"}]

    arguments = [{"a": 1}, {"b": None, "a": "1"}, {"a": [2]}]  # what a column of Arrow cannot hold
    prompts = [[{"role": "user", "content": prompt}, *called(arguments[i % 3])] for i, prompt in enumerate(align_runs.PROMPTS)]
    result = align(tmp_path / "run", iterations=1, model=model, prompts=prompts, reward=reward, negatives="hard")
    assert all(prompt in prompts for prompt, _ in seen)
    prompt, completion = seen[0]
    assert prompt[0].keys() == {"role", "content"} and completion[0]["role"] == "assistant"
    assert result.metrics[1]["train"]["steps"] > 0


def test_prompts_that_come_twice_or_are_held_out_are_not_trained_on(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*"abcab", "", "d"]))
    train, held_out = load_prompts(config(tmp_path, prompts=str(file), eval_prompts=["b", "e"]))
    assert sorted(row["prompt"] for row in train) == ["a", "c", "d"]
    assert [row["prompt"] for row in held_out] == ["b", "e"]
    with pytest.raises(ValueError, match="eval_prompts must be at least 1 and below the 4 different prompts, got 4"):
        load_prompts(config(tmp_path, prompts=str(file), eval_prompts=4))
    with pytest.raises(ValueError, match=r"prompts, row 0: field 'images' .*models of text alone are trained"):
        load_prompts(config(tmp_path, prompts=[{"prompt": "a", "images": ["cat.png"]}, "b"]))
    with pytest.raises(ValueError, match="prompts, row 1: field 'prompt' is missing"):
        load_prompts(config(tmp_path, prompts=["a", {"text": "b"}]))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_prompts(config(tmp_path, prompts=str(tmp_path / "none.jsonl")))


def test_a_text_file_is_parted_at_newlines_and_at_nothing_else(tmp_path):
    prompts = ["a\x0bb", "c\x0cd", "e\x1cf\x1dg\x1eh", "i\x85j", "k\u2028l\u2029m", "n\ro", "p"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(prompts[:3]).encode() + b"\n\n \n" + "\n".join(prompts[3:]).encode())
    train, held_out = load_prompts(config(tmp_path, prompts=str(file), eval_prompts=1))
    assert sorted(row["prompt"] for row in train + held_out) == sorted(prompts)
    for content, said in ((b"", r"prompts\.txt holds no prompts"), (b"a\nb\xff\n", r"prompts\.txt .* line 2 is not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            load_prompts(config(tmp_path, prompts=str(file), eval_prompts=1))


def test_rows_of_one_prompt_that_say_different_things_are_counted_aloud(tmp_path):
    rows = [{"prompt": f"p{i // 2}", "answer": i} for i in range(8)]
    with pytest.warns(UserWarning, match="prompts: 4 of 8 rows have the prompt of an earlier row but other columns"):
        train, held_out = load_prompts(config(tmp_path, prompts=rows, eval_prompts=1))
    assert sorted(row["answer"] for row in train + held_out) == [0, 2, 4, 6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_prompts(config(tmp_path, prompts=[*rows[::2], *rows[::2]], eval_prompts=1))


def test_prompts_may_be_a_dataset(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": prompt, "letter": "o"} for prompt in align_runs.PROMPTS]
    data = Dataset.from_list(rows)
    align(tmp_path, iterations=1, prompts=data)
    assert align(tmp_path, iterations=1, prompts=rows).metrics  # the same run
    with pytest.raises(TypeError, match=r"prompts must be a file, .* or a datasets\.Dataset, got DatasetDict; choose a split"):
        config(tmp_path, prompts=DatasetDict(train=data))
    with pytest.raises(TypeError, match=r"eval_prompts must be .*, got DataFrame; .* to_dict\('records'\)"):
        config(tmp_path, eval_prompts=data.to_pandas())


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("completions", ["a"], r"prompts, row 0: columns \['completions'\] have names that the loop itself uses"),
        ("prompts", 1, r"columns \['prompts'\] have names"),
        ("rewards", 1, r"columns \['rewards'\] have names"),
        ("day", datetime.date(2020, 1, 1), "prompts, row 0: column 'day' holds what JSON can't .*date"),
        ("tools", "rain", "prompts, row 0: tools must be a list of JSON schemas"),
    ],
)
def test_columns_that_cannot_reach_the_reward_are_refused_before_anything_is_sampled(tmp_path, column, value, message):
    with pytest.raises(ValueError, match=message):
        align(tmp_path, prompts=[{"prompt": prompt, column: value} for prompt in align_runs.PROMPTS])
    assert not list(tmp_path.rglob("*.parquet"))


def test_iterations_walk_through_the_prompts_without_skipping_any():
    prompts = [{"prompt": letter} for letter in "abcde"]
    iterations = [[row["prompt"] for row in of_iteration(prompts, 2, i)[0]] for i in (1, 2, 3)]
    assert iterations == [["a", "b"], ["c", "d"], ["e", "a"]]
    assert of_iteration(prompts, None, 3) == of_iteration(prompts, 9, 3) == (prompts, [])
