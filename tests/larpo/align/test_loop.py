"""The loop: what each iteration does to candidates, lists, policy and reference, and what a run folder holds."""

import datetime
import json
import math
import warnings

import pytest

for package in ("transformers", "accelerate", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(package)
import torch
from safetensors.torch import load_file

from larpo.align import demo, stages
from larpo.align.run_folder import RunFolder
from larpo.align.run_state import Run
from larpo.runs.files import read_json, read_rows, write_rows
from larpo.runs.lock import locked
from tests.helpers import align_runs, tiny
from tests.helpers.align_runs import align, config


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """transformers hands its precision on through the environment, where the next trainer would find it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than an iteration; the run that all tests of a run share (made before this) has them."""
    monkeypatch.setattr("larpo.align.plots.draw", lambda *args: {})


def rows_of(folder, iteration, name):
    return read_rows(RunFolder(folder).iteration(iteration) / f"{name}.parquet")


def counts_of(folder, iteration, stage):
    return read_json(RunFolder(folder).iteration(iteration) / f"{stage}.json")


def weights(folder):
    return load_file(folder / "model.safetensors")


# --- a run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three iterations with memory and a large step, on more than one temperature."""
    folder = tmp_path_factory.mktemp("run")
    result = align(
        folder, iterations=3, memory="all", k=6, prompts_per_iteration=12, temperatures=[1.2, 1.0, 0.9], subset=[2, 2],
        eval_temperatures=[0.7, 1.0], solved_above=1.5, training=dict(objective="listmle", learning_rate=5e-3, beta=0.5),
    )  # fmt: skip
    return folder, result


def test_the_policy_learns_what_is_rewarded(finished):
    _, result = finished
    start, *_, last = (one["evaluate"] for one in result.metrics)
    assert last["reward"]["mean"] > start["reward"]["mean"] + 0.5
    assert last["win_rate"]["mean"] > 0.6
    assert last["kl"]["mean"] > 0.3
    assert start["kl"]["mean"] == 0 and start["win_rate"]["mean"] == 0.5


def test_candidates_have_scores_of_their_reward_and_say_where_they_come_from(finished):
    folder, _ = finished
    for iteration in (1, 2, 3):
        rows = rows_of(folder, iteration, "candidates")
        assert len(rows) == 12
        for row in rows:
            assert row["scores"] == align_runs.count_o(row["completions"])
            assert row["source"] == [f"iteration {iteration}"] * 6
            assert len(row["completion_ids"]) == 6


def test_each_iteration_samples_at_its_temperature_behind_its_own_prompts(finished):
    folder, _ = finished
    assert [counts_of(folder, i, "sample")["temperature"] for i in (1, 2, 3)] == [1.2, 1.0, 0.9]
    prompts = read_json(folder / "prompts.json")
    order = [row["prompt"] for row in prompts["train"]]
    assert len(order) == len(set(order)) == 12 and len(prompts["held_out"]) == 4
    assert [row["prompt"] for row in rows_of(folder, 2, "candidates")] == order
    assert not {row["prompt"] for row in prompts["held_out"]} & set(order)


def test_memorised_lists_are_one_ranked_pool_cut_to_its_ends(finished):
    folder, _ = finished
    pools = {}
    for iteration in (1, 2, 3):
        for row in rows_of(folder, iteration, "candidates"):
            pools.setdefault(row["prompt"], []).extend(zip(row["scores"], map(tuple, row["completion_ids"]), strict=True))
    lists = rows_of(folder, 3, "lists")
    assert {source for row in lists for source in row["source"]} == {"iteration 1", "iteration 2", "iteration 3"}
    for row in lists:
        distinct = {ids: score for score, ids in pools[row["prompt"]]}
        ranked = sorted(distinct.values(), reverse=True)
        assert row["scores"] == ranked[:2] + ranked[-2:]
    counts = counts_of(folder, 3, "lists")
    assert counts["memorised_candidates"] == 2 * 12 * 6
    assert counts["lists"] + counts["tied_lists"] + counts["short_lists"] == 12


def test_evaluation_figures_are_what_the_rows_say(finished):
    folder, result = finished
    rows = rows_of(folder, 3, "evaluation")
    assert sorted({row["temperature"] for row in rows}) == [0.7, 1.0]
    at_one = [row for row in rows if row["temperature"] == 1.0]
    found = result.metrics[3]["evaluate"]
    scores = torch.tensor([row["scores"] for row in at_one])
    assert found["reward"]["mean"] == pytest.approx(scores.mean().item())
    d = torch.tensor([row["logps"] for row in at_one]) - torch.tensor([row["initial_logps"] for row in at_one])
    assert found["kl"]["mean"] == pytest.approx(d.mean().item(), abs=1e-6)
    assert found["best_of_n"]["1"]["4"] == pytest.approx(scores.max(1).values.mean().item())
    assert found["recall_at_n"]["1"]["4"] == pytest.approx((scores > 1.5).any(1).float().mean().item())
    assert found["recall_at_n"]["1"]["1"] == pytest.approx((scores > 1.5).float().mean().item())


def test_evaluation_logps_are_those_of_the_saved_policy_and_the_initial_model(finished):
    from transformers import AutoModelForCausalLM

    folder, _ = finished
    row = next(row for row in rows_of(folder, 3, "evaluation") if row["temperature"] == 1.0)
    for column, name in (("logps", folder / "iteration-03" / "model"), ("initial_logps", align_runs.model_folder())):
        model = AutoModelForCausalLM.from_pretrained(name)
        for ids, expected in zip(row["completion_ids"], row[column], strict=True):
            tokens = torch.tensor([row["prompt_ids"] + ids])
            logp = model(tokens).logits.log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[-len(ids) :].sum()
            assert expected == pytest.approx(logp.item(), abs=1e-3)


def test_a_run_folder_can_be_read_by_a_person(finished):
    folder, result = finished
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "prompts.json", "metrics.json", "summary.md", "summary.html", "plots/reward-and-kl.png"} <= names
    assert not [name for name in names if "unfinished" in name or "chunks" in name or "checkpoint" in name]
    page = result.summary.read_text(encoding="utf-8")
    for said in ("| start ", "| iteration 3 ", "plots/n.png", "## Before and after", "objective: listmle"):
        assert said in page
    assert str(folder) not in page
    for line in page.splitlines():
        if line.startswith("!["):
            assert (folder / line.split("](")[1].rstrip(")")).is_file()
    html = (folder / "summary.html").read_text(encoding="utf-8")
    assert html.count("<img ") == html.count('<img src="data:image/png;base64,') == 3
    assert page.count("\n|") - 2 * page.count("\n| -") == html.count("<tr>") - html.count("<thead>")


def test_a_finished_run_is_not_run_again_and_is_not_mixed_with_another(finished):
    folder, result = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("iteration-0*/*")}
    same = dict(memory="all", k=6, prompts_per_iteration=12, subset=[2, 2], eval_temperatures=[0.7, 1.0], solved_above=1.5,
                training=dict(objective="listmle", learning_rate=5e-3, beta=0.5))  # fmt: skip
    again = align(folder, iterations=3, temperatures=[1.2, 1.0, 0.9], **same)
    assert again.metrics == result.metrics
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("iteration-0*/*")}
    with pytest.raises(ValueError, match=r"holds another run: seed was 0 and is 1; k was 6 and is 5$"):
        align(folder, iterations=3, temperatures=[1.2, 1.0, 0.9], **{**same, "k": 5}, seed=1)


def test_equal_seeds_give_equal_runs_and_other_seeds_others(tmp_path):
    runs = [align(tmp_path / str(i), iterations=1, seed=seed) for i, seed in enumerate((0, 0, 1))]
    found = [rows_of(run.folder, 1, "candidates") for run in runs]
    assert found[0] == found[1] != found[2]
    a, b, c = (weights(run.folder / "iteration-01" / "model")["model.norm.weight"] for run in runs)
    assert torch.equal(a, b) and not torch.equal(a, c)


# --- the reference, the policy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["iteration", "initial"])
def test_the_reference_is_the_policy_at_the_iterations_start_or_the_initial_model(tmp_path, reference):
    align(tmp_path, reference=reference, training=dict(learning_rate=1e-2, beta=0.5, per_device_train_batch_size=6))
    first = counts_of(tmp_path, 2, "train")["log"][0]
    lists = rows_of(tmp_path, 2, "lists")
    untouched = sum(math.log(len(row["scores"])) for row in lists) / len(lists)
    assert (first["loss"] == pytest.approx(untouched, rel=1e-4)) == (reference == "iteration")
    start = counts_of(tmp_path, 1, "train")["log"][0]  # in the first iteration both are the same model
    lists = rows_of(tmp_path, 1, "lists")
    assert start["loss"] == pytest.approx(sum(math.log(len(row["scores"])) for row in lists) / len(lists), rel=1e-4)


def test_only_the_last_layers_are_trained(tmp_path):
    align(tmp_path, iterations=1, trained_layers=1, training=dict(learning_rate=1e-2))
    from pathlib import Path

    before, after = weights(Path(align_runs.model_folder())), weights(tmp_path / "iteration-01" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.layers.1.") for name in changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(eos_token="<|im_end|>"), r"eos_token: the tokenizer has no token '<\|im_end\|>'"),
        (dict(trained_layers=3), "trained_layers=3, but LlamaForCausalLM has 2 layers"),
        (dict(peft={"rr": 2}), "peft: .*unexpected keyword argument 'rr'"),
        (dict(peft={"target_modules": ["nope"]}), "peft: Target modules .*nope.* not found"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_sampled(tmp_path, changes, message):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=message):
        align(tmp_path, iterations=1, **changes)
    assert not list(tmp_path.rglob("*.parquet"))


def test_completions_end_where_the_settings_say(tmp_path):
    """The fewest tokens are for what is trained on: evaluation draws from the policy itself."""
    align(tmp_path, iterations=1, eos_token=["e", "</s>"], stop="o", min_new_tokens=2, max_new_tokens=20, temperatures=1.5)
    tokenizer = tiny.tokenizer()
    ends = {tokenizer.convert_tokens_to_ids(name) for name in ("e", "</s>")}
    for row in read_rows(tmp_path / "start" / "evaluation.parquet"):
        for ids, text, finished in zip(row["completion_ids"], row["completions"], row["finished"], strict=True):
            written = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:-1], ids)]
            assert finished is (ids[-1] in ends or "o" in written[1])
            assert not ends & set(ids[:-1]) and "o" not in written[0] and "o" not in text
    sampled = [ids for row in read_rows(tmp_path / "iteration-01" / "sampled.parquet") for ids in row["completion_ids"]]
    assert min(map(len, sampled)) == 3  # two, and one that may end it


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_policy_is_trained_in_float32_whatever_its_checkpoint_holds_unless_a_dtype_is_given(tmp_path, dtype):
    """In bf16 a step of 5e-7 changes hardly a weight: all that are larger than 2e-4 stay as they are."""
    from tests.helpers import tiny

    tiny.causal_lm(spread=2.0, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    given = {} if dtype is None else {"model_init_kwargs": {"dtype": dtype}}
    align(tmp_path / "run", iterations=1, model=str(tmp_path / "model"), training=dict(learning_rate=5e-7), **given)
    before, after = weights(tmp_path / "model"), weights(tmp_path / "run" / "iteration-01" / "model")
    moved = torch.cat([(before[name].float() != after[name].float()).flatten() for name in before]).float().mean()
    if dtype is None:
        assert after["model.norm.weight"].dtype == torch.float32 and moved > 0.5
    else:
        assert after["model.norm.weight"].dtype == torch.bfloat16 and moved < 0.1


def test_a_model_in_the_home_folder_is_found(tmp_path, monkeypatch):
    from pathlib import Path

    from larpo.align.models import Models

    model = Path(align_runs.model_folder())
    monkeypatch.setenv("HOME", str(model.parent))
    models = Models(config(tmp_path, model=f"~/{model.name}"), torch.device("cpu"))
    assert models.load(models.initial()).config.hidden_size == 32


def test_an_adapter_goes_on_from_iteration_to_iteration(tmp_path):
    pytest.importorskip("peft")
    result = align(tmp_path, peft={"r": 2, "target_modules": ["q_proj", "v_proj"]}, training=dict(learning_rate=5e-2, beta=0.5))
    first, second = (load_file(tmp_path / f"iteration-0{i}" / "model" / "adapter_model.safetensors") for i in (1, 2))
    assert first.keys() == second.keys()
    moved = sum((second[name] - first[name]).norm() for name in first)
    whole = sum(second[name].norm() for name in first)
    assert 0 < moved < whole  # a fresh adapter would be further away
    assert result.metrics[2]["evaluate"]["kl"]["mean"] != 0
    first = counts_of(tmp_path, 2, "train")["log"][0]  # the reference has the adapter as it was
    assert first["loss"] == pytest.approx(math.log(4), abs=0.02)


def test_the_adapter_in_a_folder_goes_on_to_be_trained(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(align_runs.model_folder())
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "sft")
    given = dict(model=str(tmp_path / "sft"), training=dict(learning_rate=1e-2, beta=0.5))
    align(tmp_path / "run", **given)
    folders = [tmp_path / "sft", *(tmp_path / "run" / f"iteration-0{i}" / "model" for i in (1, 2))]
    sft, first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert sft.keys() == first.keys() == second.keys()
    assert all(0 < (b[name] - a[name]).norm() < a[name].norm() for a, b in ((sft, first), (first, second)) for name in a)
    for i in (1, 2):
        assert counts_of(tmp_path / "run", i, "train")["log"][0]["loss"] == pytest.approx(math.log(4), abs=0.02)
    for other in (dict(peft={"r": 2}), dict(trained_layers=1)):
        with pytest.raises(ValueError, match=r"must be left out where model=.* is an adapter's folder"):
            align(tmp_path / "other", **given, **other)


def test_a_run_is_made_longer_by_raising_iterations_also_where_only_the_last_policy_stays(tmp_path):
    short = align(tmp_path, iterations=1, keep_models="last")
    longer = align(tmp_path, iterations=2, keep_models="last")
    assert longer.metrics[:2] == short.metrics and len(longer.metrics) == 3
    assert not (tmp_path / "iteration-01" / "model").exists()
    assert (tmp_path / "iteration-02" / "model" / "model.safetensors").exists()
    assert align(tmp_path, iterations=2, keep_models="last").metrics == longer.metrics  # nothing is missed


# --- lists -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ("none", {"a": [6.0, 5.0]}),
        ("previous", {"a": [6.0, 5.0, 4.0, 3.0], "b": [9.0, 8.0]}),
        ("all", {"a": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], "b": [9.0, 8.0]}),
    ],
)
def test_memory(tmp_path, memory, expected):
    """Three iterations of candidates, of which the lists of the third are made."""
    scores = {1: {"a": [1.0, 2.0]}, 2: {"b": [9.0, 8.0], "a": [3.0, 4.0]}, 3: {"a": [5.0, 6.0, None, 7.0, 7.0]}}
    for iteration, prompts in scores.items():
        rows = [
            {"prompt": prompt, "prompt_ids": [1], "scores": found, "source": [f"iteration {iteration}"] * len(found),
             "completions": [f"c{score}" for score in found], "completion_ids": [[int(score or 0)] for score in found]}
            for prompt, found in prompts.items()
        ]  # fmt: skip
        if iteration == 3:  # the same tokens as the candidate of 5.0, which came first
            rows[0]["completion_ids"][3:] = [[5], [5]]
        write_rows(RunFolder(tmp_path).iteration(iteration) / "candidates.parquet", rows)
    run = Run(config(tmp_path, iterations=3, memory=memory), RunFolder(tmp_path), None, [], [], [])
    counts = stages.lists(run, 3)
    assert {row["prompt"]: row["scores"] for row in rows_of(tmp_path, 3, "lists")} == expected
    assert (counts["duplicates"], counts["unscored"], counts["lists"]) == (2, 1, len(expected))


def test_iterative_dpo_takes_the_ends_of_the_same_candidates(tmp_path):
    align(tmp_path / "dpo", iterations=1, baseline="dpo", subset="paper")
    align(tmp_path / "larpo", iterations=1)
    sampled = rows_of(tmp_path / "dpo", 1, "candidates")
    assert sampled == rows_of(tmp_path / "larpo", 1, "candidates")
    best_and_worst = {row["prompt"]: [max(row["scores"]), min(row["scores"])] for row in sampled}
    lists = rows_of(tmp_path / "dpo", 1, "lists")
    assert lists and all(row["scores"] == best_and_worst[row["prompt"]] for row in lists)
    log = counts_of(tmp_path / "dpo", 1, "train")["log"]
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.parametrize("negatives", ["hard", "related", "random"])
def test_negatives_fill_the_bottom(tmp_path, negatives):
    align(tmp_path, iterations=1, negatives=negatives, subset=[1, 2], k=6)
    lists = rows_of(tmp_path, 1, "lists")
    candidates = {row["prompt"]: row for row in rows_of(tmp_path, 1, "candidates")}
    assert lists
    for row in lists:
        own = candidates[row["prompt"]]
        assert row["scores"][0] == max(own["scores"])
        if negatives == "hard":
            order = sorted(range(6), key=lambda i: -own["scores"][i])
            lower = {tuple(own["completion_ids"][i]) for i in order[3:]}
            assert {tuple(ids) for ids in row["completion_ids"][1:]} <= lower
            assert all(logp < 0 for logp in row["logps"])
        else:
            assert row["source"] == ["iteration 1"] + [f"{negatives} prompt"] * 2
            assert all(score < min(own["scores"]) for score in row["scores"][1:])


# --- rewards ---------------------------------------------------------------------------------------------------


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


def test_an_iteration_whose_training_diverges_is_not_done_and_not_repeated_blindly(tmp_path):
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"training stops at step 2: the loss is nan.*lower learning_rate"):
            align(tmp_path, iterations=1, training=dict(learning_rate=1e30))
        folder = tmp_path / "iteration-01"
        assert not (folder / "model").exists() and not (folder / "train.json").exists()
        with pytest.raises(
            ValueError, match=r"iteration-01' has diverged before: training stops at step 2.*delete .*diverged.json"
        ):
            align(tmp_path, iterations=1, training=dict(learning_rate=1e30))
        (folder / "diverged.json").unlink()


def test_a_policy_whose_weights_are_not_finite_is_not_written(tmp_path, monkeypatch):
    from larpo.trainer import LarPOTrainer

    train = LarPOTrainer.train

    def into_nothing(self, **options):
        train(self, **options)
        self.model.lm_head.weight.data[0] = torch.nan

    monkeypatch.setattr(LarPOTrainer, "train", into_nothing)
    with pytest.raises(FloatingPointError, match=r"not finite \(lm_head.weight\).*nothing is written to .*iteration-01/model"):
        align(tmp_path, iterations=1)
    assert not (tmp_path / "iteration-01" / "model").exists()


def test_columns_of_the_prompts_reach_the_reward(tmp_path):
    def matches(completions, answer, **columns):
        return [float(text.count(letter)) for text, letter in zip(completions, answer, strict=True)]

    rows = [{"prompt": prompt, "answer": "oate"[i % 4]} for i, prompt in enumerate(align_runs.PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
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
    from tests.helpers import tiny

    tokenizer = tiny.tokenizer.__wrapped__()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0]['name'] }} {% endif %}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    )
    tiny.causal_lm(spread=2.0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "a"}], "tools": [{"name": "one"}]}
        for prompt in align_runs.PROMPTS
    ]

    def reward(completions, **columns):
        return align_runs.count_o([one[0]["content"] for one in completions])

    align(tmp_path / "run", iterations=1, model=str(tmp_path / "model"), prompts=rows, reward=reward)
    for name in ("candidates", "lists"):
        for row in rows_of(tmp_path / "run", 1, name):
            assert tokenizer.decode(row["prompt_ids"]) == f"one {row['prompt'][0]['content']}</s>a"


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

    from larpo.align.loop import _rewards
    from tests.helpers import tiny

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(**tiny.SIZES, num_labels=1))
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    (reward,) = _rewards(config(tmp_path / "run", reward=str(tmp_path)), torch.device("cpu"))
    good, bad = reward(prompts=["the cat", "the cat"], completions=[" good", " bad"])
    assert good != bad
    with pytest.raises(ValueError, match="reward_weights has 2 values; expected one for each of the 1 rewards"):
        _rewards(config(tmp_path / "run", reward_weights=[1.0, 2.0]), torch.device("cpu"))


# --- prompts ---------------------------------------------------------------------------------------------------


def test_messages_are_prompts_too(tmp_path):
    from tests.helpers import tiny

    tokenizer = tiny.tokenizer.__wrapped__()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    tiny.causal_lm(spread=2.0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return align_runs.count_o([one[0]["content"] for one in completions])

    def called(arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        return [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "a"}]

    arguments = [{"a": 1}, {"b": None, "a": "1"}, {"a": [2]}]  # what a column of Arrow cannot hold
    prompts = [[{"role": "user", "content": prompt}, *called(arguments[i % 3])] for i, prompt in enumerate(align_runs.PROMPTS)]
    result = align(
        tmp_path / "run", iterations=1, model=str(tmp_path / "model"), prompts=prompts, reward=reward, negatives="hard"
    )
    assert all(prompt in prompts for prompt, _ in seen)
    prompt, completion = seen[0]
    assert prompt[0].keys() == {"role", "content"} and completion[0]["role"] == "assistant"
    assert result.metrics[1]["train"]["steps"] > 0


def test_prompts_that_come_twice_or_are_held_out_are_not_trained_on(tmp_path):
    from larpo.align.prompts import load_prompts

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
    from larpo.align.prompts import load_prompts

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
    from larpo.align.prompts import load_prompts

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
    from larpo.align.prompts import of_iteration

    prompts = [{"prompt": letter} for letter in "abcde"]
    iterations = [[row["prompt"] for row in of_iteration(prompts, 2, i)] for i in (1, 2, 3)]
    assert iterations == [["a", "b"], ["c", "d"], ["e", "a"]]
    assert of_iteration(prompts, None, 3) == of_iteration(prompts, 9, 3) == prompts


# --- the folder ------------------------------------------------------------------------------------------------


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another process is at work in this folder"):
        align(tmp_path)


def test_larpo_align_and_its_run_take_a_config_or_settings(tmp_path, monkeypatch):
    import larpo

    asked = []
    monkeypatch.setattr("larpo.align.loop.run", lambda config, progress: asked.append((config.k, progress)))
    for run in (larpo.align, larpo.align.run):
        run(output_dir=str(tmp_path), model="m", prompts=["a"], reward="x:y", k=3, progress=False)
        run(config(tmp_path))
        with pytest.raises(ValueError, match="either a config or settings"):
            run(config(tmp_path), k=3)
    assert asked == [(3, False), (4, True)] * 2


def test_type_checkers_see_every_lazy_name():
    import ast
    from pathlib import Path

    import larpo

    tree = ast.parse(Path(larpo.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    declared = {node.target.id for node in block.body if isinstance(node, ast.AnnAssign)}
    assert (imported | declared) - {"CallableModule"} == set(larpo.__all__)


def test_the_demos_settings_are_sound(tmp_path):
    assert demo.config(str(tmp_path), k=4, training={"beta": 0.2}).training_settings()["beta"] == 0.2
