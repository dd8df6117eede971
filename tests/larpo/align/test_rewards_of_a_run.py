"""Rewards in the loop: judges that are asked call by call, whole lists, normalised sums, completions without an end."""

import statistics
from collections import Counter

import pytest
import torch

from larpo.align import load_config, stages
from larpo.align.config import differences
from larpo.align.loop import _rewards
from larpo.align.run_folder import RunFolder
from larpo.align.run_state import Run
from larpo.rewards import RewardError, judge
from larpo.runs.files import write_rows
from tests.helpers import align_runs, tiny
from tests.helpers.align_runs import align, config, count_o, rows_of
from tests.helpers.jsonl import write_jsonl
from tests.helpers.stand_in_server import StandIn


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(judge, "FIRST_WAIT", 0.01)


def test_a_run_that_goes_on_asks_a_server_nothing_twice(tmp_path):
    broken = True

    def answer(body, number):
        if broken and number == 9:
            return 403, "not today"
        return {"scores": count_o(body["completions"])}

    with StandIn(answer) as server:
        reward = {"url": server.url, "batch_size": 2, "max_in_flight": 3}
        with pytest.raises(RewardError, match="it answers 403 Forbidden: not today"):
            align(tmp_path, iterations=1, reward=reward)
        before, broken = len(server.completions), False
        result = align(tmp_path, iterations=1, reward=reward | {"max_in_flight": 1})
        assert result.metrics[1]["lists"]["lists"] > 0 and before >= 14
        asked = [
            (prompt, completion, tuple(ids))
            for body in server.bodies
            for prompt, completion, ids in zip(body["prompts"], body["completions"], body["completion_ids"], strict=True)
        ]
        assert set(Counter(asked).values()) == {1}
        align(tmp_path, iterations=1, reward=reward)
        assert len(server.completions) == len(asked)
        with pytest.raises(ValueError, match=r"holds another run: reward was .* and is"):
            align(tmp_path, iterations=1, reward=reward | {"api": "tei_predict"})
    for row in rows_of(tmp_path, 1, "candidates"):
        assert row["scores"] == count_o(row["completions"])


def test_a_groupwise_judge_sees_the_k_candidates_of_a_prompt_at_once(tmp_path):
    seen = []

    class Ranking:
        """The place among the others."""

        def __call__(self, prompts, completions, **columns):
            seen.append((prompts, completions))
            return [sum(text < other for other in completions) for text in completions]

    from larpo.rewards import Judge

    align(tmp_path, iterations=1, reward=Judge(reward=Ranking(), groupwise=True))
    rows = rows_of(tmp_path, 1, "candidates")
    assert all(([row["prompt"]] * 4, row["completions"]) in seen for row in rows)
    assert {len(completions) for _, completions in seen} == {4}
    for row in rows:
        assert row["scores"] == [sum(text < other for other in row["completions"]) for text in row["completions"]]


@pytest.mark.parametrize(
    "prompts", [("a", "a"), ([{"role": "user", "content": "a"}], [{"role": "user", "content": "a", "n": None}])]
)
def test_rewards_are_normalised_over_all_candidates_of_a_list_of_whichever_iteration(tmp_path, prompts):
    """Two rewards; the second, of which no reward of another scale may drown the order, weighs half. Messages are one prompt
    where the files of two iterations fill in other keys, which other messages of theirs have."""
    said = {1: [[1.0, 900.0], [2.0, 100.0]], 2: [[3.0, 100.0], [6.0, None]]}
    for iteration, rewards in said.items():
        row = {
            "prompt": prompts[iteration - 1],
            "prompt_ids": [1],
            "source": [f"iteration {iteration}"] * 2,
            "finished": [True, False],
            "completions": [f"c{values[0]}" for values in rewards],
            "completion_ids": [[int(values[0])] for values in rewards],
            "scores": [sum(value or 0.0 for value in values) for values in rewards],
            "rewards": rewards,
        }
        write_rows(RunFolder(tmp_path).iteration(iteration) / "candidates.parquet", [row])
    own = config(
        tmp_path, memory="all", reward=["a:b", "c:d"], reward_weights=[1.0, 0.5], normalise_rewards=True, truncated=0.25
    )
    stages.lists(Run(own, RunFolder(tmp_path), None, [], [], []), 2)
    a, b = ([1.0, 2.0, 3.0, 6.0], [900.0, 100.0, 100.0])
    first = [(x - statistics.mean(a)) / statistics.pstdev(a) for x in a]
    second = [(x - statistics.mean(b)) / statistics.pstdev(b) for x in b] + [0.0]
    cut = [0.0, 0.25, 0.0, 0.25]
    expected = [x + 0.5 * y - z for x, y, z in zip(first, second, cut, strict=True)]
    (row,) = rows_of(tmp_path, 2, "lists")
    assert row["scores"] == pytest.approx(sorted(expected, reverse=True), abs=1e-12)


@pytest.mark.parametrize("truncated", ["exclude", 100.0])
def test_completions_without_an_end_are_not_asked_about_or_rank_last(tmp_path, truncated):
    asked = []

    def count(completions, completion_ids, **columns):
        asked.extend(map(tuple, completion_ids))
        return count_o(completions)

    result = align(tmp_path, iterations=1, reward=count, truncated=truncated, max_new_tokens=20, eos_token=["e", "</s>"])
    rows = rows_of(tmp_path, 1, "candidates")
    cut = {tuple(ids) for row in rows for ids, ended in zip(row["completion_ids"], row["finished"], strict=True) if not ended}
    flags = [ended for row in rows for ended in row["finished"]]
    assert 0 < flags.count(False) == result.metrics[1]["score"]["truncated"] < len(flags)
    trained = [
        (score, tuple(ids) in cut)
        for row in rows_of(tmp_path, 1, "lists")
        for score, ids in zip(row["scores"], row["completion_ids"], strict=True)
    ]
    if truncated == "exclude":
        assert not cut & set(asked[16:-16])  # the held-out ones, before and after, are asked about whatever they are
        assert not any(is_cut for _, is_cut in trained) and result.metrics[1]["score"]["unscored"] == flags.count(False)
    else:
        assert all((score < -50) == is_cut for score, is_cut in trained) and any(is_cut for _, is_cut in trained)
        assert min(score for row in rows for score in row["scores"]) >= 0  # what was said stays in candidates.parquet
    assert result.metrics[1]["evaluate"]["unscored"] == 0 and result.metrics[1]["evaluate"]["reward"]["mean"] >= 0


def test_lists_whose_rewards_are_all_equal_are_counted(tmp_path):
    def coarse(completions, **columns):
        return [min(count, 1.0) for count in count_o(completions)]

    result = align(tmp_path, iterations=1, reward=coarse, k=2)
    tied = sum(len(set(row["scores"])) == 1 for row in rows_of(tmp_path, 1, "candidates"))
    assert result.metrics[1]["score"]["lists_without_order"] == tied > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(truncated="drop"), "truncated must be 'keep', 'exclude' or a number above 0, got 'drop'"),
        (dict(truncated=0), "truncated must be 'keep', 'exclude' or a number above 0, got 0"),
        (dict(reward={"url": "http://a/x", "groupwise": True}, memory="all"), "memory must be 'none' with a groupwise reward"),
        (dict(reward=[{"url": "http://a/x", "apii": "json"}]), "unknown setting of a reward 'apii'; did you mean 'api'"),
        (dict(reward_weights=[1.0, 2.0]), "reward_weights has 2 values; expected one for each of the 1 rewards"),
    ],
)
def test_bad_settings_of_rewards_are_refused_before_anything_is_sampled(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        align(tmp_path, **changes)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_reward_of_a_file_goes_on_as_the_same_run_with_other_ways_to_ask_it(tmp_path):
    import yaml

    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\nprompts: imdb\noutput_dir: run\nmemory: none\nnormalise_rewards: yes\ntruncated: 0.5\nreward:\n"
        "  - {url: 'http://node1:8000/classify', api: vllm_classify, model: judge, max_in_flight: 64}\n"
        "  - {reward: 'my.judges:prefer', groupwise: true, retries: 3}\n"
    )
    one = load_config(file)
    stored = yaml.safe_load(yaml.safe_dump(one.to_dict()))
    assert stored["reward"][0]["url"] == "http://node1:8000/classify"
    file.write_text(file.read_text().replace("node1", "node2").replace("64", "8").replace("retries: 3", "retries: 9"))
    assert differences(stored, load_config(file)) == []
    file.write_text(file.read_text().replace("model: judge", "model: other"))
    assert "model': 'other'" in differences(stored, load_config(file))[0]


def test_candidates_without_a_score_are_left_out_and_counted(tmp_path):
    def sometimes(completions, **columns):
        return [None if "a" in text else float(len(text)) for text in completions]

    result = align(tmp_path, iterations=1, reward=sometimes)
    scores = [score for row in rows_of(tmp_path, 1, "candidates") for score in row["scores"]]
    assert result.metrics[1]["score"]["unscored"] == scores.count(None) > 0
    assert result.metrics[1]["lists"]["unscored"] == scores.count(None)
    assert not [s for row in rows_of(tmp_path, 1, "lists") for s in row["scores"] if s is None]
    assert result.metrics[1]["evaluate"]["reward"]["mean"] > 0
    assert "reward: sometimes" in (tmp_path / "config.yaml").read_text()


def test_a_reward_that_raises_loses_nothing_that_was_sampled(tmp_path):
    calls = []

    def flaky(completions, prompts, **columns):
        calls.append(len(completions))
        if len(calls) == 3:  # the start's evaluation is one chunk, this is the second of the first iteration
            raise ConnectionError("no route to the judge")
        return align_runs.count_o(completions)

    with pytest.raises(RuntimeError, match="reward 'flaky' raised ConnectionError: no route to the judge"):
        align(tmp_path, iterations=1, reward=flaky)
    sampled = (tmp_path / "iteration-01" / "sampled.parquet").stat().st_mtime_ns
    align(tmp_path, iterations=1, reward=flaky)
    assert (tmp_path / "iteration-01" / "sampled.parquet").stat().st_mtime_ns == sampled
    assert calls == [16, 16, 8, 8, 16]  # chunks of 4 prompts: the first was not scored again


def test_columns_of_the_prompts_reach_the_reward(tmp_path):
    def matches(completions, answer, **columns):
        return [float(text.count(letter)) for text, letter in zip(completions, answer, strict=True)]

    rows = [{"prompt": prompt, "answer": "oate"[i % 4]} for i, prompt in enumerate(align_runs.PROMPTS)]
    write_jsonl((tmp_path / "prompts.jsonl"), rows)
    align(tmp_path / "run", iterations=1, reward=matches, prompts=str(tmp_path / "prompts.jsonl"))
    letters = {row["prompt"]: row["answer"] for row in rows}
    for row in rows_of(tmp_path / "run", 1, "candidates"):
        assert row["scores"] == [float(text.count(letters[row["prompt"]])) for text in row["completions"]]


def test_the_tokens_of_completions_reach_the_reward(tmp_path):
    def length(prompts, completions, completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    align(tmp_path, iterations=1, reward=length)
    for row in rows_of(tmp_path, 1, "candidates"):
        assert row["scores"] == [float(len(ids)) for ids in row["completion_ids"]]


def test_tools_of_a_prompt_reach_its_template_and_an_answer_that_it_began_stays_open(tmp_path):
    template = "{% if tools %}{{ tools[0]['name'] }} {% endif %}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    model = tiny.save(tmp_path / "model", spread=2.0, chat_template=template)
    rows = [
        {"prompt": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "a"}], "tools": [{"name": "one"}]}
        for prompt in align_runs.PROMPTS
    ]

    def reward(completions, **columns):
        return align_runs.count_o([one[0]["content"] for one in completions])

    align(tmp_path / "run", iterations=1, model=model, prompts=rows, reward=reward)
    for name in ("candidates", "lists"):
        for row in rows_of(tmp_path / "run", 1, name):
            assert tiny.tokenizer().decode(row["prompt_ids"]) == f"one {row['prompt'][0]['content']}</s>a"


def test_several_rewards_are_weighed(tmp_path):
    align(
        tmp_path,
        iterations=1,
        reward=["tests.helpers.align_runs:count_o", "tests.helpers.align_runs:count_o"],
        reward_weights=[1.0, -3.0],
    )
    for row in rows_of(tmp_path, 1, "candidates"):
        assert row["scores"] == [-2 * count for count in align_runs.count_o(row["completions"])]


def test_a_reward_without_an_order_leaves_the_policy_as_it_is(tmp_path, caplog):
    def same(completions, **columns):
        return [1.0] * len(completions)

    result = align(tmp_path, iterations=1, reward=same)
    assert result.metrics[1]["lists"] | {"seconds": 0} == result.metrics[1]["lists"] | {
        "seconds": 0,
        "tied_lists": 6,
        "lists": 0,
    }
    assert result.metrics[1]["train"]["steps"] == 0
    assert result.metrics[1]["evaluate"]["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert "no list has an order" in caplog.text


def test_a_sequence_classifier_is_a_reward(tmp_path):
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(**tiny.SIZES, num_labels=1))
    tiny.save(tmp_path, model=model)
    (reward,) = _rewards(config(tmp_path / "run", reward=str(tmp_path)), torch.device("cpu"))
    good, bad = reward(prompts=["the cat", "the cat"], completions=[" good", " bad"])
    assert good != bad
    with pytest.raises(ValueError, match="reward_weights has 2 values; expected one for each of the 1 rewards"):
        _rewards(config(tmp_path / "run", reward_weights=[1.0, 2.0]), torch.device("cpu"))
