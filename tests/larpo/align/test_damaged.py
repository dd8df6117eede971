"""A file of a run that was not written to its end is named, with what to delete; done so, the run ends as it would have."""

import shutil

import pytest

from larpo.align.run_folder import RunFolder
from larpo.runs.files import read_rows
from larpo.runs.intact import Damaged
from tests.helpers import align_runs, tiny


def align(folder, **changes):
    sizes = dict(iterations=1, prompts_per_iteration=3, eval_prompts=2, eval_k=2, max_new_tokens=4)
    return align_runs.align(folder, **sizes, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("larpo.align.plots.draw", lambda *args: {})
        result = align(folder)
    return folder, result.metrics


def figures(metrics):
    return [
        {stage: {name: value for name, value in counts.items() if name != "seconds"} for stage, counts in one.items() if counts}
        for one in ({name: counts for name, counts in one.items() if isinstance(counts, dict)} for one in metrics)
    ]


ONE = "iteration-01"
EMPTY = {f"{ONE}/lists.parquet", f"{ONE}/sample.json", f"{ONE}/model/config.json", "prompts.json", "config.yaml"}  # others: cut


@pytest.mark.parametrize(
    ("name", "still_to_do", "deleted"),
    [
        (f"{ONE}/sampled.parquet", ["score.json", "candidates.parquet"], ["sampled.parquet", "sample.json"]),
        (f"{ONE}/candidates.parquet", ["lists.json"], ["candidates.parquet", "score.json"]),
        (f"{ONE}/lists.parquet", ["train.json"], ["lists.parquet", "lists.json"]),
        (f"{ONE}/evaluation.parquet", [], ["evaluation.parquet", "evaluate.json"]),
        (f"{ONE}/sample.json", [], ["sample.json"]),
        (f"{ONE}/train.json", [], ["train.json"]),
        (f"{ONE}/model/model.safetensors", ["evaluate.json", "evaluation.parquet"], ["model", "train.json"]),
        (f"{ONE}/model/config.json", ["evaluate.json", "evaluation.parquet"], ["model", "train.json"]),
        (f"{ONE}/model/trainer_state.json", ["train.json"], ["model"]),
        ("start/evaluation.parquet", [], ["evaluation.parquet", "evaluate.json"]),
        ("prompts.json", [], ["prompts.json"]),
        ("config.yaml", [], ["config.yaml"]),
    ],
)
def test_what_to_delete_to_have_a_damaged_file_again(finished, tmp_path, name, still_to_do, deleted):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    damaged = folder / name
    stage_folder = folder / name.split("/")[0] if "/" in name else folder
    for other in still_to_do:
        (stage_folder / other).unlink()
    content = b"" if name in EMPTY else damaged.read_bytes()[:-20]
    damaged.write_bytes(content + (b'\n"' if content and damaged.suffix == ".yaml" else b""))
    with pytest.raises(Damaged) as caught:
        align(folder)
    said = str(caught.value)
    assert said.startswith(f"{damaged} can't be read: it is {'empty' if name in EMPTY else 'cut'}")
    for other in deleted:
        path = stage_folder / other
        assert str(path) in said
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    result = align(folder)
    assert figures(result.metrics) == figures(finished[1])
    assert read_rows(folder / ONE / "evaluation.parquet") == read_rows(finished[0] / ONE / "evaluation.parquet")


def test_a_policy_that_can_not_be_trained_again_is_said_to_be_so(tmp_path):
    folder = RunFolder(tmp_path)
    weights = folder.model(2) / "model.safetensors"
    assert "policy of iteration 1, which keep_models='last' has removed" in folder.how_to_redo(weights)
    folder.model(1).mkdir(parents=True)
    assert folder.how_to_redo(weights).startswith(f"Delete {folder.model(2)} and ")
    assert folder.how_to_redo(tmp_path.parent / "model.safetensors") == ""


def test_a_damaged_chunk_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    chunk = folder.iteration(1) / "sample-chunks" / "00000.parquet"
    assert folder.how_to_redo(chunk).startswith("Delete it")


def test_a_damaged_initial_model_is_named(tmp_path):
    tiny.save(tmp_path / "model", spread=2.0)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(Damaged, match=r"model\.safetensors can't be read: it is cut: \d+ of \d+ bytes$"):
        align_runs.align(tmp_path / "run", model=str(tmp_path / "model"))


def test_prompts_of_a_process_that_was_killed_before_it_wrote_its_settings_are_read_again(finished, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prompts.json").write_text('{"train": [{"prompt": "other"}], "held_out": [{"prompt": "another"}]}')
    assert figures(align(tmp_path / "run").metrics) == figures(finished[1])


def wanders(completions, **columns):
    """A reward that changes the working directory."""
    import os
    from pathlib import Path

    elsewhere = Path(wanders.to)
    elsewhere.mkdir(exist_ok=True)
    os.chdir(elsewhere)
    return align_runs.count_o(completions)


def test_a_reward_that_changes_directory_does_not_split_the_run(finished, tmp_path, monkeypatch):
    shutil.copytree(align_runs.model_folder(), tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(align_runs.PROMPTS))
    wanders.to = tmp_path / "elsewhere"
    monkeypatch.chdir(tmp_path)
    result = align("run", model="model", prompts="prompts.txt", reward=wanders)
    assert result.folder == tmp_path / "run" and result.summary.is_file()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert figures(result.metrics) == figures(finished[1])
