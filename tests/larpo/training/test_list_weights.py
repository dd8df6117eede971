"""Every list of an update weighs the same, whatever batches it comes in; on several ranks: test_distributed_trainer.py."""

import copy

import pytest
import torch
from datasets import Dataset

from larpo.trainer import LarPOTrainer
from larpo.training.list_weights import without_repeats
from tests.helpers import tiny
from tests.helpers.trainers import SGD, eager_loss, gradients, losses, moved, trainer

FIVE = dict(**SGD, max_steps=1, train_sampling_strategy="sequential")


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list(tiny.lists(5, m=None, seed=3))


@pytest.fixture(scope="module")
def policy():
    return moved(tiny.causal_lm())


def trained(folder, data, policy, kind=LarPOTrainer, **options):
    t = trainer(folder, data, copy.deepcopy(policy), kind, ref_model=tiny.causal_lm(), **(FIVE | options))
    t.train()
    updates = {name: p.detach() - q for (name, p), q in zip(policy.named_parameters(), t.model.parameters(), strict=True)}
    return updates, losses(t)


@pytest.mark.parametrize(("batch", "accumulate", "micro"), [(2, 3, None), (1, 5, None), (5, 1, None), (3, 2, 2), (2, 3, 2)])
def test_an_update_is_the_gradient_of_the_mean_over_the_lists_of_its_batches(tmp_path, data, policy, batch, accumulate, micro):
    mean = eager_loss(policy, tiny.causal_lm(), data)
    sizes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, candidate_micro_batch_size=micro)
    found, (loss,) = trained(tmp_path, data, policy, **sizes)
    assert loss == pytest.approx(mean.item(), rel=1e-4)
    for name, g in gradients(policy, mean).items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


class MeanOfMine(LarPOTrainer):
    """Overrides that return the mean over their batch, as they are told to."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logps = torch.cat([model(rows=rows) for rows in inputs["rows"]])
        return torch.stack([part.mean() for part in logps.split(inputs["list_sizes"].tolist())]).mean() / 50


class MeanOfListLoss(LarPOTrainer):
    def list_loss(self, logps, ref_logps, inputs):
        return torch.stack([part.mean() for part in logps.split(inputs["list_sizes"].tolist())]).mean() / 50, logps


@pytest.mark.parametrize("kind", [MeanOfMine, MeanOfListLoss])
def test_a_mean_of_ones_own_over_a_batch_is_weighed_by_its_lists_too(tmp_path, data, policy, kind):
    whole, _ = trained(tmp_path, data, policy, kind, per_device_train_batch_size=5)
    found, _ = trained(tmp_path, data, policy, kind, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert max(g.abs().max() for g in whole.values()) > 1e-2
    for name, g in whole.items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=1e-6)


def test_the_logged_loss_is_the_mean_over_lists_not_over_updates(tmp_path, data, policy):
    options = dict(per_device_train_batch_size=2, learning_rate=0.0, max_steps=3, logging_steps=3)
    _, (loss,) = trained(tmp_path, data, policy, **options)
    assert loss == pytest.approx(eager_loss(policy, tiny.causal_lm(), data).item(), rel=1e-4)


def test_the_loss_of_evaluation_is_the_mean_over_lists(tmp_path, data, policy):
    t = trainer(tmp_path, data, copy.deepcopy(policy), ref_model=tiny.causal_lm(), eval_dataset=data)
    assert t.evaluate()["eval_loss"] == pytest.approx(eager_loss(policy, tiny.causal_lm(), data).item(), rel=1e-4)


def test_more_batches_than_are_kept_are_all_in_the_means(monkeypatch):
    from larpo.training import list_log

    monkeypatch.setattr(list_log, "BATCHES", 2)
    log = list_log.ListLog()
    scores, relevance = torch.tensor([0.5, 0.0]), torch.tensor([1.0, 0.0])
    for i in range(5):
        log.add(torch.tensor(float(i)), scores * i, relevance, torch.tensor([2]), scores)
    means = log.pop()
    assert means["loss"] == 2 and means["rewards/margins"] == 1
    assert log.pop() == {}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_list_of_an_epoch_is_counted_on_one_rank_also_after_a_checkpoint_inside_it(ranks, size, drop_last):
    from types import SimpleNamespace

    from accelerate.data_loader import prepare_data_loader, skip_first_batches
    from accelerate.state import GradientState
    from torch.utils.data import DataLoader

    def collate(rows):
        return {"list_sizes": torch.ones(len(rows), dtype=torch.int64), "row_number": torch.tensor(rows)}

    def counted(lists, skipped):
        seen = []
        for rank in range(ranks):
            loader = DataLoader(range(lists), batch_size=size, collate_fn=collate, drop_last=drop_last)
            loader = prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)
            for batch in skip_first_batches(loader, skipped) if skipped else loader:
                kept = without_repeats(batch, SimpleNamespace(gradient_state=GradientState()))
                assert len(kept["list_sizes"]) == len(kept["row_number"])
                seen += kept["row_number"].tolist()
        return sorted(seen)

    for lists in range(1, 3 * size * ranks + 2):
        whole = lists // (size * ranks) * size * ranks if drop_last else lists
        assert counted(lists, 0) == list(range(whole)), lists
        assert counted(lists, 1) == list(range(size * ranks, whole)), lists
