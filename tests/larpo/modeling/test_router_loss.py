"""The loss that balances the experts of a mixture: what the model's own forward adds, in every layout."""

import pytest
import torch
from datasets import Dataset

from larpo.data.collator import ListCollator
from larpo.modeling.policy import Policy, attach
from larpo.modeling.router_loss import RouterLoss
from tests.helpers import tiny
from tests.helpers.trainers import step, trainer

EXPERTS = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "olmoe": "num_experts", "gpt_oss": "num_local_experts"}


def mixture(model_type="mixtral", **config):
    settings = {EXPERTS[model_type]: 4, "num_experts_per_tok": 2, "output_router_logits": True, **config}
    return tiny.causal_lm(model_type, **settings)


@pytest.fixture
def data():
    return Dataset.from_list(tiny.lists(2, m=3, seed=3))


def by_hand(model, tokens):
    """E sum_e f_e P_e over the tokens of these sequences and all layers, in float64."""
    chosen, probabilities = [], []
    for ids in tokens:
        for logits in model.model(torch.tensor([ids]), output_router_logits=True).router_logits:
            p = logits.double().softmax(-1)
            probabilities.append(p)
            chosen.append(torch.nn.functional.one_hot(p.topk(2).indices, 4).sum(1).double())
    return 4 * (torch.cat(chosen).mean(0) * torch.cat(probabilities).mean(0)).sum()


def sequences(t, examples):
    return [one["prompt_ids"] + ids for one in examples for ids in one["completion_ids"]]


def test_a_step_adds_the_balance_of_its_tokens_and_its_gradient(tmp_path, data):
    model = mixture(router_aux_loss_coef=0.5)
    with_it = trainer(tmp_path, data, model, reference_free=True)
    examples = [with_it.train_dataset[i] for i in range(2)]
    loss, found = step(with_it, examples)
    found = {name: grad.clone() for name, grad in found.items() if grad is not None}
    extra = 0.5 * by_hand(model, sequences(with_it, examples))
    names = list(found)
    parameters = dict(model.named_parameters())
    added = torch.autograd.grad(extra, [parameters[name] for name in names], allow_unused=True)

    model.config.output_router_logits = False
    without = trainer(tmp_path, data, model, reference_free=True)
    plain_loss, plain = step(without, examples)
    assert loss.item() == pytest.approx(plain_loss.item() + extra.item(), rel=1e-5)
    for name, more in zip(names, added, strict=True):
        expected = plain[name] if more is None else plain[name] + more
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("model_type", "layout"), [*((name, "padded") for name in EXPERTS), ("mixtral", "packed"), ("qwen2_moe", "packed")]
)
def test_padding_is_not_routed_in_any_layout(tmp_path, data, model_type, layout):
    model = mixture(model_type)
    t = trainer(tmp_path, data, model, reference_free=True)
    (rows,) = ListCollator(0, layout)([t.train_dataset[0]])["rows"]
    router_loss = RouterLoss.asked_for(model)
    with torch.no_grad():
        logps, balance = t.model(rows=rows, router_loss=router_loss)
        expected = by_hand(model, sequences(t, [t.train_dataset[0]]))
    assert balance.item() == pytest.approx(expected.item(), rel=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(t.model(rows=rows), logps)


def test_a_shared_prompt_counts_once():
    model = mixture(attn_implementation="sdpa")
    attach(model, Policy(model))
    example = {"prompt_ids": [1, 5, 6, 7], "completion_ids": [[8, 9], [10]], "scores": [1.0, 0.0]}
    (rows,) = ListCollator(0, "shared")([example])["rows"]
    with torch.no_grad():
        _, balance = model(rows=rows, router_loss=RouterLoss.asked_for(model))
        chosen, probabilities = [], []
        sequences = [torch.tensor([[1, 5, 6, 7, *c]]) for c in example["completion_ids"]]
        router_logits = [model.model(ids, output_router_logits=True).router_logits for ids in sequences]
        for layer in zip(*router_logits, strict=True):
            logits = torch.cat([layer[0], layer[1][4:]]).double()
            probabilities.append(logits.softmax(-1))
            chosen.append(torch.nn.functional.one_hot(logits.topk(2).indices, 4).sum(1).double())
    expected = 4 * (torch.cat(chosen).mean(0) * torch.cat(probabilities).mean(0)).sum()
    assert balance.item() == pytest.approx(expected.item(), rel=1e-4)


def test_nothing_is_added_where_the_config_does_not_ask():
    assert RouterLoss.asked_for(mixture(output_router_logits=False)) is None
    assert RouterLoss.asked_for(mixture(router_aux_loss_coef=0.0)) is None
    assert RouterLoss.asked_for(tiny.causal_lm()) is None
    assert RouterLoss.asked_for(mixture()).coefficient == mixture().config.router_aux_loss_coef


def test_a_balance_that_the_model_does_not_report_itself_is_refused(monkeypatch):
    model = mixture()
    own = model.forward

    def another(*args, **kwargs):
        out = own(*args, **kwargs)
        out.aux_loss = out.aux_loss + 1
        return out

    monkeypatch.setattr(model, "forward", another)
    with pytest.raises(ValueError, match=r"cannot be added: its own forward reports .* Set output_router_logits=False"):
        RouterLoss.asked_for(model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"candidate_micro_batch_size": 1}, "candidate_micro_batch_size runs parts of it"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant=True leaves router logits without a gradient",
        ),
    ],
)
def test_settings_that_leave_it_without_value_or_gradient_are_refused(tmp_path, data, settings, said):
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, data, mixture(), reference_free=True, **settings)


def test_checkpointing_keeps_its_gradient(tmp_path, data):
    norms = []
    for checkpointing in (False, True):
        model = mixture(router_aux_loss_coef=0.5)
        t = trainer(tmp_path, data, model, reference_free=True, learning_rate=0.0, gradient_checkpointing=checkpointing)
        t.train()
        norms.append(t.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_training_and_evaluation_run_with_a_reference_that_is_not_balanced(tmp_path, data):
    t = trainer(tmp_path, data, mixture(router_aux_loss_coef=0.5), eval_dataset=data, max_steps=2)
    t.train()
    assert t.evaluate()["eval_loss"] > 0.5  # E sum f P is 2 at least for two of four experts
