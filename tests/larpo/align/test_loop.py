"""The loop: what each iteration does to candidates and lists, and what a run folder holds."""

import math

import pytest
import torch

from larpo.align import demo, stages
from larpo.align.run_folder import RunFolder
from larpo.align.run_state import Run
from larpo.runs.files import read_json, write_rows
from larpo.runs.lock import locked
from tests.helpers import align_runs
from tests.helpers.align_runs import align, config, counts_of, rows_of, weights

# --- a run -----------------------------------------------------------------------------------------------------


THREE = dict(
    iterations=3,
    memory="all",
    k=6,
    prompts_per_iteration=12,
    subset=[2, 2],
    temperatures=[1.2, 1.0, 0.9],
    eval_temperatures=[0.7, 1.0],
    solved_above=1.5,
    training=dict(objective="listmle", learning_rate=5e-3, beta=0.5),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three iterations with memory and a large step, on more than one temperature."""
    folder = tmp_path_factory.mktemp("run")
    return folder, align(folder, **THREE)


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
    assert align(folder, **THREE).metrics == result.metrics
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("iteration-0*/*")}
    with pytest.raises(ValueError, match=r"holds another run: seed was 0 and is 1; k was 6 and is 5$"):
        align(folder, **{**THREE, "k": 5}, seed=1)


def test_equal_seeds_give_equal_runs_and_other_seeds_others(tmp_path):
    runs = [align(tmp_path / str(i), iterations=1, seed=seed) for i, seed in enumerate((0, 0, 1))]
    found = [rows_of(run.folder, 1, "candidates") for run in runs]
    assert found[0] == found[1] != found[2]
    a, b, c = (weights(run.folder / "iteration-01" / "model")["model.norm.weight"] for run in runs)
    assert torch.equal(a, b) and not torch.equal(a, c)


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
            {
                "prompt": prompt,
                "prompt_ids": [1],
                "scores": found,
                "source": [f"iteration {iteration}"] * len(found),
                "completions": [f"c{score}" for score in found],
                "completion_ids": [[int(score or 0)] for score in found],
            }
            for prompt, found in prompts.items()
        ]
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


# --- the folder ------------------------------------------------------------------------------------------------


def test_a_run_is_made_longer_by_raising_iterations_also_where_only_the_last_policy_stays(tmp_path):
    short = align(tmp_path, iterations=1, keep_models="last")
    longer = align(tmp_path, iterations=2, keep_models="last")
    assert longer.metrics[:2] == short.metrics and len(longer.metrics) == 3
    assert not (tmp_path / "iteration-01" / "model").exists()
    assert (tmp_path / "iteration-02" / "model" / "model.safetensors").exists()
    assert align(tmp_path, iterations=2, keep_models="last").metrics == longer.metrics  # nothing is missed


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


def test_the_demos_settings_are_sound(tmp_path):
    assert demo.config(str(tmp_path), k=4, training={"beta": 0.2}).training_settings()["beta"] == 0.2
