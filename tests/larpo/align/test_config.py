"""Settings of the loop: what is refused, and what follows from what."""

import pytest

from larpo.align import AlignConfig, load_config
from larpo.align.config import differences
from larpo.rewards import Judge
from larpo.runs.settings import flag_values

NEEDED = dict(output_dir="run", model="m", prompts=["a"], reward="imdb_sentiment")


CHOSEN = ("reference", "sampler", "on_reward_error", "memory", "negatives", "keep_models")  # by name, from a few


def config(**changes):
    return AlignConfig(**{**NEEDED, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(iterations=0), "iterations must be a whole number of at least 1, got 0"),
        (dict(k=2.0), "k must be a whole number"),
        (dict(trained_layers=0), "trained_layers must be a whole number"),
        (dict(memory="some"), "memory must be one of 'none', 'previous', 'all', got 'some'"),
        *((dict([(name, None)]), f"{name} must be one of .*, got None") for name in CHOSEN),
        (dict(temperatures=[1.0, 0.8]), "temperature schedule must be a number, 3 numbers"),
        (dict(temperatures=0), "temperatures must be above 0"),
        (dict(eval_temperatures=[0.8]), "eval_temperatures must hold 1.0"),
        (dict(eval_temperatures=[1.0, 0.0]), "eval_temperatures must be above 0"),
        (dict(subset=[1]), "subset must be 'all', 'paper' or"),
        (dict(subset="some"), "subset must be 'all', 'paper' or"),
        (dict(subset=[2, 0], negatives="hard"), "has none"),
        (dict(compared_prompts=-1), "compared_prompts must be at least 0, got -1"),
        (dict(logps_tolerance=-0.1), "logps_tolerance must be at least 0, got -0.1"),
        (dict(k=1, memory="none"), "k must be at least 2"),
        (dict(training={"learning_rat": 1}), "unknown setting training.learning_rat; did you mean 'learning_rate'?"),
        (dict(training={"seed": 1}), "training.seed is settled by the loop: see seed"),
        (dict(training={"list_top": 1}), "training.list_top is settled by the loop: see subset"),
        (dict(training="fast"), "training must hold"),
        (dict(baseline="dpo", training={"objective": "listmle"}), "baseline dpo is pairwise"),
        (dict(baseline="dpo", subset=[1, 3]), "leave out subset"),
        (dict(trained_layers=1, peft={}), "exclude each other"),
        (dict(sampler="vllm", peft={}), "reads a whole model"),
        (dict(sampler_options={"x": 1}), "they need sampler vllm or server"),
        (dict(min_new_tokens=9, max_new_tokens=8), "min_new_tokens must be a whole number from 0 to max_new_tokens=8, got 9"),
        (dict(min_new_tokens=True), "min_new_tokens must be a whole number"),
        (dict(stop=["\n\n", ""]), "stop must be a text or a list of texts, none of them empty"),
        (dict(stop=[]), "stop must hold at least one text"),
        (dict(eos_token=2), "eos_token must be a text or a list of texts, none of them empty; got 2"),
    ],
)
def test_a_bad_setting_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("?", r"\?")):
        config(**changes)


def test_reports_may_be_none_as_in_TrainingArguments():
    assert load_config(None, NEEDED | {"report_to": None}).report_to is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(), (1, 3)),
        (dict(training={"objective": "listmle"}), (2, 2)),
        (dict(training={"objective": "listnet"}), (1, None)),
        (dict(subset=[3, 5]), (3, 5)),
        (dict(subset="all"), (1, None)),
        (dict(baseline="dpo"), (1, 1)),
    ],
)
def test_the_subset_follows_the_paper_unless_given(changes, expected):
    assert config(**changes).top_and_bottom() == expected


def test_what_is_trained_with():
    assert config().training_settings()["learning_rate"] == 5e-7
    assert config(training={"learning_rate": 1e-3}).training_settings()["learning_rate"] == 1e-3
    assert config(baseline="dpo").objective == "pairwise"
    assert not config(training={"reference_free": True}).training_settings()["precompute_ref_log_probs"]


def test_one_text_that_ends_completions_is_a_list_of_it():
    assert [config(stop=stop).stop_strings() for stop in (None, "\n\n", ["a", "b"])] == [(), ("\n\n",), ("a", "b")]


def test_temperatures_by_iteration():
    assert [config(temperatures=["linear", 1.2, 0.8]).temperature(i) for i in (1, 2, 3)] == [1.2, 1.0, 0.8]


def test_a_file_and_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nprompts: imdb\nreward: imdb_sentiment\nk: 4\ntraining:\n  learning_rate: 2e-4\n  beta: 0.2\n")
    flags = flag_values(["--training.beta", "3e-1", "--peft.r=8"], [AlignConfig])
    found = load_config(file, {"output_dir": "run", "k": 6} | flags)
    assert (found.k, found.training, found.peft) == (6, {"learning_rate": 2e-4, "beta": 0.3}, {"r": 8})


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("model: m\niteratons: 4\n", {}, r"run.yaml, line 2: unknown setting 'iteratons'; did you mean 'iterations'\?"),
        ("model: m\n", {"tempratures": 1}, r"unknown setting 'tempratures'; did you mean 'temperatures'\?"),
        ("model: m\n", {"k.x": 1}, "'k.x' is set, but k holds"),
        ("model: m\n", {"output_dir": "x"}, "prompts and reward must be given in .*run.yaml"),
        ("model: m\nmodel: n\n", {}, "line 2: 'model' is given twice"),
    ],
)
def test_a_bad_file_or_override_is_refused_with_its_place(tmp_path, text, overrides, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "run.yaml", {"k": 4} | overrides)


def test_what_config_yaml_holds_is_read_back_as_the_same_run():
    import yaml

    one = config(temperatures=("linear", 1.2, 0.8), subset=(1, 3), reward=[len, "x:y"], eval_temperatures=(1.0, 0.5))
    stored = yaml.safe_load(yaml.safe_dump(one.to_dict()))
    assert stored["reward"] == ["len", "x:y"]
    assert differences(stored, one) == []


def test_another_judge_around_the_same_reward_makes_another_run():
    before = config(reward=len).to_dict()
    assert differences(before, config(reward=Judge(reward=len, batch_size=2))) == []  # which only says how it is asked
    for changes in (dict(groupwise=True), dict(version="2")):
        now = config(reward=Judge(reward=len, **changes), memory="none")
        assert any(f"is {{'reward': 'len', {repr(changes)[1:]}" in one for one in differences(before, now))
        assert differences(now.to_dict(), now) == []


def test_differences_name_the_setting_and_both_values():
    before = config().to_dict()
    assert differences(before, config(k=4, training={"beta": 1.0})) == [
        "k was 10 and is 4",
        "training was {} and is {'beta': 1.0}",
    ]
    assert differences(before, config(iterations=5, output_dir="elsewhere")) == []
    linear = ["linear", 1.2, 0.8]
    older = {name: value for name, value in before.items() if name not in ("truncated", "refill")}
    assert differences(older, config()) == [] and differences(older, config(refill=True, prompts_per_iteration=2))[-1:] == [
        "refill was False and is True"
    ]
    assert differences(config(temperatures=linear).to_dict(), config(temperatures=linear, iterations=5)) == [
        "iterations was 3, and a linear temperature depends on it"
    ]
