"""What a step costs beside the model and its loss, as counts: a GPU that is asked for a number stands still, and every op is
a launch. Timed by hand, see docs/training.md."""

import sys
from collections import Counter

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

from larpo.modeling import adapters
from larpo.training import metrics
from larpo.training.list_log import ListLog
from tests.helpers import tiny
from tests.helpers.trainers import lora, trainer

STEPS = 3
PARTIES = ("larpo", "larpo_kernels", "transformers", "accelerate", "peft")
NO_LAUNCH = ("view", "detach", "slice", "lift_fresh", "alias", "unsqueeze", "_local_scalar_dense")
SETTINGS = {
    "no reference": dict(reference_free=True),
    "reference": {},
    "adapter": {},
    "shared prompts": dict(share_prefix=True),
    "micro-batches": dict(candidate_micro_batch_size=8),
    "margin": dict(margin=0.1),
}
LAUNCHES = {"no reference": 9, "reference": 11, "adapter": 11, "shared prompts": 30, "micro-batches": 30, "margin": 22}


def party():
    """Which package the op under way is of: that of the innermost frame that is of any."""
    frame = sys._getframe(2)
    while frame is not None:
        for name in PARTIES:
            if frame.f_globals.get("__name__", "").split(".")[0] == name:
                return name
        frame = frame.f_back
    return "other"


class Counted(TorchDispatchMode):
    """Ops of `larpo` itself, and what it reads from tensors."""

    def __init__(self):
        super().__init__()
        self.ops, self.reads = Counter(), 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if party() == "larpo":
            self.ops[name] += 1
            self.reads += name in ("_local_scalar_dense", "nonzero")
        return op(*args, **(kwargs or {}))

    @property
    def launches(self):
        return sum(n for name, n in self.ops.items() if name not in NO_LAUNCH)


def steps_of(tmp_path, monkeypatch, name):
    """A trainer that has run its first batch, on which a model is checked, and what the steps after it did."""
    steps = dict(max_steps=STEPS + 1, per_device_train_batch_size=4, logging_steps=100)
    peft_config = lora(target_modules=["q_proj"]) if name == "adapter" else None
    t = trainer(tmp_path, Dataset.from_list(tiny.lists(16)), peft_config=peft_config, **steps, **SETTINGS[name])
    if name == "adapter":
        monkeypatch.setattr(
            type(t.model), "get_model_status", lambda self: pytest.fail("looks through all layers at each step")
        )
    counted, own = Counted(), t.training_step

    def step(*arguments, **options):
        if t.state.global_step == 0:
            return own(*arguments, **options)
        with counted:
            return own(*arguments, **options)

    def read(method):
        original = getattr(torch.Tensor, method)

        def reading(self, *arguments, **options):
            counted.reads += torch.utils._python_dispatch._get_current_dispatch_mode() is counted and party() == "larpo"
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, method, reading)

    for method in ("tolist", "cpu", "numpy"):
        read(method)
    t.training_step = step
    t.train()
    return t, counted


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_asks_the_device_for_one_number_and_runs_few_ops(tmp_path, monkeypatch, name):
    _, counted = steps_of(tmp_path, monkeypatch, name)
    assert counted.reads == STEPS  # whether the loss is finite
    assert counted.launches <= LAUNCHES[name] * STEPS, counted.ops


def test_switching_an_adapter_off_leaves_it_as_it_was():
    import peft

    model = peft.get_peft_model(tiny.causal_lm(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    ids = torch.tensor([[1, 5, 6]])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    on = model(ids).logits
    with model.disable_adapter():
        base = model(ids).logits
    with adapters.switched_off(model):
        torch.testing.assert_close(model(ids).logits, base, rtol=0, atol=0)
        with adapters.switched_off(model):
            pass
        torch.testing.assert_close(model(ids).logits, base, rtol=0, atol=0)  # off already: it stays off
    torch.testing.assert_close(model(ids).logits, on, rtol=0, atol=0)
    assert not torch.equal(on, base) and [name for name, p in model.named_parameters() if p.requires_grad] == trained


def batch(seed):
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (3,), generator=draw)
    scores, logps = torch.randn(2, int(sizes.sum()), generator=draw)
    return scores.mean(), scores, torch.randint(3, scores.shape, generator=draw).double(), sizes, logps


def logged(batches):
    log, counted = ListLog(), Counted()
    for one in batches:
        log.add(*one)
    with counted:
        return log.pop(), sum(counted.ops.values())


def test_a_log_of_many_batches_is_one_pass_over_all_of_them():
    _, ops_of_one = logged([batch(0)])
    _, ops_of_many = logged([batch(0)] * 30)
    assert ops_of_many == ops_of_one


def test_lists_that_are_compared_in_parts_have_the_same_means(monkeypatch):
    batches = [batch(seed) for seed in range(6)]
    whole, _ = logged(batches)
    monkeypatch.setattr(metrics, "PAIRS", 40)
    parts, _ = logged(batches)
    assert parts == pytest.approx(whole, rel=1e-12)
    assert [part.start for part, _ in metrics._parts([4, 2, 2, 3, 9, 1])] == [0, 2, 4, 5]
