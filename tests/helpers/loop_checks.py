"""What test_ranks.py runs on two gloo ranks: the loop against one process, and what one process of many may do wrong."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations import is_fsdp_enabled

import larpo.align.loop
import larpo.align.plots
import larpo.modeling.loading
import larpo.trainer
from larpo.rewards import RewardError
from larpo.runs import ranks as processes
from larpo.runs.files import read_json, read_rows
from larpo.runs.ranks import OtherProcess, Ranks
from tests.helpers import align_runs
from tests.helpers.trainer_checks import OnFSDP, distributed_type

PROMPTS_OF_AN_UPDATE = 6
WITH_PICTURES = ("many", "alone")  # which take as long as an iteration
OF_THE_FIRST_POLICY = ("start/evaluation", "iteration-01/sampled", "iteration-01/candidates", "iteration-01/lists")


def align(folder, ranks, **changes):
    """Three chunks of prompts, two of held-out ones, negatives by their likelihood; an update of all lists, by SGD."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    if ranks > 1:  # as no trainer had been before
        distributed_type(DistributedType.MULTI_CPU)
    AcceleratorState._reset_state(reset_partial_state=False)
    settings = (
        dict(iterations=1, chunk_size=2, model=str(Path(folder).parent / "model"), negatives="hard", subset=[1, 2]) | changes
    )
    own = dict(per_device_train_batch_size=PROMPTS_OF_AN_UPDATE // ranks, optim="sgd", learning_rate=0.5, max_grad_norm=1e9)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        if folder.name not in WITH_PICTURES:
            patch.setattr(larpo.align.plots, "draw", lambda *arguments: {})
        return larpo.align.loop.run(align_runs.config(folder, training=own, **settings), progress=False)


def folder_of(name):
    return Path(os.environ["CHECKS_FOLDER"]) / name


def assert_like_one_process(found, alone):
    """Bit by bit up to the training; then within what the order of sums makes of the same update."""
    for name in OF_THE_FIRST_POLICY:
        assert (found / f"{name}.parquet").read_bytes() == (alone / f"{name}.parquet").read_bytes(), name
    start, expected, weights = (
        load_file(path / "model.safetensors")
        for path in (alone.parent / "model", alone / "iteration-01" / "model", found / "iteration-01" / "model")
    )
    learned = max((expected[name] - start[name]).abs().max().item() for name in expected)
    assert learned > 1e-3 and expected.keys() == weights.keys()
    for name, x in expected.items():
        torch.testing.assert_close(weights[name], x, rtol=0, atol=1e-3 * learned, msg=name)
    files = [{path.relative_to(one) for path in one.rglob("*") if path.is_file()} for one in (found, alone)]
    drawn = found.name in WITH_PICTURES
    assert files[0] == {path for path in files[1] if drawn or path.parts[0] != "plots"}
    logs = [read_json(one / "iteration-01" / "train.json") for one in (found, alone)]
    assert logs[0]["log"][0]["loss"] == pytest.approx(logs[1]["log"][0]["loss"], rel=1e-5)


def check_files_are_those_of_one_process(rank, ranks):
    result = align(folder_of("many"), ranks)
    assert_like_one_process(folder_of("many"), folder_of("alone"))
    assert [one["iteration"] for one in result.metrics] == [0, 1]  # in every process
    before = {path: path.stat().st_mtime_ns for path in folder_of("many").rglob("*.parquet")}
    align(folder_of("many"), ranks)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def check_fsdp2_with_weights_that_one_process_reads(rank, ranks):
    """As `accelerate launch` with docs/accelerate/fsdp2.yaml says it: what is sampled from must be whole in the others too."""
    load = larpo.modeling.loading.load_causal_lm

    def in_one(*args, **options):
        model = load(*args, **options)
        if is_fsdp_enabled() and rank > 0:
            for p in model.parameters():
                p.data.fill_(torch.nan)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(larpo.modeling.loading, "load_causal_lm", in_one)
        for name, value in {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        }.items():
            patch.setenv(name, value)
        patch.setattr(larpo.trainer, "LarPOTrainer", OnFSDP)
        patch.setattr(OnFSDP, "plugin_options", {"cpu_ram_efficient_loading": True})
        align(folder_of("sharded"), ranks)
    assert_like_one_process(folder_of("sharded"), folder_of("alone"))


def check_fewer_prompts_than_processes(rank, ranks):
    align(folder_of("few"), ranks, prompts_per_iteration=1, eval_prompts=1, negatives="low", subset="all")
    assert len(read_rows(folder_of("few") / "iteration-01" / "candidates.parquet")) == 1


def check_a_reward_that_raises_in_one_process_ends_all_and_loses_nothing(rank, ranks):
    calls = []

    def flaky(completions, **columns):
        calls.append(len(completions))
        if rank == 1 and len(calls) == 2:  # one chunk of the start, one of the first iteration
            raise ConnectionError("no route to the judge")
        return align_runs.count_o(completions)

    folder = folder_of("flaky")
    with pytest.raises(
        RewardError if rank else OtherProcess, match=r"reward 'flaky' raised ConnectionError: no route to the judge"
    ):
        align(folder, ranks, reward=flaky)
    align(folder, ranks, reward=flaky)
    in_all = Ranks.started().all(lambda: calls)
    if rank == 0:  # 4 prompts of the start, 6 of the iteration with the two that had to be scored again, 4 of its evaluation
        assert [n for one in in_all for n in one] == [8] * 8, in_all


def check_a_training_that_diverges_is_remembered_for_all(rank, ranks):
    settings = dict(iterations=1, model=str(folder_of("model")), training=dict(learning_rate=1e30))
    config = align_runs.config(folder_of("diverged"), **settings)
    with pytest.raises((FloatingPointError, OtherProcess), match="training stops at step 2: the loss is nan"):
        larpo.align.loop.run(config, progress=False)
    with pytest.raises((ValueError, OtherProcess), match="has diverged before: training stops at step 2"):
        larpo.align.loop.run(config, progress=False)


def check_processes_that_were_started_with_other_settings_are_refused(rank, ranks):
    with pytest.raises(ValueError, match="processes of one run must be started alike, but k is 4 in process 0 and 5 in 1"):
        align(folder_of("unlike"), ranks, k=4 + rank)
    with pytest.raises(ValueError, match="the code of larpo is 'a0' in process 0 and 'a1' in 1"):
        Ranks.started().refuse_different({"the code of larpo": f"a{rank}", "hub_token": rank})
    with pytest.raises(ValueError, match="sampler vllm runs in a loop of one process, and this one has 2: start `vllm serve`"):
        align(folder_of("unlike"), ranks, sampler="vllm")
    assert not folder_of("unlike").exists()


def check_a_folder_that_is_not_shared_is_refused(rank, ranks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "SEEN", 0.2)
        with pytest.raises(
            ValueError, match=r"output_dir='.*disk-of-\d' must be one folder for all .* not seen by process 1 \("
        ):
            Ranks.started().refuse_separate(folder_of(f"disk-of-{rank}"), "output_dir")
    Ranks.started().refuse_separate(folder_of("shared"), "output_dir")
    assert not list(folder_of("shared").iterdir())


async def hopeless_of_cats(prompts, completions, **columns):
    """A judge that is asked call by call, and finds no difference between continuations of one prompt in four."""
    return [0.0 if "cat" in p else score for p, score in zip(prompts, align_runs.count_o(completions), strict=True)]


def refilled(folder, ranks):
    settings = dict(reward="tests.helpers.loop_checks:hopeless_of_cats", refill=True, prompts_per_iteration=5, iterations=2)
    return align(folder, ranks, negatives="low", subset="all", **settings)


def check_refilled_lists_are_those_of_one_process_and_each_process_keeps_what_it_was_told(rank, ranks):
    refilled(folder_of("refilled"), ranks)
    ours, alone = folder_of("refilled"), folder_of("refilled-alone")
    for name in ("candidates", "refilled", "lists"):
        assert (ours / "iteration-01" / f"{name}.parquet").read_bytes() == (
            alone / "iteration-01" / f"{name}.parquet"
        ).read_bytes()
    assert read_json(ours / "iteration-01" / "refill.json")["prompts"] > 0
    (judge,) = (ours / "judgements").iterdir()
    assert sorted(path.name for path in judge.iterdir()) == ["00000.jsonl", "00001.jsonl"]
