"""The loss of a list and the terms that settings add to it, against their formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

import larpo_kernels as lk
from larpo.data.collator import ListCollator
from larpo.trainer import LarPOTrainer
from larpo.training.losses import ListLoss, mean_over_lists
from larpo.training.preprocessing import training_lists
from tests.helpers import tiny
from tests.helpers.trainers import config, eager_logps, step, trainer

BETA = 0.3
SIZES = [3, 1, 4]
RELEVANCE = torch.tensor([0.5, 2.0, 1.0, 7.0, 1.0, 0.0, 1.0, 0.25], dtype=torch.float64)  # the last list has two best


@pytest.fixture
def batch():
    """Log-likelihoods, those of the reference, and what else the loss reads of a batch."""
    generator = torch.Generator().manual_seed(4)
    logps, ref_logps = (-20 * torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(2))
    num_tokens = torch.tensor([5, 3, 8, 4, 2, 6, 7, 1])
    inputs = {"relevance": RELEVANCE, "list_sizes": torch.tensor(SIZES), "num_tokens": num_tokens}
    return logps.requires_grad_(), ref_logps, inputs


def check(batch, expected, objective, **settings):
    """That loss and gradient are those of `expected(scores, rewards, nll)`, a list at a time."""
    logps, ref_logps, inputs = batch
    losses, scores = ListLoss(objective, beta=BETA, **settings)(logps, ref_logps, inputs)
    g = BETA * (logps - ref_logps)
    nll = -logps / inputs["num_tokens"]
    truth = torch.stack([expected(*one) for one in zip(*(x.split(SIZES) for x in (g, RELEVANCE, nll)), strict=True)])
    torch.testing.assert_close(losses, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores, g)
    upstream = torch.tensor([0.7, -0.3, 1.1], dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((x * upstream).sum(), logps, retain_graph=True)[0] for x in (losses, truth))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def pairs(r):
    return [(i, j) for i in range(len(r)) for j in range(len(r)) if r[i] > r[j]]


def extremes(r):
    """Every pair of one of the best and another one of the worst."""
    return [(i, j) for i in range(len(r)) for j in range(len(r)) if i != j and r[i] == r.max() and r[j] == r.min()]


def mean(losses):
    return sum(losses) / max(len(losses), 1) + torch.zeros((), dtype=torch.float64)


# --- margin ----------------------------------------------------------------------------------------------------


def test_a_margin_is_taken_off_the_difference_of_scores_in_every_pair(batch):
    def llama(g, r, nll):
        return sum((-F.logsigmoid(g[i] - g[j] - 0.4 * (r[i] - r[j])) for i, j in pairs(r)), 0 * g.sum())

    check(batch, llama, lk.LambdaRank(), margin=0.4)


def test_a_margin_of_best_against_worst(batch):
    def odpo(g, r, nll):
        return mean([-F.logsigmoid(g[i] - g[j] - 0.4 * (r[i] - r[j])) for i, j in extremes(r)]) + 0 * g.sum()

    check(batch, odpo, lk.Pairwise(ties="mean"), margin=0.4)


def test_a_margin_raises_what_is_worse_than_the_best_in_a_softmax(batch):
    def softmax_margin(g, r, nll):
        return torch.logsumexp(g + 0.4 * (r.max() - r), 0) - g[r == r.max()].mean()

    check(batch, softmax_margin, lk.Contrastive(ties="mean"), margin=0.4)


def test_a_margin_in_every_softmax_of_listmle(batch):
    def listmle(g, r, nll):
        order = r.argsort(descending=True, stable=True)
        g, r = g[order], r[order]
        return sum((torch.logsumexp(g[i:] + 0.4 * (r[i] - r[i:]), 0) - g[i] for i in range(len(g))), 0 * g.sum())

    check(batch, listmle, lk.ListMLE(), margin=0.4)


def test_a_margin_of_close_rewards_far_from_zero_is_not_rounded_away(batch):
    logps, ref_logps, inputs = batch
    inputs = {**inputs, "relevance": RELEVANCE + 1e9}
    loss = ListLoss(lk.LambdaRank(), margin=0.4)
    near = loss(logps.float(), ref_logps.float(), {**inputs, "relevance": RELEVANCE})[0]
    torch.testing.assert_close(loss(logps.float(), ref_logps.float(), inputs)[0], near)


# --- label smoothing -------------------------------------------------------------------------------------------


def test_smoothing_turns_a_share_of_every_pair_round(batch):
    def cdpo(g, r, nll):
        terms = (-0.9 * F.logsigmoid(g[i] - g[j]) - 0.1 * F.logsigmoid(g[j] - g[i]) for i, j in pairs(r))
        return sum(terms, 0 * g.sum())

    check(batch, cdpo, lk.LambdaRank(), label_smoothing=0.1)


def test_smoothing_of_best_against_worst_is_of_the_same_pair_turned_round(batch):
    for ties, chosen in (("mean", extremes), ("order", lambda r: [(int(r.argmax()), len(r) - 1 - int(r.flip(0).argmin()))])):

        def cdpo(g, r, nll, chosen=chosen):
            some = chosen(r) if len(r) > 1 else []
            return mean([-0.9 * F.logsigmoid(g[i] - g[j]) - 0.1 * F.logsigmoid(g[j] - g[i]) for i, j in some]) + 0 * g.sum()

        check(batch, cdpo, lk.Pairwise(ties=ties), label_smoothing=0.1)


@pytest.mark.parametrize("objective", [lk.Contrastive(ties="mean"), lk.ListNet(temperature=0.5)], ids=str)
def test_smoothing_gives_every_candidate_a_share_of_the_target(batch, objective):
    def cross_entropy(g, r, nll):
        target = (r == r.max()) / (r == r.max()).double().sum() if objective.name == "contrastive" else (r / 0.5).softmax(0)
        return -((0.9 * target + 0.1 / len(g)) * g.log_softmax(0)).sum()

    check(batch, cross_entropy, objective, label_smoothing=0.1)


def test_smoothing_and_margin_together(batch):
    def both(g, r, nll):
        d = g + 0.4 * (r.max() - r)
        return torch.logsumexp(d, 0) - 0.9 * d[r == r.max()].mean() - 0.1 * d.mean()

    check(batch, both, lk.Contrastive(ties="mean"), label_smoothing=0.1, margin=0.4)


def test_a_list_that_is_skipped_is_not_smoothed_either(batch):
    def skipping(g, r, nll):
        if (r == r.max()).sum() > 1:
            return 0 * g.sum()
        return torch.logsumexp(g, 0) - 0.9 * g[r.argmax()] - 0.1 * g.mean()

    check(batch, skipping, lk.Contrastive(ties="skip"), label_smoothing=0.1)


# --- the best answer's likelihood ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ties", "anchor"),
    [
        ("mean", lambda r, nll: nll[r == r.max()].mean()),
        ("order", lambda r, nll: nll[r.argmax()]),
        ("skip", lambda r, nll: nll[r.argmax()] if (r == r.max()).sum() == 1 else 0),
    ],
)
def test_the_anchor_is_the_negative_log_likelihood_per_token_of_the_best(batch, ties, anchor):
    objective = lk.Contrastive(ties=ties)

    def rpo(g, r, nll):
        return lk.reference.list_loss(objective, g, r) + 0.5 * anchor(r, nll)

    check(batch, rpo, objective, sft_weight=0.5)


def test_the_anchor_of_mean_log_likelihoods_is_not_divided_by_tokens_again(batch):
    logps, _, inputs = batch
    means = logps / inputs["num_tokens"]
    off, on = (ListLoss(lk.LambdaRank(), sft_weight=w, length_normalized=True)(means, None, inputs)[0] for w in (0.0, 0.5))
    torch.testing.assert_close(on - off, 0.5 * -torch.stack([means[1], means[3], means[[4, 6]].mean()]))


def test_the_anchor_leaves_an_impossible_candidate_that_is_not_the_best_alone(batch):
    logps, _, inputs = batch
    impossible = logps.detach().clone()
    impossible[5] = -math.inf
    losses, _ = ListLoss(lk.Contrastive(), sft_weight=0.5)(impossible, None, inputs)
    assert losses.isfinite().all()


# --- weights of lists ------------------------------------------------------------------------------------------


def test_weights_multiply_losses_and_are_not_normalised_in_a_batch():
    losses, weight = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 1.5, 0.5])
    assert mean_over_lists(losses, {"weight": weight}).item() == pytest.approx((0 + 3 + 2) / 3)
    assert mean_over_lists(losses[1:2], {"weight": weight[1:2]}).item() == pytest.approx(3)
    assert mean_over_lists(losses, {}).item() == pytest.approx(7 / 3)


def test_a_column_of_weights_is_divided_by_its_mean_and_reaches_the_batch(tmp_path):
    rows = [{**row, "weight": w} for row, w in zip(tiny.lists(3), (1, 0, 5), strict=True)]
    for data in (rows, Dataset.from_list(rows)):
        lists = training_lists(data, tiny.tokenizer(), config(tmp_path, list_top=1, list_bottom=1))
        assert lists["weight"][:] == [0.5, 0.0, 2.5]
        torch.testing.assert_close(ListCollator(0)([lists[0], lists[2]])["weight"], torch.tensor([0.5, 2.5]))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0, -0.5], "row 1: field 'weight' holds -0.5; expected a number >= 0"),
        ([1.0, math.nan], "row 1: field 'weight' holds nan"),
        ([1.0, None], "weight: row 1 of the train data has none"),
        ([0.0, 0.0], "weight: those of the train data add up to 0"),
        (["high", "low"], "field 'weight' holds 'high'"),
    ],
)
def test_bad_weights_are_refused_by_row(tmp_path, weights, said):
    rows = [{**row, "weight": w} for row, w in zip(tiny.lists(2), weights, strict=True)]
    with pytest.raises(ValueError, match=said):
        training_lists(rows, tiny.tokenizer(), config(tmp_path))


# --- in the trainer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 2])
def test_a_training_step_minimises_the_whole_formula(tmp_path, micro):
    data = [{**row, "weight": w} for row, w in zip(tiny.lists(3, m=3, seed=8), (2.0, 0.5, 0.5), strict=True)]
    model, reference = tiny.causal_lm(seed=1), tiny.causal_lm(seed=2)
    expected = 0
    for row in data:
        r = torch.tensor(row["scores"], dtype=torch.float64)
        logps, ref = eager_logps(model, row).double(), eager_logps(reference, row).double().detach()
        d = BETA * (logps - ref) + 0.4 * (r.max() - r)
        n = len(tiny.tokenizer()(row["completions"][int(r.argmax())]).input_ids) + 1
        list_loss = torch.logsumexp(d, 0) - 0.9 * d[r.argmax()] - 0.1 * d.mean() - 0.5 * logps[r.argmax()] / n
        expected = expected + row["weight"] * list_loss / 3
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    terms = dict(margin=0.4, label_smoothing=0.1, sft_weight=0.5)
    t = trainer(tmp_path, data, model, ref_model=reference, beta=BETA, candidate_micro_batch_size=micro, **terms)
    loss, found = step(t, [t.train_dataset[i] for i in range(3)])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    largest = max(g.abs().max().item() for g in gradients)
    for ours, theirs in zip(found.values(), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * largest)


def test_the_order_of_tied_candidates_in_a_file_changes_nothing(tmp_path):
    rows = [{**row, "scores": [1.0, 3.0, 3.0, 1.0]} for row in tiny.lists(2, m=4, seed=5)]
    turned = [{**row, "completions": [row["completions"][i] for i in (3, 2, 1, 0)]} for row in rows]
    for objective in ("pairwise", "contrastive", "listmle"):
        (first, grads), (second, others) = (
            step(t, [t.train_dataset[i] for i in range(2)])
            for t in (
                trainer(tmp_path, x, tiny.causal_lm(seed=1), ref_model=tiny.causal_lm(seed=2), objective=objective)
                for x in (rows, turned)
            )
        )
        assert first.item() == pytest.approx(second.item(), rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, others[name], rtol=1e-3, atol=1e-5)


def test_the_tie_rule_of_a_run(tmp_path):
    def objective(**settings):
        return config(tmp_path, **settings).resolved_objective()

    assert objective(objective="pairwise") == lk.Pairwise(ties="mean")
    assert objective() == lk.Contrastive(ties="mean")
    assert objective(objective="listmle") == lk.ListMLE(ties="efron")
    assert objective(objective="listmle", ties="order") == lk.ListMLE()
    assert objective(objective_options={"ties": "skip"}) == lk.Contrastive(ties="skip")
    assert objective(objective="lambdarank") == lk.LambdaRank()


def test_data_without_any_preference_is_said_or_refused(tmp_path):
    rows = [{**row, "scores": [1.0] * 4} for row in tiny.lists(2)]
    with pytest.warns(UserWarning, match="no list of the train data has two scores that differ: there is no preference"):
        training_lists(rows, tiny.tokenizer(), config(tmp_path))
    with pytest.warns(UserWarning, match="that order is what is trained on"):
        training_lists(rows, tiny.tokenizer(), config(tmp_path, ties="order"))


@pytest.mark.parametrize(
    ("objective", "scores", "is_left"),
    [
        ("contrastive", [2.0, 2.0, 0.0], False),
        ("contrastive", [2.0, 0.0, 0.0], True),
        ("pairwise", [2.0, 0.0, 0.0], False),
        ("pairwise", [2.0, 1.0, 1.0, 0.0], True),
        ("listmle", [3.0, 1.0, 1.0, 0.0], False),
        ("listmle", [3.0, 2.0, 1.0], True),
    ],
)
def test_training_on_nothing_but_skipped_lists_is_refused(tmp_path, objective, scores, is_left):
    rows = [{**row, "scores": scores} for row in tiny.lists(2, m=len(scores))]
    settings = config(tmp_path, objective=objective, ties="skip")
    of_training = lk.listwise_loss(
        torch.arange(len(scores)).float(), torch.tensor(scores), list_sizes=len(scores), objective=settings.resolved_objective()
    )
    assert (of_training != 0) == is_left
    if is_left:
        assert len(training_lists(rows, tiny.tokenizer(), settings)) == 2
    else:
        with pytest.raises(ValueError, match="ties='skip' leaves out every list of the train data"):
            training_lists(rows, tiny.tokenizer(), settings)


def test_how_many_lists_are_skipped_is_said(tmp_path, caplog):
    rows = [
        {**row, "scores": scores} for row, scores in zip(tiny.lists(3, m=2), ([1.0, 1.0], [1.0, 0.0], [0.0, 1.0]), strict=True)
    ]
    with caplog.at_level("INFO", logger="larpo.training"):
        training_lists(rows, tiny.tokenizer(), config(tmp_path, ties="skip"))
    assert "ties='skip' leaves out 1 of 3 lists" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "lambdarank", "ties": "mean"}, "must be left out with lambdarank: it forms no pair of tied"),
        ({"objective": "listmle", "ties": "mean"}, "ListMLE ties must not be 'mean'"),
        ({"ties": "first"}, "Contrastive ties must be 'order', 'skip' or 'mean', got 'first'"),
        ({"ties": "skip", "objective_options": {"ties": "mean"}}, "ties='skip', but objective_options say 'mean'"),
        ({"label_smoothing": 0.5}, "label_smoothing must be a number >= 0 and below 0.5, got 0.5"),
        ({"label_smoothing": 0.1, "objective": "listmle"}, "label_smoothing must be 0 with listmle"),
        ({"margin": -1.0}, "margin must be a number finite and >= 0, got -1.0"),
        ({"margin": 0.1, "objective": "listnet"}, "margin must be 0 with listnet"),
        (
            {"margin": 0.1, "objective": "lambdarank", "objective_options": {"weighting": "dcg"}},
            "margin must be 0 with weighting='dcg'",
        ),
        ({"sft_weight": math.inf}, "sft_weight must be a number finite and >= 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing is for preferences"),
    ],
)
def test_settings_that_mean_nothing_for_an_objective_are_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **settings)


def test_equal_candidates_teach_nothing_unless_the_best_is_learned_by_itself(tmp_path):
    rows = [{"prompt": "the cat", "completions": [" sat"] * 2, "scores": [1.0, 0.0]}]
    with pytest.raises(ValueError, match="all candidates are equal"), pytest.warns(UserWarning):
        training_lists(rows, tiny.tokenizer(), config(tmp_path))
    with pytest.warns(UserWarning):
        assert len(training_lists(rows, tiny.tokenizer(), config(tmp_path, sft_weight=1.0))) == 1


class OwnLoss(LarPOTrainer):
    def list_loss(self, logps, ref_logps, inputs):
        return -logps.mean(), logps


class OwnComputeLoss(LarPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return -model(rows=inputs["rows"][0]).mean()


class MoreLoss(LarPOTrainer):
    def list_loss(self, logps, ref_logps, inputs):
        loss, scores = super().list_loss(logps, ref_logps, inputs)
        return loss + 1, scores


def run(trainer_class, tmp_path, rows, **settings):
    model = tiny.causal_lm()
    t = trainer(tmp_path, Dataset.from_list(rows), model, trainer_class, reference_free=True, learning_rate=1.0, **settings)
    before = model.lm_head.weight.detach().clone()
    try:
        t.train()
    finally:
        moved = not torch.equal(model.lm_head.weight, before)
        assert moved == (t.state.global_step == 1)


@pytest.mark.parametrize("trainer_class", [OwnLoss, OwnComputeLoss])
def test_settings_that_a_loss_of_ones_own_does_not_apply_are_refused_before_an_update(tmp_path, trainer_class):
    rows = tiny.lists(2)
    with pytest.raises(ValueError, match="sft_weight would do nothing: list_loss or compute_loss is overridden"):
        run(trainer_class, tmp_path, rows, sft_weight=0.5)
    with pytest.raises(ValueError, match="the data's column weight would do nothing"):
        run(trainer_class, tmp_path, [{**row, "weight": 1.0} for row in rows])
    run(trainer_class, tmp_path, rows)


def test_a_loss_that_adds_to_the_trainers_own_has_its_settings(tmp_path):
    run(MoreLoss, tmp_path, [{**row, "weight": 1.0} for row in tiny.lists(2)], sft_weight=0.5)
