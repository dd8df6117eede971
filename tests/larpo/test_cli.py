"""`larpo train` and `larpo score` from files, and what they say of bad ones."""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from larpo import commands
from larpo.cli import main
from larpo.config import LarPOConfig
from larpo.runs.yaml_config import load_yaml
from tests.helpers import HANGS, prepared, tiny
from tests.helpers.jsonl import write_jsonl
from tests.helpers.train_runs import model_and_lists, settings_of, train, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_and_lists(tmp_path_factory.mktemp("cli"))


def config(path, folder, **settings):
    """A file of settings of `larpo train` that writes to path / "out"."""
    return settings_of(folder, path / "out", **settings)


def test_settings_come_from_the_file_and_flags_win(tmp_path, folder):
    nothing = dict(objective_options=None, lr_scheduler_kwargs={}, label_names=None)
    file = config(tmp_path, folder, objective="listmle", peft={"r": 2, "target_modules": ["q_proj"]}, **nothing)
    job, args = commands.train_settings(file, ["--beta", "0.5", "--max-steps=2", "--share_prefix"])
    assert (args.objective, args.beta, args.max_steps, args.share_prefix) == ("listmle", 0.5, 2, True)
    assert args.learning_rate == 1e-3
    assert job.peft == {"r": 2, "target_modules": ["q_proj"]}


def test_none_and_empty_lists_are_settings(tmp_path, folder):
    file = config(tmp_path, folder, max_length=None, report_to=[], eval_data=None, label_names=["a", "b"])
    _, args = commands.train_settings(file, [])
    assert (args.max_length, args.report_to, args.label_names) == (None, [], ["a", "b"])
    _, args = commands.train_settings(file, ["--max_length=9000", "--max-prompt-length", "None", "--report_to", "none"])
    assert (args.max_length, args.max_prompt_length, args.report_to) == (9000, None, [])
    _, args = commands.train_settings(
        config(tmp_path, folder), ["--max_length", "null", "--report_to", "[]", "--list_top=None"]
    )
    assert (args.max_length, args.report_to, args.list_top) == (None, [], None)
    for bad, said in (({"beta": None}, "beta does not take None"), ({"eval_data": ["a"]}, r"eval_data does not take \['a'\]")):
        with pytest.raises(ValueError, match=said):
            commands.train_settings(config(tmp_path, folder, **bad), [])


def test_train_writes_a_model_that_loads(tmp_path, folder, larpo):
    from transformers import AutoModelForCausalLM

    file = config(tmp_path, folder, eval_data=str(folder / "lists.jsonl"))
    status, out, err = larpo("train", "--config", file, "--max_steps", 2, "--max_tokens_per_batch", 999)
    assert "lists with at most 999 tokens" in err and "8 lists of 19 candidates" in err
    assert status == 0, err
    assert "saved in" in out
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(trained.lm_head.weight, tiny.causal_lm().lm_head.weight)
    assert "eval_ndcg" in json.loads((tmp_path / "out" / "eval_results.json").read_text())


def test_of_several_processes_the_first_says_where_the_model_is(tmp_path, folder, monkeypatch, larpo):
    monkeypatch.setattr(commands, "train", lambda job, args: None)
    said = []
    for rank in (0, 1):
        monkeypatch.setattr(LarPOConfig, "process_index", rank)
        said.append(larpo("train", "--config", config(tmp_path, folder))[1])
    assert "saved in" in said[0] and said[1] == ""


def test_data_of_other_columns_is_trained_on_and_scored(tmp_path, folder, larpo):
    rows = [
        {
            "question": row["prompt"],
            "answers": [{"text": t, "votes": s} for t, s in zip(row["completions"], row["scores"], strict=True)],
        }
        for row in tiny.lists(4, m=3, seed=3)
    ]
    data = tmp_path / "posts.jsonl"
    write_jsonl(data, [*rows, {"question": "no answer", "answers": None}])
    where = {"prompt": "question", "completions": "answers[].text", "scores": "answers[].votes"}
    file = config(tmp_path, folder, train_data=str(data), columns=where, max_steps=1)
    status, _, err = larpo("train", "--config", file)
    assert status == 2 and f"{data}, line 5: field 'answers' holds None; expected a list of at least one completion" in err
    status, _, err = larpo("train", "--config", file, "--bad_rows", "drop")
    assert status == 0 and "1 row was left out: 1 because 'answers' is not a list of at least one completion" in err
    flags = ("--columns", json.dumps(where), "--bad-rows", "drop", "--out", tmp_path / "scored.jsonl")
    status, _, err = larpo("score", "--model", folder / "model", "--data", data, *flags)
    assert status == 0, err
    scored = list(map(json.loads, (tmp_path / "scored.jsonl").read_text().splitlines()))
    assert [row["prompt"] for row in scored] == [row["question"] for row in rows] and len(scored[0]["logps"]) == 3


@pytest.fixture(scope="module")
def begun(folder, tmp_path_factory):
    """The folder of a run of one step, and the weights that it saved."""
    path = tmp_path_factory.mktemp("begun")
    return path, trained(folder, path / "out", max_steps=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": "listmle"}, "objective was 'contrastive' and is 'listmle'"),
        ({"beta": 0.5}, "beta was 0.1 and is 0.5"),
        ({"seed": 7, "learning_rate": "1e-2"}, "learning_rate was 0.001 and is 0.01; seed was 42 and is 7"),
        ({"model": "other"}, "model was .*/model' and is .*/other'"),
        ({"train_data": "other.jsonl"}, "train_data was '8 lists, sha256 [0-9a-f]*' and is '7 lists, sha256"),
        ({"peft": {"r": 2, "target_modules": ["q_proj"]}, "resume": False}, "peft was None and is {'r': 2"),
    ],
)
def test_a_folder_with_checkpoints_of_another_run_is_refused_and_what_differs_named(tmp_path, folder, begun, change, said):
    tiny.save(tmp_path / "other", seed=5)
    write_jsonl(tmp_path / "other.jsonl", tiny.lists(7, m=None, seed=4))
    change = {name: str(tmp_path / value) if str(value).startswith("other") else value for name, value in change.items()}
    with pytest.raises(ValueError, match=f"out' has checkpoints of another run: {said}"):
        trained(folder, begun[0] / "out", max_steps=1, **change)


def test_the_same_run_told_otherwise_goes_on(folder, begun):
    path, before = begun
    again = trained(folder, path / "out", max_steps=1, logging_steps=2, share_prefix=True)
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_a_setting_that_there_was_not_when_a_run_began_stood_at_its_default(tmp_path, folder):
    trained(folder, tmp_path / "out", max_steps=1)
    job = tmp_path / "out" / "larpo-job.json"
    older = json.loads(job.read_text())
    assert older.pop("margin") == 0.0 and older.pop("ties") is None
    job.write_text(json.dumps(older))
    trained(folder, tmp_path / "out", max_steps=1)
    with pytest.raises(ValueError, match=r"checkpoints of another run: margin was 0\.0 and is 0\.5\. Give"):
        trained(folder, tmp_path / "out", max_steps=1, margin=0.5)


def test_checkpoints_of_unknown_origin_are_refused(tmp_path, folder):
    trained(folder, tmp_path / "out", max_steps=1)
    (tmp_path / "out" / "larpo-job.json").unlink()
    with pytest.raises(ValueError, match=r"has checkpoints, but no larpo-job\.json"):
        trained(folder, tmp_path / "out", max_steps=1)


def test_a_finished_run_goes_further_with_more_steps(tmp_path, folder):
    kept = {"lr_scheduler_type": "constant"}
    trained(folder, tmp_path / "out", max_steps=2, **kept)
    longer, whole = (trained(folder, tmp_path / name, max_steps=4, **kept) for name in ("out", "whole"))
    assert all(torch.equal(longer[name], whole[name]) for name in whole)


def test_evaluation_is_on_its_own_split(tmp_path, folder):
    from datasets import Dataset, DatasetDict

    splits = {"train": tiny.lists(5, seed=1), "test": tiny.lists(3, seed=2), "held": tiny.lists(2, seed=3)}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(tmp_path / "data")
    sizes = []
    for flags in ([], ["--eval_split", "held", "--train_split=test", "--output_dir", str(tmp_path / "second")]):
        data = str(tmp_path / "data")
        file = config(tmp_path, folder, train_data=data, eval_data=data, max_steps=1)
        trainer = train(file, *flags)
        sizes.append((len(trainer.train_dataset), len(trainer.eval_dataset)))
    assert sizes == [(5, 3), (3, 2)]
    with pytest.raises(ValueError, match=r"has the splits .*, not 'validation'"):
        train(file, "--eval_split", "validation")


def on_one_thread(*arguments):
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.argv = ["larpo", *arguments]
    main()


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_weights(tmp_path, folder):
    """SIGKILL whenever the third checkpoint has begun to appear: possibly in the middle of writing it."""
    from safetensors.torch import load_file

    results = {}
    for name in ("whole", "killed"):
        path = tmp_path / name
        command = "train", "--max_steps", "6", "--config", str(config(path, folder))
        if name == "killed":
            process = prepared.start(on_one_thread, *command)
            deadline = time.monotonic() + HANGS
            while not (path / "out" / "checkpoint-3").exists() and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.001)
            process.kill()
            process.join()
            assert (path / "out" / "checkpoint-3").exists() and not (path / "out" / "model.safetensors").exists()
        assert prepared.run(on_one_thread, *command, timeout=HANGS) == 0
        results[name] = load_file(path / "out" / "model.safetensors")
    for name, weight in results["whole"].items():
        assert torch.equal(results["killed"][name], weight), name


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_score_writes_log_likelihoods_and_implicit_rewards(tmp_path, folder, larpo, suffix):
    import datasets

    from tests.helpers.trainers import eager_logps, moved

    tiny.save(tmp_path / "policy", model=moved(tiny.causal_lm()))
    out = tmp_path / f"scored{suffix}"
    models = ["--model", tmp_path / "policy", "--ref-model", folder / "model", "--beta", 0.5]
    sizes = ["--batch-size", 3, "--candidate-batch-size", 2]
    status, _, err = larpo("score", *models, "--data", folder / "lists.jsonl", "--out", out, *sizes)
    assert status == 0, err
    found = (datasets.Dataset.from_parquet if suffix == ".parquet" else datasets.Dataset.from_json)(str(out))
    policy, reference = moved(tiny.causal_lm()), tiny.causal_lm()
    with torch.no_grad():
        for row, original in zip(found, tiny.lists(8, m=None, seed=3), strict=True):
            assert row["completions"] == original["completions"]
            a, b = eager_logps(policy, original), eager_logps(reference, original)
            torch.testing.assert_close(torch.tensor(row["logps"]), a, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(torch.tensor(row["implicit_rewards"]), 0.5 * (a - b), rtol=1e-4, atol=1e-4)
            assert row["num_tokens"] == [len(tiny.tokenizer()(c).input_ids) + 1 for c in row["completions"]]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_lists_can_be_scored_without_rewards(tmp_path, folder, suffix):
    from datasets import Dataset

    data = tmp_path / f"lists{suffix}"
    lists = Dataset.from_list(tiny.lists(3)).remove_columns("scores")
    lists.to_parquet(data) if suffix == ".parquet" else lists.to_json(data)
    scored = commands.score(commands.ScoreJob(str(folder / "model"), str(data), tmp_path / "new" / "out.jsonl"))
    assert scored.column_names == ["prompt", "completions", "logps", "num_tokens", "token_hashes", "scored_with"]
    data.write_text(json.dumps({"prompt": "a", "completions": "b"}))
    if suffix == ".jsonl":
        with pytest.raises(ValueError, match="line 1: field 'completions' holds 'b'"):
            commands.score(commands.ScoreJob(str(folder / "model"), str(data), tmp_path / "out.jsonl"))


def test_the_folder_of_an_adapter_is_scored_as_it_was_trained(tmp_path, folder):
    import peft

    from tests.helpers.trainers import eager_logps

    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    base = tiny.causal_lm()
    base.name_or_path = str(folder / "model")
    adapted = peft.get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    job = commands.ScoreJob(str(tmp_path / "adapter"), str(folder / "lists.jsonl"), tmp_path / "out.parquet")
    scored = commands.score(job)
    for row in scored:
        assert row["logps"] == pytest.approx(eager_logps(adapted.merge_and_unload(), row).tolist(), rel=1e-4)


def test_an_adapter_is_trained_on_top_of_the_one_in_a_folder_and_read_back(tmp_path, folder):
    import peft

    from larpo.modeling.loading import load_causal_lm
    from tests.helpers.trainers import eager_logps

    base = tiny.causal_lm()
    base.name_or_path = str(folder / "model")
    sft = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    sft.save_pretrained(tmp_path / "sft")
    changes = dict(model=str(tmp_path / "sft"), peft={"r": 2, "target_modules": ["q_proj"]}, max_steps=2, learning_rate=0.1)
    trainer = train(config(tmp_path, folder, **changes))
    first = trainer.state.log_history[0]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4), "the reference is the policy at the start"
    row = tiny.lists(1)[0]
    whole = trainer.model.merge_and_unload().eval()
    read_back = load_causal_lm(trainer.args.output_dir).eval()
    assert eager_logps(read_back, row).tolist() == pytest.approx(eager_logps(whole, row).tolist(), rel=1e-4)
    assert eager_logps(read_back, row).tolist() != pytest.approx(eager_logps(sft.merge_and_unload(), row).tolist(), rel=1e-3)


def test_reference_log_likelihoods_are_refused_for_other_tokens_than_they_were_scored_on(tmp_path, folder, larpo):
    model, out = str(folder / "model"), tmp_path / "scored.parquet"
    limits = ["--max-length", 14, "--max-prompt-length", 6, "--truncation-mode", "keep_start", "--no-append-eos"]
    models = ["--model", model, "--ref-model", model]
    status, _, err = larpo("score", *models, "--data", folder / "lists.jsonl", "--out", out, *limits)
    assert status == 0, err
    same = dict(max_length=14, max_prompt_length=6, truncation_mode="keep_start", append_eos=False, learning_rate=0.0)
    file = config(tmp_path, folder, train_data=str(out), max_steps=1, **same)
    trainer = train(file)
    assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    file = config(tmp_path, folder, train_data=str(out), output_dir=str(tmp_path / "other"))
    status, _, err = larpo("train", "--config", file)
    assert status == 2 and "ref_logps is of" in err and "append_eos" in err


def test_log_likelihoods_that_were_scored_are_named_in_the_file_of_settings(tmp_path, folder, larpo):
    """Under the model that is trained: with a learning rate of 0 all rewards are. The other one makes another run."""
    scored, other = tmp_path / "scored.parquet", tmp_path / "other.parquet"
    tiny.save(tmp_path / "model", seed=5)
    for model, out in ((folder / "model", scored), (tmp_path / "model", other)):
        commands.score(commands.ScoreJob(str(model), str(folder / "lists.jsonl"), out))
    file = config(tmp_path, folder, ref_logps=str(scored), max_steps=1, learning_rate=0.0)
    trainer = train(file)
    assert trainer.ref_model is None and trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    moved = scored.rename(tmp_path / "moved.parquet")
    train(file, "--ref_logps", str(moved))
    status, _, err = larpo("train", "--config", file, "--ref_logps", other)
    assert status == 2 and "ref_logps was '" in err and f"and is '{tmp_path / 'model'} (xxh3" in err
    status, _, err = larpo("train", "--config", file)
    assert status == 2 and f"ref_logps: no such file or folder: {scored}" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nlearning_rat: 1.0", "line 2: unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ("beta: 0.1\nbeta: 0.2", "line 2: 'beta' is given twice, first on line 1"),
        ("beta: [1", "line 1: not YAML"),
        ("- beta", "line 1: holds list; expected"),
    ],
)
def test_a_bad_config_file_is_refused_with_its_line(tmp_path, text, message):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_yaml(file, ["beta", "learning_rate"])
    assert message in str(caught.value) and str(file) in str(caught.value)


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("a: 1e-5\nb: hello\nc: {d: [2E3, e]}\nf: true")
    assert load_yaml(file, "abcf") == {"a": 1e-5, "b": "hello", "c": {"d": [2000.0, "e"]}, "f": True}


@pytest.mark.parametrize("text", ["010", "5e-7", "2024-01-01", "1_000", "0x1f", "12:30"])
def test_what_looks_like_a_number_stays_as_written_where_a_setting_is_text(tmp_path, folder, text):
    file = config(tmp_path, folder)
    file.write_text(f"{file.read_text()}\nrun_name: {text}")
    assert commands.train_settings(file, [])[1].run_name == text


def test_a_commit_is_no_number(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("a: {revision: 4e52301}\nb: '1e5'\nc: .inf")
    assert load_yaml(file, "abc") == {"a": {"revision": "4e52301"}, "b": "1e5", "c": float("inf")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--betta", "1"], "unknown setting 'betta'; did you mean 'beta'?"),
        (["--objective", "dpo"], "objective must be one of"),
        (["--max_steps", "many"], "max_steps"),
        (["more"], "expected flags, got 'more'"),
        (["--peft", "r: 8"], "peft must be a dict or JSON text of one"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--peft", '{"rank": 8}'], "peft: "),
        (["--max_tokens_per_batch", "100.5"], "max_tokens_per_batch must be a whole number, got '100.5'"),
        (["--shuffle_buffer", "-5"], "shuffle_buffer must be at least 0, got -5"),
    ],
)
def test_a_bad_flag_ends_in_one_sentence(tmp_path, folder, larpo, flags, message):
    status, _, err = larpo("train", "--config", config(tmp_path, folder), *flags)
    assert status == 2
    assert message in err and "Traceback" not in err


def test_what_must_be_given_is_named(tmp_path, larpo):
    status, _, err = larpo("train", "--output_dir", tmp_path)
    assert status == 2 and "model and train_data must be given" in err
    status, _, err = larpo("train", "--model", "m", "--train_data", "x")
    assert status == 2 and "output_dir must be given" in err


def test_a_bad_line_of_data_is_named(tmp_path, folder, larpo):
    bad = tmp_path / "bad.jsonl"
    good = {"prompt": "a", "completions": ["b", "c"], "scores": [1, 2]}
    write_jsonl(bad, [good, good | {"completions": ["b"]}])
    status, _, err = larpo("train", "--config", config(tmp_path, folder), "--train_data", bad)
    assert status == 2
    assert "line 2" in err and "'scores'" in err
    status, _, err = larpo("score", "--model", folder / "model", "--data", bad, "--out", Path("x.csv"))
    assert status == 2 and "out must end in .parquet or .jsonl" in err


def test_settings_are_listed(monkeypatch, larpo):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = larpo("settings")
    assert status == 0
    assert "candidate_micro_batch_size" in out and "warmup_steps" not in out


@pytest.mark.parametrize(
    ("command", "setting", "said"),
    [("score", "candidate_batch_size", "Candidates at a time."), ("align", "subset", "all, [top, bottom], or paper")],
)
def test_the_help_of_a_command_lists_its_settings(monkeypatch, larpo, command, setting, said):
    monkeypatch.setattr("rich.console.Console._environ", {"COLUMNS": "200"})  # what it found when it was imported may be a copy
    status, out, _ = larpo(command, "--help")
    (line,) = (line for line in out.splitlines() if line.split()[1:2] == [setting])
    assert status == 0 and said in line


def test_settings_of_score_come_from_a_file_too(tmp_path, folder, larpo):
    file = tmp_path / "score.yaml"
    file.write_text(f"model: {folder / 'model'}\ndata: {folder / 'lists.jsonl'}\nout: {tmp_path / 'a.jsonl'}\nbeta: 0.5")
    status, out, err = larpo("score", "--config", file, "--out", tmp_path / "b.jsonl")
    assert status == 0 and f"8 lists in {tmp_path / 'b.jsonl'}" in out, err
    status, _, err = larpo("score", "--config", file, "--bata", "0.1")
    assert status == 2 and "unknown setting 'bata'" in err


def test_recipes_are_listed(larpo):
    status, out, _ = larpo("recipe")
    assert status == 0 and "twosome" in out
    status, _, err = larpo("recipe", "nothing")
    assert status == 2 and "recipe must be one of" in err


def test_a_reward_that_fails_and_a_model_that_is_not_there_end_in_one_sentence(tmp_path, folder, larpo):
    (tmp_path / "prompts.txt").write_text("\n".join(row["prompt"] for row in tiny.lists(8, seed=5)))
    run = ["align", "--prompts", tmp_path / "prompts.txt", "--output_dir", tmp_path / "run", "--model", folder / "model"]
    sizes = ["--eval_prompts", 2, "--eval_k", 1, "--k", 2, "--max_new_tokens", 2]
    status, _, err = larpo(*run, *sizes, "--training.use_cpu", "true", "--reward", "math:hypot")
    assert status == 2 and "reward 'hypot' raised TypeError" in err and "Traceback" not in err
    where = ["--data", folder / "lists.jsonl", "--out", tmp_path / "x.jsonl"]
    status, _, err = larpo("score", "--model", tmp_path / "none", *where)
    assert status == 2 and str(tmp_path / "none") in err and "Traceback" not in err


def test_a_bad_setting_of_align_ends_in_one_sentence(tmp_path, larpo):
    status, _, err = larpo("align", "--output_dir", tmp_path, "--iteration", 3)
    assert status == 2 and "unknown setting 'iteration'; did you mean 'iterations'?" in err


def test_the_config_in_the_docs_is_one(tmp_path, folder):
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    file = tmp_path / "docs.yaml"
    file.write_text(found)
    job, args = commands.train_settings(file, ["--use_cpu", "--output_dir", str(tmp_path)])
    assert (args.list_top, args.list_bottom, job.peft) == (1, 3, {"r": 16, "target_modules": "all-linear"})


def test_a_training_that_diverged_writes_no_model_and_is_not_repeated_blindly(tmp_path, folder, larpo):
    file = config(tmp_path, folder, learning_rate=1e30, save_strategy="no", optim="sgd")
    out = tmp_path / "out"
    status, _, said = larpo("train", "--config", file)
    assert status == 2 and "training stops at step 2: the loss is nan" in said and "lower learning_rate" in said
    assert not list(out.rglob("*.safetensors"))
    status, _, said = larpo("train", "--config", file)
    assert status == 2 and "has diverged before: training stops at step 2: the loss is nan" in said
    assert f"delete {out / 'diverged.json'}" in said
    other = ["--learning_rate", "1e-3", "--max_steps", "1"]  # there is no checkpoint of the run that diverged
    assert larpo("train", "--config", file, *other)[0] == 0
    assert (out / "model.safetensors").is_file() and not (out / "diverged.json").exists()


def test_a_training_that_diverged_can_go_on_from_its_checkpoint_where_bad_batches_are_left_out(tmp_path, folder, monkeypatch):
    from larpo.trainer import LarPOTrainer

    whole = LarPOTrainer.list_loss

    def infinite_at_the_end(self, logps, ref_logps, inputs):
        loss, scores = whole(self, logps, ref_logps, inputs)
        return loss + (torch.inf if self.state.global_step == 3 else 0), scores

    monkeypatch.setattr(LarPOTrainer, "list_loss", infinite_at_the_end)
    file = config(tmp_path, folder)
    with pytest.raises(FloatingPointError, match="stops at step 4: the loss is inf in the batch of rows"):
        train(file)
    with pytest.warns(UserWarning, match="step 4: a batch is left out"):
        trainer = train(file, "--on_nonfinite", "skip")
    assert trainer.state.global_step == 4 and trainer.state.log_history[-2]["skipped_batches"] == 1


def test_what_the_data_is_made_of_is_written_while_a_command_trains(capsys):
    import logging

    from larpo.cli import _shown

    logger = logging.getLogger("larpo.training.preprocessing")
    with _shown("larpo.training"):
        logger.info("train data: 2 lists")
    logger.info("and after")
    assert capsys.readouterr().err == "train data: 2 lists\n"
