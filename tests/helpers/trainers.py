"""Trainers of tiny models, and what they compute as anybody would write it: the specification that tests compare with."""

import copy
import math

import pytest
import torch

from larpo.config import LarPOConfig
from larpo.trainer import LarPOTrainer
from tests.helpers import tiny

SGD = dict(optim="sgd", learning_rate=1.0, lr_scheduler_type="constant")  # an update is then the gradient
EVERY_STEP = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)


def config(folder, **options):
    quiet = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no")
    batches = dict(per_device_train_batch_size=2, per_device_eval_batch_size=2)
    step = dict(max_steps=1, logging_steps=1, learning_rate=1e-3, max_grad_norm=1e9)
    return LarPOConfig(**{"output_dir": str(folder), **quiet, **batches, **step, **options})


ARGUMENTS = (
    *("ref_model", "peft_config", "eval_dataset", "processing_class", "data_collator", "callbacks"),
    *("compute_metrics", "optimizers", "optimizer_cls_and_kwargs"),
)


def trainer(folder, data, model=None, kind=LarPOTrainer, **options):
    """options: ARGUMENTS of the trainer, and settings."""
    arguments = {name: options.pop(name) for name in ARGUMENTS if name in options}
    arguments = {"train_dataset": data, "processing_class": tiny.tokenizer(), **arguments}
    return kind(tiny.causal_lm() if model is None else model, args=config(folder, **options), **arguments)


def eager_logps(model, row):
    """Log-likelihood of every completion of a row, one after the other, as anybody would write it."""
    tokenizer = tiny.tokenizer()
    prompt = tokenizer(row["prompt"]).input_ids
    logps = []
    for completion in row["completions"]:
        ids = torch.tensor([prompt + tokenizer(completion).input_ids + [tokenizer.eos_token_id]])
        logp = model(input_ids=ids).logits.float().log_softmax(-1)
        logps.append(logp[0, len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None]).sum())
    return torch.stack(logps)


def eager_objective(name, g, relevance):
    order = relevance.argsort(descending=True, stable=True)
    g, relevance = g[order], relevance[order]
    m = len(g)
    if m == 1:
        return g.sum() * 0
    if name == "pairwise":
        return -torch.nn.functional.logsigmoid(g[0] - g[-1])
    if name == "contrastive":
        return -g.log_softmax(0)[0]
    if name == "listmle":
        return -sum(g[i:].log_softmax(0)[0] for i in range(m))
    return -sum(
        torch.nn.functional.logsigmoid(g[i] - g[j]) for i in range(m) for j in range(i + 1, m) if relevance[i] > relevance[j]
    )


def eager_loss(model, reference, lists, objective="contrastive", beta=0.1, mean=False):
    losses = []
    for row in lists:
        logps, ref = eager_logps(model, row), eager_logps(reference, row).detach()
        if mean:
            n = torch.tensor([len(tiny.tokenizer()(c).input_ids) + 1 for c in row["completions"]])
            logps, ref = logps / n, ref / n
        losses.append(eager_objective(objective, beta * (logps - ref), torch.tensor(row["scores"])))
    return sum(losses) / len(losses)


def gradients(model, loss):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def step(t, examples):
    """Loss and gradients of one training step of trainer t on these tokenised rows."""
    t.create_optimizer()
    t.current_gradient_accumulation_steps = 1
    t.model.zero_grad()
    loss = t.training_step(t.model, t.data_collator(examples))
    return loss, {name: p.grad for name, p in t.model.named_parameters() if p.requires_grad}


def moved(model, seed=5, scale=0.03):
    """A policy that has left its reference."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * scale)
    return other


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    largest = max(g.abs().max() for g in theirs.values() if g is not None)
    for name, g in theirs.items():
        torch.testing.assert_close(ours[name], g, rtol=1e-3, atol=1e-5 * largest.item(), msg=lambda m, n=name: f"{n}: {m}")


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **options})


def as_trained(model, part="lora_B", scale=0.2):
    """The model, with numbers in the part of its adapters that is 0 before they are trained."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if part in name:
            p.data = torch.randn(p.shape, generator=generator) * scale
    return model


def with_ref_logps(data, model):
    with torch.no_grad():
        return data.map(lambda row: {"ref_logps": eager_logps(model, row).tolist()})


def losses(t):
    return [entry["loss"] for entry in t.state.log_history if "loss" in entry]


def loss_at_start(t, data):
    """The contrastive loss of the first batch of two, where all scores are 0: the policy is its reference."""
    from torch.utils.data import RandomSampler

    generator = torch.Generator().manual_seed(t.args.seed)
    first = list(RandomSampler(range(len(t.train_dataset)), generator=generator))[:2]
    return sum(math.log(len(data[i]["scores"])) for i in first) / 2
