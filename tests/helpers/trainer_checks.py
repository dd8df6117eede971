"""What test_distributed_trainer.py runs on two gloo ranks; `train` is also what one process runs, for the numbers to meet."""

import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from larpo.trainer import LarPOTrainer
from larpo.training.nonfinite import NonFiniteError
from tests.helpers import tiny
from tests.helpers.trainers import SGD, config, lora

LISTS = 4  # of a step, over all ranks
TIED = dict(tie_word_embeddings=True)


class OnFSDP(LarPOTrainer):
    """accelerate turns FSDP on for GPUs only (AcceleratorState.__init__ lists their device types); gloo can run it too."""

    def create_accelerator_and_postprocess(self):
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="FULL_STATE_DICT",
            **{"cpu_ram_efficient_loading": False, **self.plugin_options},
        )
        self.accelerator.state._shared_state["fsdp_plugin"] = plugin
        distributed_type(DistributedType.FSDP)
        self.is_fsdp_enabled = True

    plugin_options = {}  # noqa: RUF012


def distributed_type(value):
    from accelerate.state import AcceleratorState, PartialState

    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = value


class Infinite(LarPOTrainer):
    """Two rows have an infinite loss."""

    def list_loss(self, logps, ref_logps, inputs):
        loss, scores = super().list_loss(logps, ref_logps, inputs)
        return loss * (torch.inf if {3, 4} & set(inputs["row_number"].tolist()) else 1), scores


def make_trainer(folder, ranks, *, fsdp=False, kind=LarPOTrainer, ref_model=None, adapter=False, model=None, **options):
    """fsdp: True or a subclass of OnFSDP; evaluate, lists, streaming: of the data; others: settings."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    if ranks > 1:  # as no trainer had been before
        distributed_type(DistributedType.MULTI_CPU)
    AcceleratorState._reset_state(reset_partial_state=False)
    evaluate, streaming, lists = options.pop("evaluate", False), options.pop("streaming", False), options.pop("lists", 16)
    of_a_rank = LISTS // ranks
    sizes = dict(
        per_device_train_batch_size=of_a_rank // options.get("gradient_accumulation_steps", 1),
        per_device_eval_batch_size=of_a_rank,
    )
    args = config(folder, **(SGD | sizes | dict(max_steps=3, beta=0.3) | options))
    peft_config = lora(target_modules=["q_proj", "v_proj", "lm_head"]) if adapter else None
    data = Dataset.from_list(tiny.lists(lists, m=None, seed=3))
    kind = fsdp if isinstance(fsdp, type) else OnFSDP if fsdp else kind
    return kind(
        tiny.causal_lm() if model is None else model,
        ref_model,
        args,
        train_dataset=data.to_iterable_dataset() if streaming else data,
        eval_dataset=data.select(range(min(8, lists))) if evaluate else None,
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def whole(model):
    """Every parameter that is trained, whole, by name."""
    named = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: gathered(p).detach().clone() for name, p in named.items()}


def gathered(p):
    if hasattr(p, "ds_id"):  # of ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.data.clone()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def train(folder, ranks, evaluate=False, **options):
    """-> weights after a few steps of SGD, which are gradients; what was logged at each step; what evaluation gave."""
    t = make_trainer(folder, ranks, evaluate=evaluate, **options)
    t.train()
    logged = [entry for entry in t.state.log_history if "loss" in entry]
    return whole(t.model), logged, t.evaluate() if evaluate else {}


def other_reference():
    return tiny.causal_lm(seed=1)


def partly_frozen():
    model = tiny.causal_lm()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


SKIPPING = dict(on_nonfinite="skip", lists=8, gradient_accumulation_steps=2, train_sampling_strategy="sequential")
EXPECTED = {  # by one process, on the same global batch
    "full": dict(evaluate=True),
    "other reference": dict(ref_model=other_reference),
    "adapter": dict(adapter=True),
    "adapter, other reference": dict(adapter=True, ref_model=other_reference),
    "listmle": dict(objective="listmle", length_normalized=True),
    "tied": dict(model=lambda: tiny.causal_lm(**TIED)),
    "partly frozen": dict(model=partly_frozen),
    "reference follows": dict(sync_ref_model=True, ref_model_sync_steps=1),
    "five lists": dict(evaluate=True, lists=5, per_device_train_batch_size=5),
    "a batch is skipped": dict(kind=lambda: Infinite, **SKIPPING, per_device_train_batch_size=2),
    "batches by tokens": dict(
        lists=9, max_tokens_per_batch=200, gradient_accumulation_steps=20, per_device_train_batch_size=1, max_steps=2
    ),
    "a stream": dict(streaming=True, max_steps=6),
    "seven lists": dict(evaluate=True, lists=7, per_device_train_batch_size=4),
}
NOT_COMPARED = ("memory/rss_mib", "tokens_per_second", "padding")  # of a rank


def made(options):
    return {name: value() if callable(value) else value for name, value in options.items()}


def assert_like_one_process(name, ranks, given=None, **options):
    """given: models to train instead of those that one process trained"""
    folder = Path(os.environ["CHECKS_FOLDER"])
    weights, logged, evaluated = torch.load(folder / "expected.pt")[name]
    found, found_logged, found_evaluated = train(folder / "run", ranks, **(made(EXPECTED[name]) | (given or {}) | options))
    assert found.keys() == weights.keys(), found.keys() ^ weights.keys()
    start = whole(make_trainer(folder / "run", ranks, **made({**EXPECTED[name], "evaluate": False})).model)
    largest = max((weights[name] - start[name]).abs().max().item() for name in weights)
    assert largest > 1e-3, "nothing was learned"
    for parameter, x in weights.items():
        torch.testing.assert_close(
            found[parameter], x, rtol=0, atol=1e-3 * largest, msg=lambda m, parameter=parameter: f"{parameter}: {m}"
        )
    assert len(logged) == len(found_logged)
    pairs = [*zip(logged, found_logged, strict=True), (evaluated, found_evaluated)]
    for expected, got in pairs:
        for metric, x in expected.items():
            if metric not in NOT_COMPARED and "runtime" not in metric and "per_second" not in metric:
                assert abs(got[metric] - x) <= 1e-3 * max(1, abs(x)), (metric, got[metric], x)


def assert_precomputed_like_one_process(ranks, **options):
    folder = Path(os.environ["CHECKS_FOLDER"]) / "run"
    expected = make_trainer(folder, 1, precompute_ref_log_probs=True).train_dataset["ref_logps"][:]
    found = make_trainer(folder, ranks, precompute_ref_log_probs=True, **options)
    for ours, row in zip(found.train_dataset["ref_logps"][:], expected, strict=True):
        assert ours == pytest.approx(row, rel=1e-4), options
    return found


def in_window_of_five(batch):
    """As many batches of a rank as hold five lists on two ranks, the last ones short or empty."""
    return dict(per_device_train_batch_size=batch, gradient_accumulation_steps=-(-5 // (2 * batch)))


MICRO, ACCUMULATED = dict(candidate_micro_batch_size=2), dict(gradient_accumulation_steps=2)
DDP = {  # what is compared: names in EXPECTED, and other settings of the ranks
    "ddp": [("full", {}), ("other reference", {}), ("tied", {}), ("partly frozen", {})],
    "ddp in micro-batches of which ranks have different numbers": [("full", MICRO)],
    "ddp accumulating gradients": [("other reference", ACCUMULATED)],
    "ddp of a stream gives each list to one rank": [("a stream", {}), ("a stream", ACCUMULATED)],
    "ddp of batches by tokens of which one rank has more": [("batches by tokens", {})],
    "ddp with an adapter": [("adapter", {}), ("adapter", dict(candidate_micro_batch_size=3))],
    "ddp, listmle of means": [("listmle", {})],
    "ddp with a reference that follows": [("reference follows", {})],
    "ddp where lists do not fill the batches of a window": [
        *(("five lists", in_window_of_five(batch)) for batch in (1, 2, 4)),
        *(("five lists", in_window_of_five(batch) | MICRO) for batch in (2, 4)),
    ],
    "ddp where lists do not fill the last update of an epoch": [
        ("seven lists", dict(per_device_train_batch_size=2, share_prefix=shared)) for shared in (False, True)
    ],
    "ddp leaves out a batch of which one rank has a bad list": [  # the last of an update, which exchanges, then the first
        ("a batch is skipped", dict(per_device_train_batch_size=1) | micro) for micro in ({}, MICRO)
    ],
}
FSDP2 = {
    "fsdp2": [("full", {})],
    "fsdp2 with another reference": [("other reference", {})],
    "fsdp2 in micro-batches of which ranks have different numbers": [("full", MICRO)],
    "fsdp2 accumulating gradients": [("other reference", ACCUMULATED)],
    "fsdp2 with an adapter": [("adapter", {})],
    "fsdp2 with an adapter beside another reference": [("adapter, other reference", {})],
    "fsdp2 with tied embeddings": [("tied", {})],
    "fsdp2 with a reference that follows": [("reference follows", {})],
    "fsdp2 where lists do not fill the batches of a window": [
        *(("five lists", in_window_of_five(batch)) for batch in (1, 2)),
        ("five lists", in_window_of_five(2) | MICRO),
    ],
}


def alike(runs, **options):
    def check(rank, ranks):
        for name, own in runs:
            assert_like_one_process(name, ranks, **own, **options)

    return check


CHECKS = {name: alike(runs) for name, runs in DDP.items()} | {name: alike(runs, fsdp=True) for name, runs in FSDP2.items()}


def check_ddp_with_precomputed_reference_log_probs(rank, ranks):
    """With a reference of its own: where it is the policy, all scores are 0 at the start but for rounding, and so is their
    order."""
    assert_like_one_process("other reference", ranks, precompute_ref_log_probs=True)
    assert_precomputed_like_one_process(ranks)
    alone = make_trainer(
        Path(os.environ["CHECKS_FOLDER"]) / "run", ranks, precompute_ref_log_probs=True, lists=2, per_device_train_batch_size=2
    )
    assert len(alone.train_dataset["ref_logps"]) == 2, "one process has no batch to score"


def stops_on_every_rank(ranks, **options):
    t = make_trainer(Path(os.environ["CHECKS_FOLDER"]) / "run", ranks, **(SKIPPING | dict(on_nonfinite="raise") | options))
    with pytest.raises(NonFiniteError, match=r"stops at step 1: the loss is nan in the batch of rows 3"):
        t.train()


def check_ddp_stops_on_every_rank_if_one_has_a_bad_list(rank, ranks):
    stops_on_every_rank(ranks, kind=Infinite, per_device_train_batch_size=1)


def check_fsdp2_stops_on_every_rank_if_one_has_a_bad_list(rank, ranks):
    class Bad(Infinite, OnFSDP):
        pass

    stops_on_every_rank(ranks, fsdp=Bad, per_device_train_batch_size=1)


def check_fsdp2_refuses_to_skip(rank, ranks):
    with pytest.raises(ValueError, match="works in one process and under DDP, without fp16; here is FSDP"):
        make_trainer(Path(os.environ["CHECKS_FOLDER"]) / "run", ranks, fsdp=True, on_nonfinite="skip")


def check_fsdp2_writes_no_weights_that_are_not_finite(rank, ranks):
    t = make_trainer(Path(os.environ["CHECKS_FOLDER"]) / "run", ranks, fsdp=True, max_steps=1)
    t.train()
    with torch.no_grad():
        t.model.lm_head.weight.to_local().fill_(torch.nan if rank == 1 else 1.0)
    with pytest.raises(
        NonFiniteError, match=r"1 of the model's parameters are not finite .*lm_head.weight.*nothing is written"
    ):
        t.save_model(os.environ["CHECKS_FOLDER"] + "/not-written")


def check_ddp_predictions_are_those_of_one_process_in_the_order_of_the_data(rank, ranks):
    from larpo.scoring import score_lists

    for lists in (7, 5, 1):  # of the last batches of two some are filled up, and some hold only lists that were seen before
        data = Dataset.from_list(tiny.lists(lists, m=None, seed=3))
        expected = score_lists(tiny.causal_lm(), data, tiny.tokenizer(), progress=False)["logps"]
        found = make_trainer(Path(os.environ["CHECKS_FOLDER"]) / "run", ranks, reference_free=True).predict(data)
        assert len(found.label_ids) == lists
        for row, logps, got, relevance in zip(data, expected, found.predictions.logps, found.label_ids, strict=True):
            torch.testing.assert_close(got[: len(logps)].tolist(), logps, rtol=1e-4, atol=1e-4)
            assert relevance[: len(logps)].tolist() == row["scores"]
            assert (got[len(logps) :] != got[len(logps) :]).all() and len(got) == found.predictions.logps.shape[1]


def check_scoring_is_shared_and_writes_what_one_process_does(rank, ranks):
    from accelerate.utils import DistributedType

    from larpo import commands, scoring
    from larpo.runs.files import read_rows
    from larpo.runs.ranks import processes

    processes()
    distributed_type(DistributedType.MULTI_CPU)  # a trainer may have set another one
    folder = Path(os.environ["CHECKS_FOLDER"]) / "scored"
    if rank == 0:
        tiny.save(folder / "model")
        for lists in (11, 1):  # of which the last part is not full, and one of two processes has none
            Dataset.from_list(tiny.lists(lists, m=None, seed=3)).to_json(folder / f"{lists}.jsonl")
    torch.distributed.barrier()
    scored, score = [], scoring.candidate_logps

    def counting(model, rows, *args, **options):
        scored.append(len(rows))
        return score(model, rows, *args, **options)

    for lists in (11, 1):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(scoring, "LISTS_OF_A_PART", 2)
            patched.setattr(scoring, "candidate_logps", counting)
            where = (str(folder / "model"), str(folder / f"{lists}.jsonl"), folder / f"{lists}.parquet")
            commands.score(commands.ScoreJob(*where, batch_size=2))
        data = Dataset.from_list(tiny.lists(lists, m=None, seed=3))
        expected = score_alone(folder / "model", data)
        assert [row["logps"] for row in read_rows(folder / f"{lists}.parquet")] == expected
    assert scored == ([2, 2, 2, 1] if rank == 0 else [2, 2, 1])


def score_alone(model, data):
    from larpo.modeling.loading import load_causal_lm
    from larpo.scoring import score_lists

    return score_lists(load_causal_lm(str(model)), data, tiny.tokenizer(), batch_size=2, progress=False)["logps"][:]


def check_fsdp2_a_reference_that_moved_is_saved_whole_and_loaded(rank, ranks):
    folder = Path(os.environ["CHECKS_FOLDER"]) / "reference"
    options = dict(fsdp=True, sync_ref_model=True, ref_model_sync_steps=1)
    moved = make_trainer(folder, ranks, **options)
    moved.train()
    moved._sync.save(folder, write=rank == 0)
    torch.distributed.barrier()
    fresh = make_trainer(folder, ranks, **options)
    fresh._sync.load(folder)
    expected = {name: gathered(p) for name, p in moved.ref_model.named_parameters()}
    assert not torch.equal(expected["lm_head.weight"], tiny.causal_lm().lm_head.weight)
    for name, p in fresh.ref_model.named_parameters():
        assert torch.equal(gathered(p), expected[name]), name


def check_fsdp2_with_frozen_parameters(rank, ranks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` says that parameters will be sharded
        assert_like_one_process("partly frozen", ranks, fsdp=True)


def check_fsdp2_where_only_the_first_rank_has_loaded_weights(rank, ranks):
    """cpu_ram_efficient_loading: transformers leaves the others' parameters empty, accelerate fills them from rank 0."""

    class Efficient(OnFSDP):
        plugin_options = {"cpu_ram_efficient_loading": True}  # noqa: RUF012

    def loaded(seed):
        model = tiny.causal_lm(seed=seed)
        if rank > 0:
            for p in model.parameters():
                p.data.fill_(torch.nan)
        return model

    assert_like_one_process("other reference", ranks, fsdp=Efficient, given=dict(model=loaded(0), ref_model=loaded(1)))
    assert_like_one_process("full", ranks, fsdp=Efficient, given=dict(model=loaded(0)))


def check_fsdp2_saves_a_whole_model(rank, ranks):
    from transformers import AutoModelForCausalLM

    folder = Path(os.environ["CHECKS_FOLDER"])
    t = make_trainer(folder / "run", ranks, fsdp=True, max_steps=1)
    t.train()
    t.save_model(str(folder / "saved"))
    weights = whole(t.model)  # collective
    if rank == 0:
        loaded = dict(AutoModelForCausalLM.from_pretrained(folder / "saved").named_parameters())
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], x) for name, x in weights.items())


def check_fsdp2_in_bf16_keeps_log_likelihoods_in_float32(rank, ranks):
    """accelerate asks FSDP2 to round every module's output to the parameters' dtype, the model's included."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    bf16 = torch.bfloat16
    seen = []

    class Spy(OnFSDP):
        plugin_options = {  # noqa: RUF012
            "mixed_precision_policy": MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=bf16, output_dtype=bf16)
        }

        def list_loss(self, logps, ref_logps, inputs):
            seen.extend((logps.detach(), ref_logps))
            return super().list_loss(logps, ref_logps, inputs)

    t = make_trainer(Path(os.environ["CHECKS_FOLDER"]) / "run", ranks, fsdp=Spy, max_steps=1)
    t.train()
    for x in seen:
        assert x.dtype == torch.float32
        assert (x != x.to(bf16)).any(), x
    torch.testing.assert_close(seen[0], seen[1])  # policy and reference are the same model still
    assert {p.dtype for p in t.model.parameters()} == {torch.float32}


def check_fsdp2_with_precomputed_reference_log_probs(rank, ranks):
    """Scored by a sharded copy: forwards are collective, and ranks have batches and candidates of different numbers."""
    for name in ("other reference", "adapter, other reference"):
        assert_like_one_process(name, ranks, fsdp=True, precompute_ref_log_probs=True)
    for options in (dict(), dict(adapter=True), dict(candidate_micro_batch_size=2, precompute_ref_batch_size=3)):
        assert_precomputed_like_one_process(ranks, fsdp=True, **options).train()
