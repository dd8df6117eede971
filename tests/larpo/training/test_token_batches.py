"""Batches by tokens: whole lists, each once, below the budget, and every list of an update weighs the same."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from larpo.data.collator import ListCollator
from larpo.training.list_weights import without_repeats
from larpo.training.token_batches import Shapes, TokenBatchSampler, shapes_of
from tests.helpers import tiny
from tests.helpers.trainers import SGD, eager_loss, gradients, moved, trainer


def shapes(*lists):
    return Shapes(*np.array([(rows, width, tokens) for rows, width, tokens in lists]).T)


def drawn(n, seed=0):
    draw = np.random.default_rng(seed)
    rows, widths = draw.integers(1, 6, n), draw.integers(1, 9, n) * 8
    return Shapes(rows, widths, rows * widths - draw.integers(0, 8, n))


def test_batches_are_of_neighbours_in_width_and_padding_is_counted():
    """Widths 8, 32, 8, 32 and two rows each: 64 tokens are two lists of width 32 in no batch, and four rows of 8 in one."""
    four = shapes((2, 8, 14), (2, 32, 60), (2, 8, 16), (2, 32, 64))
    batches = list(TokenBatchSampler(four, 64))
    assert sorted(map(sorted, batches)) == [[0, 2], [1], [3]]
    assert four.padding(batches) == pytest.approx(1 - 154 / (4 * 8 + 64 + 64))
    assert four.padding([[0, 1], [2, 3]]) == pytest.approx(1 - 154 / 256)
    in_order = TokenBatchSampler(four, 128, in_order=True)
    assert list(in_order) == [[0, 1], [2, 3]] and list(TokenBatchSampler(four, 127, in_order=True)) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_epoch_has_each_list_once_below_the_budget_in_as_many_batches(ranks):
    all_lists, epoch = drawn(200), [0]
    sampler = TokenBatchSampler(all_lists, 400, epoch=lambda: epoch[0], ranks=ranks)
    seen = []
    for epoch[0] in (0, 1, 0):
        seen.append(list(sampler))
        assert sorted(i for batch in seen[-1] for i in batch) == list(range(200))
        assert len(seen[-1]) == len(sampler) and all(all_lists.padded(batch) <= 400 for batch in seen[-1])
    assert seen[0] == seen[2] != seen[1]
    assert {*map(frozenset, seen[0])} != {*map(frozenset, seen[1])}  # lists of one shape have changed places
    assert list(TokenBatchSampler(all_lists, 400, seed=1, ranks=ranks)) != seen[0]
    assert all_lists.padding(seen[0]) < 0.5 * all_lists.padding(np.split(np.arange(200), 40))
    widest = [int(all_lists.widths[batch].max()) for batch in seen[0]]
    together = [widest[i : i + ranks] for i in range(0, len(widest) - ranks, ranks)]
    assert max(max(group) - min(group) for group in together) <= 16  # ranks wait for the slowest


def test_a_list_above_the_budget_is_a_batch_of_its_own_and_said(caplog):
    sampler = TokenBatchSampler(shapes((4, 32, 120), (1, 8, 8), (1, 8, 7)), 64)
    assert sorted(map(sorted, sampler)) == [[0], [1, 2]]
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="1 of 3 lists are larger alone, up to 128 tokens"):
        sampler.log_padding(plain=3)
    assert "2 batches of 1 to 2 lists with at most 64 tokens: 6.2 % of them are padding, and 29.7 % in" in caplog.text


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_shapes_are_those_of_the_rows_that_the_collator_makes(layout):
    rows = [
        {"prompt_ids": [1] * p, "completion_ids": [[2] * n for n in lengths], "scores": [0.0] * len(lengths)}
        for p, lengths in ((3, [4, 2]), (9, [1]), (30, [70, 3, 50]), (1, [1, 2, 3, 0]))
    ]
    collator = ListCollator(layout=layout, max_completion_tokens=100)
    found = shapes_of(Dataset.from_list(rows), collator)
    for lists in ([0], [1], [2], [0, 1, 2, 3]):
        batch = collator([rows[i] for i in lists])
        assert found.padded(lists) == batch["rows"][0]["input_ids"].numel()
        assert found.tokens[lists].sum() == batch["num_input_tokens"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_count_each_list_once_also_after_a_checkpoint_inside_an_epoch(ranks):
    from accelerate.data_loader import prepare_data_loader, skip_first_batches
    from accelerate.state import GradientState
    from torch.utils.data import DataLoader

    def collate(places):
        return {"list_sizes": torch.ones(len(places), dtype=torch.int64), "row_number": torch.tensor(places)}

    def counted(count, skipped):
        seen = []
        for rank in range(ranks):
            sampler = TokenBatchSampler(drawn(count), 150, ranks=ranks)
            loader = DataLoader(range(count), batch_sampler=sampler, collate_fn=collate)
            loader = prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)
            for batch in skip_first_batches(loader, skipped) if skipped else loader:
                seen += without_repeats(batch, SimpleNamespace(gradient_state=GradientState()))["row_number"].tolist()
        return sorted(seen)

    for count in range(1, 16):
        assert counted(count, 0) == list(range(count))
        first = [i for batch in list(TokenBatchSampler(drawn(count), 150, ranks=ranks))[:ranks] for i in batch]
        assert counted(count, 1) == sorted(set(range(count)) - set(first))


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list(tiny.lists(9, m=None, seed=3))


TOKENS = dict(max_tokens_per_batch=96, **SGD)


@pytest.mark.parametrize("micro", [None, 2])
def test_an_update_of_batches_of_different_sizes_is_the_mean_over_their_lists(tmp_path, data, micro):
    policy = moved(tiny.causal_lm())
    whole = dict(gradient_accumulation_steps=20, candidate_micro_batch_size=micro)
    t = trainer(tmp_path, data, policy, ref_model=tiny.causal_lm(), **whole, **TOKENS)
    sizes = [len(batch) for batch in t.get_train_dataloader().batch_sampler]
    assert len(set(sizes)) > 1 and sum(sizes) == 9 and 1 < len(sizes) <= 20
    mean = eager_loss(policy, tiny.causal_lm(), data)
    expected = {
        name: p.detach() - g for (name, p), g in zip(policy.named_parameters(), gradients(policy, mean).values(), strict=True)
    }
    t.train()
    (logged,) = [entry for entry in t.state.log_history if "loss" in entry]
    assert logged["loss"] == pytest.approx(mean.item(), rel=1e-4) and 0 < logged["padding"] < 0.6
    for name, p in t.model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-6)


def test_a_run_goes_on_in_the_second_epoch_with_the_batches_that_would_have_come(tmp_path, data):
    options = TOKENS | dict(save_strategy="steps", save_steps=1, max_steps=-1, num_train_epochs=2, learning_rate=0.1)
    whole = trainer(tmp_path, data, **options)
    whole.train()
    steps = whole.state.global_step
    resumed = trainer(tmp_path, data, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps - 2}"))
    assert steps == resumed.state.global_step == 2 * len(whole.get_train_dataloader())
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
