"""Lists that teach nothing are made up for with further prompts, so many times and no more."""

import pytest

from larpo.align import stages
from larpo.align.prompts import of_iteration
from larpo.runs.files import read_json
from tests.helpers.align_runs import PROMPTS, align, config, count_o, rows_of


def of_cats_all_alike(prompts, completions, **columns):
    """A prompt about a cat is hopeless."""
    return [
        0.0 if "cat" in p else len(c) + score for p, c, score in zip(prompts, completions, count_o(completions), strict=True)
    ]


def nothing(completions, **columns):
    return [1.0] * len(completions)


def test_lists_without_an_order_are_replaced_by_those_of_the_prompts_that_come_next(tmp_path):
    settings = dict(iterations=2, reward=of_cats_all_alike, refill=True, prompts_per_iteration=5)
    result = align(tmp_path, **settings)
    order = [row["prompt"] for row in read_json(tmp_path / "prompts.json")["train"]]
    first = 0
    for iteration in (1, 2):
        own = [row["prompt"] for row in rows_of(tmp_path, iteration, "candidates")]
        further = [row["prompt"] for row in rows_of(tmp_path, iteration, "refilled")]
        assert own + further == [order[(first + i) % len(order)] for i in range(5 + len(further))]
        assert not set(own) & set(further)
        first += 5 + len(further)  # the next iteration begins behind them
        counts = result.metrics[iteration]
        assert (
            counts["refill"]["prompts"] == len(further)
            and counts["refill"]["lists_with_order"] == counts["lists"]["lists"] == 5
        )
        assert {row["prompt"] for row in rows_of(tmp_path, iteration, "lists")} == {
            prompt for prompt in own + further if "cat" not in prompt
        }
    assert counts["refill"]["prompts"] > 0
    assert "| prompts refilled |" in result.summary.read_text()


def test_refilling_ends_after_so_many_rounds_and_is_not_done_again(tmp_path, monkeypatch):
    drawn = []

    def counted(run, prompts, wanted, draw=stages.draw):
        drawn.append([row["prompt"] for row in prompts])
        return draw(run, prompts, wanted)

    monkeypatch.setattr(stages, "draw", counted)
    settings = dict(iterations=1, reward=nothing, refill=True, refill_most=2, prompts_per_iteration=3)
    result = align(tmp_path, **settings)
    counts = result.metrics[1]["refill"] | {"seconds": 0}
    assert counts == dict(rounds=2, prompts=6, candidates=24, lists_with_order=0, seconds=0)
    assert [len(prompts) for prompts in drawn] == [4, 3, 3, 3, 4] and len(
        {prompt for prompts in drawn[1:4] for prompt in prompts}
    ) == 9
    before = rows_of(tmp_path, 1, "refilled")
    for name in ("refill.json", "refilled.parquet", "lists.json"):
        (tmp_path / "iteration-01" / name).unlink()
    assert align(tmp_path, **settings).metrics[1]["refill"]["prompts"] == 6 and rows_of(tmp_path, 1, "refilled") == before


def test_refilling_that_was_stopped_in_its_second_round_goes_on_there(tmp_path):
    calls, broken = [], True

    def reward(prompts, completions, **columns):
        calls.append(prompts)
        if broken and len(calls) == 4:  # the start, three prompts, one round, and this
            raise ConnectionError("away")
        return nothing(completions)

    settings = dict(iterations=1, reward=reward, refill=True, refill_most=2, prompts_per_iteration=3)
    with pytest.raises(RuntimeError, match="away"):
        align(tmp_path, **settings)
    broken = False
    align(tmp_path, **settings)
    assert calls[3] == calls[4] and len(calls) == 6
    asked = [prompt for prompts in calls[1:3] + calls[4:5] for prompt in prompts]
    assert len(set(asked)) == 9 and len(asked) == 36


def test_no_prompt_is_sampled_twice_in_an_iteration(tmp_path):
    result = align(tmp_path, iterations=1, reward=nothing, refill=True, refill_most=9, prompts_per_iteration=5)
    assert result.metrics[1]["refill"]["rounds"] == 2 and result.metrics[1]["refill"]["prompts"] == len(PROMPTS) - 4 - 5


def test_prompts_of_an_iteration_and_those_after_it():
    prompts = [{"prompt": letter} for letter in "abcde"]
    for iteration, further, own, rest in ((1, 0, "ab", "cde"), (2, 1, "de", "abc"), (3, 2, "bc", "dea")):
        assert "".join(row["prompt"] for row in of_iteration(prompts, 2, iteration, further)[0]) == own
        assert "".join(row["prompt"] for row in of_iteration(prompts, 2, iteration, further)[1]) == rest
    assert of_iteration(prompts, 7, 1)[1] == []


def test_bad_settings_of_refilling_are_refused(tmp_path):
    with pytest.raises(ValueError, match="refill needs prompts_per_iteration"):
        config(tmp_path, refill=True, prompts_per_iteration=None)
    with pytest.raises(ValueError, match="refill_most must be a whole number of at least 1, got 0"):
        config(tmp_path, refill=True, refill_most=0)
