"""A run goes on from a checkpoint from which it ends with the weights of one that was not stopped, or not at all."""

import json
import logging
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from larpo.runs.checkpoints import last_whole_checkpoint, what_is_missing
from larpo.runs.lock import locked
from tests.helpers import tiny
from tests.helpers.train_runs import model_and_lists, train, trained


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_and_lists(tmp_path_factory.mktemp("train"), tiny.lists(6, seed=3))


@pytest.fixture(scope="module")
def whole(place):
    """A run with all its checkpoints, of which tests damage copies."""
    weights = trained(place, place / "whole")
    return place / "whole", weights


@pytest.fixture
def out(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")  # two steps are left to do
    for path in ("model.safetensors", "larpo-job.json"):
        assert (tmp_path / "out" / path).is_file()
    return tmp_path / "out"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def delete(path):
    path.unlink()


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("optimizer.pt", delete),
        ("scheduler.pt", delete),
        ("rng_state.pth", delete),
        ("model.safetensors", delete),
        ("trainer_state.json", delete),
        ("optimizer.pt", cut),
        ("scheduler.pt", cut),
        ("rng_state.pth", cut),
        ("model.safetensors", cut),
        ("trainer_state.json", cut),
        ("config.json", cut),
    ],
)
def test_what_a_checkpoint_lacks_sends_a_run_to_the_one_before(place, whole, out, caplog, name, harm):
    harm(out / "checkpoint-3" / name)
    with caplog.at_level(logging.WARNING):
        weights = trained(place, out)
    assert name.split(".")[0] in "".join(m for m in caplog.messages if m.startswith(f"{out / 'checkpoint-3'} is passed over"))
    for key, weight in whole[1].items():
        assert torch.equal(weights[key], weight), key


def test_a_run_is_refused_where_checkpoints_are_there_and_none_is_whole(place, out):
    before = (out / "model.safetensors").read_bytes()
    for checkpoint in out.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3: it holds no state of the optimizer \(optimizer\.pt\); checkpoint-2"):
        trained(place, out)
    assert (out / "model.safetensors").read_bytes() == before


def test_a_run_that_was_stopped_in_its_first_checkpoint_starts_from_the_beginning(place, whole, out):
    for number in (2, 3):
        shutil.rmtree(out / f"checkpoint-{number}")
    (out / "checkpoint-1" / "trainer_state.json").unlink()
    weights = trained(place, out)
    assert all(torch.equal(weights[key], weight) for key, weight in whole[1].items())


def test_checkpoints_without_the_optimizer_are_not_gone_on_from(place, tmp_path):
    trained(place, tmp_path / "out", max_steps=2, save_only_model=True)
    with pytest.raises(ValueError, match=r"holds no state of the optimizer .*as save_only_model asks"):
        trained(place, tmp_path / "out", max_steps=4, save_only_model=True)


def test_a_checkpoint_given_by_name_is_refused_for_what_it_lacks(place, out):
    from larpo.config import LarPOConfig
    from larpo.data.loading import load_lists
    from larpo.trainer import LarPOTrainer

    (out / "checkpoint-3" / "scheduler.pt").unlink()
    args = LarPOConfig(output_dir=str(out), use_cpu=True, max_steps=4, report_to="none")
    trainer = LarPOTrainer(str(place / "model"), args=args, train_dataset=load_lists(place / "lists.jsonl"))
    with pytest.raises(ValueError, match=r"checkpoint-3'.* can't be gone on from: it holds no state of the scheduler"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-3"))


def test_a_damaged_record_of_what_the_checkpoints_are_of_is_named(place, out):
    (out / "larpo-job.json").write_text("")
    with pytest.raises(ValueError, match=r"larpo-job\.json can't be read: it is empty\. .*give another output_dir"):
        trained(place, out)


def test_a_relative_output_dir_stays_where_it_was(place, tmp_path, monkeypatch):
    from transformers import TrainerCallback

    from larpo.trainer import LarPOTrainer

    class Wanders(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            os.chdir(tmp_path / "elsewhere")

    begin = LarPOTrainer.train
    monkeypatch.setattr(LarPOTrainer, "train", lambda self, **keywords: (self.add_callback(Wanders), begin(self, **keywords)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    flags = f"--model={place / 'model'} --train_data={place / 'lists.jsonl'} --output_dir=out --use_cpu --max_steps=1"
    train(None, *flags.split(), "--report_to=none")
    assert not list((tmp_path / "elsewhere").iterdir())
    assert {"checkpoint-1", "model.safetensors", "larpo-job.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def settings(**changes):
    return SimpleNamespace(**{"world_size": 1, "fp16": False, "save_only_model": False} | changes)


def sharded(folder, *names):
    """A checkpoint of several processes: files that exist and can be read, and a trainer_state.json."""
    for name in (*names, "trainer_state.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}") if path.suffix == ".json" else torch.save({}, path)
    return folder


DEEPSPEED = (
    "global_step2/mp_rank_00_model_states.pt",
    "global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "rng_state_0.pth",
    "rng_state_1.pth",
)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (DEEPSPEED, None),
        ((*DEEPSPEED[:1], *DEEPSPEED[2:]), "number 0 of its zero_pp_rank_"),
        (DEEPSPEED[1:], "no weights of the model"),
        (DEEPSPEED[:3], "no random state"),
        ((*DEEPSPEED[:3], "rng_state_1.pth"), "number 0 of its rng_state_"),
        (("pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", "rng_state_0.pth"), None),
        (("pytorch_model_fsdp.bin", "scheduler.pt", "rng_state_0.pth"), "no state of the optimizer"),
        (("pytorch_model_fsdp_0/__0_0.distcp", "optimizer.bin", "scheduler.pt"), "pytorch_model_fsdp_0/.metadata is missing"),
        (("adapter_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"), None),
    ],
)
def test_what_checkpoints_of_several_processes_must_hold(tmp_path, names, said):
    wrong = what_is_missing(sharded(tmp_path, *names), settings(world_size=2))
    assert wrong == said if said is None else said in wrong


def test_a_gradient_scaler_and_every_shard_of_the_weights_must_be_there(tmp_path):
    plain = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin")
    sharded(tmp_path, *plain)
    assert what_is_missing(tmp_path, settings()) is None
    assert "gradient scaler" in what_is_missing(tmp_path, settings(fp16=True))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    assert what_is_missing(tmp_path, settings()) == "model-00001.safetensors is missing"


def test_distributed_checkpoints_count_by_their_contents(tmp_path):
    import torch.distributed.checkpoint as dcp

    checkpoint = sharded(tmp_path / "checkpoint-1", "scheduler.pt", "rng_state_0.pth")
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        dcp.save({"a": torch.zeros(3)}, storage_writer=dcp.FileSystemWriter(checkpoint / name), no_dist=True)
    assert last_whole_checkpoint(tmp_path, settings()) == str(checkpoint)
    shutil.rmtree(checkpoint / "optimizer_0")
    assert last_whole_checkpoint(tmp_path, settings()) is None


# --- one run at a time --------------------------------------------------------------------------------------------


def test_a_second_run_in_one_folder_is_refused(place, tmp_path):
    hold = "import pathlib; from larpo.runs.lock import locked\nwith locked(pathlib.Path('out')): print(1, flush=True); input()"
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    other = subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, env=env, stdin=-1, stdout=-1)
    try:
        assert other.stdout.readline()
        with pytest.raises(ValueError, match=r"out': another process is at work in this folder"):
            trained(place, tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    finally:
        other.communicate(b"\n")
    trained(place, tmp_path / "out", max_steps=1)


def test_a_file_system_without_locks_is_said_and_worked_on(tmp_path, monkeypatch, caplog):
    import filelock

    def acquire(self):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with locked(tmp_path):
        pass
    assert "file system without locks" in caplog.text
