"""Hidden states, heads and labels to test the linear ops on, and what eager PyTorch and float64 make of them."""

import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import larpo_kernels as lk
from larpo_kernels.linear import tile_shapes
from tests.helpers import slow_loop
from tests.helpers.batches import IGNORE, leaf
from tests.helpers.regimes import REGIMES
from tests.helpers.tolerance import FLOAT32_ROUNDING, assert_no_worse_than_eager, gradient_eps, rms

ALL = ("hidden", "weight", "bias")

# name: (what may require grad, keywords); a budget is in bytes beyond what recompute takes
SCHEDULES = {
    "score_only": ((), {"schedule": "score_only"}),
    "frozen_head": (("hidden",), {"schedule": "frozen_head"}),
    "list_hold": (ALL, {"schedule": "list_hold"}),
    "recompute": (ALL, {"schedule": "recompute"}),
    "auto_holding_nothing": (ALL, {"memory_budget": 0}),
    "auto_holding_a_part": (ALL, {"memory_budget": "half"}),
    "auto_holding_all": (ALL, {"memory_budget": 1 << 40}),
}
WALKS = ["score_only", "frozen_head", "list_hold", "recompute", "auto_holding_a_part"]  # each way to walk, once


@dataclass(frozen=True)
class Head:
    hidden: torch.Tensor  # [..., H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    labels: torch.Tensor  # [...]
    upstream: torch.Tensor  # [...] float64, gradient of each token's log-prob

    @property
    def given(self):
        """Names of the tensors that can require grad."""
        return tuple(name for name in ALL if getattr(self, name) is not None)

    def leaves(self, wanted, names=None):
        """Tensors by name, of which those wanted collect their gradient."""
        names = names or self.given
        return {name: leaf(getattr(self, name)) if name in wanted else getattr(self, name) for name in names}

    def double(self):
        """The same numbers in float64, so that gradients are not rounded either."""
        return replace(self, **{name: getattr(self, name).double() for name in self.given})


def make_head(
    vocabulary=31,
    hidden_size=31,
    shape=(12,),
    dtype=torch.float32,
    device="cpu",
    regime="initialisation",
    weight_dtype=None,
    bias=False,
    labels=None,
    logits=None,
    seed=0,
):
    """A head whose logits are of a kind in REGIMES, or `logits` [*shape, V]: then hidden_size >= number of tokens.

    About a quarter of the tokens is ignored, unless labels are given. Columns of -inf come from the bias.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    if labels is None:
        labels = torch.randint(0, vocabulary, shape, generator=generator)
        if regime == "minus_infinity_columns":
            labels += torch.where(labels % 3 == 0, torch.where(labels == vocabulary - 1, -1, 1), 0)  # off the columns of -inf
        ignored = torch.rand(shape, generator=generator) < 0.25
        ignored.view(-1)[:2] = torch.tensor([False, True])[: ignored.numel()]
        labels[ignored] = IGNORE
    if logits is None and regime != "initialisation":
        logits = REGIMES[regime](labels, vocabulary, generator)
    hidden = draw(*labels.shape, hidden_size)
    offset = draw(vocabulary) if bias else None
    if logits is None:
        weight = draw(vocabulary, hidden_size) / math.sqrt(hidden_size)
    else:
        logits = logits.double().where(labels[..., None] != IGNORE, 0).reshape(-1, vocabulary)
        lost = (logits == -math.inf).any(0)
        if offset is not None or lost.any():
            offset = torch.where(lost, -math.inf, torch.zeros(vocabulary).double() if offset is None else offset)
            logits = torch.where(lost, 0, logits - offset)
        weight = (torch.linalg.pinv(hidden.reshape(-1, hidden_size)) @ logits).t()
    like = dict(device=device, dtype=dtype)
    return Head(
        hidden.to(**like),
        weight.to(device, weight_dtype or dtype),
        None if offset is None else offset.to(device, weight_dtype or dtype),
        labels.to(device),
        draw(*labels.shape).to(device),
    )


def use_small_tiles(monkeypatch, tokens=20, rows=40, by_use=False):
    """Tiles that end in the middle of everything, at any device: neither number divides a kernel's blocks.

    by_use: of another shape where E is held in place, and with the whole vocabulary in one pass, as on a GPU.
    """

    def tile_shape(num_tokens, hidden_size, vocab_size, dtype, device, *, casts=True, fuse_hidden_grad=False, in_place=False):
        t, r = tokens, rows
        if by_use:
            t, r = (t + 7, r + 9) if in_place and not casts else (t, vocab_size if fuse_hidden_grad else r)
        return max(1, min(num_tokens, t)), min(vocab_size, r)

    monkeypatch.setattr(tile_shapes, "tile_shape", tile_shape)


def plan_of(head, wanted=ALL, **options):
    """lk.plan for this head with a gradient for what is wanted."""
    return lk.plan(labels=head.labels, **head.leaves(wanted), **options)


def scheduled(name, head):
    """-> what requires grad under this schedule, and the keywords that ask for it."""
    may, options = SCHEDULES[name]
    wanted = tuple(x for x in head.given if x in may)
    if options.get("memory_budget") == "half":
        least, most = (plan_of(head, wanted, schedule=x).extra_bytes for x in ("recompute", "list_hold"))
        options = {"memory_budget": (least + most) // 2}
    return wanted, options


def run(function, head, wanted, upstream=None):
    """function(hidden, weight, bias) -> its value, and the gradients of what is wanted by name."""
    x = head.leaves(wanted, ALL)
    out = function(**x)
    upstream = head.upstream if upstream is None else upstream
    grads = torch.autograd.grad(out, [x[name] for name in wanted], upstream.to(out.dtype)) if wanted else ()
    return out.detach(), dict(zip(wanted, grads, strict=True))


def ours(head, backend, op=lk.linear_token_logps, **options):
    return lambda hidden, weight, bias: op(hidden, weight, head.labels, bias=bias, backend=backend, **options)


def eager(head, op=slow_loop.token_logps, **options):
    """The GEMM in the dtype of the hidden states, the softmax in float32, as a trainer writes it."""
    return lambda hidden, weight, bias: op(
        F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)),
        head.labels,
        compute=torch.float32,
        **options,
    )


def true(head, op=slow_loop.token_logps, **options):
    """For head.double()."""
    return lambda hidden, weight, bias: op(F.linear(hidden, weight, bias), head.labels, **options)


def assert_within(times, x, eager, truth, eps, label="it"):
    """The tolerance rule with `times` eager's error; the largest error may be that of rounding the right number."""
    rounding = torch.finfo(x.dtype).eps / 2 if x.dtype.itemsize < 4 else 0
    x, eager, truth = (y.detach().double().cpu() for y in (x, eager, truth))
    assert x.isfinite().all() and truth.isfinite().all()
    if truth.numel() == 0:
        return
    most = truth.abs().max()
    for name, size, slack in (("largest", lambda e: e.abs().max(), eps + rounding), ("rms", rms, eps)):
        error, allowed = size(x - truth), times * size(eager - truth) + slack * most
        assert error <= allowed, f"{name} error of {label} {error:.3e}, {times} x eager's and slack {allowed:.3e}"


def rounding_allowance(dtype):
    """How many times eager's error a gradient may have: in bfloat16 one more rounding is traded for speed."""
    return 1.5 if dtype == torch.bfloat16 else 1.0


def largest_logit(head):
    """A float32 logit of 300 is known to 3e-5, and so is what follows from it."""
    x = head.double()
    return F.linear(x.hidden[x.labels != IGNORE], x.weight).abs().max().item() if (x.labels != IGNORE).any() else 0.0


def assert_matches_float64(head, backend, wanted=ALL, times=None, **options):
    """Log-probs and gradients under the tolerance rule; never above 0; what is ignored is exactly 0.

    times: how many times eager's error a gradient may have, by default `rounding_allowance`.
    """
    times = times or rounding_allowance(head.hidden.dtype)
    wanted = [name for name in wanted if name in head.given]
    semantic = {k: v for k, v in options.items() if k not in ("schedule", "memory_budget")}
    logps, grads = run(ours(head, backend, **options), head, wanted)
    eager_logps, eager_grads = run(eager(head, **semantic), head, wanted)
    true_logps, true_grads = run(true(head, **semantic), head.double(), wanted)
    ignored = head.labels == options.get("ignore_index", IGNORE)
    assert logps.shape == head.labels.shape and logps.dtype == torch.float32
    assert (logps <= 0).all(), f"a log-probability above 0: {logps.max()}"
    assert (logps[ignored] == 0).all()
    assert_no_worse_than_eager(logps, eager_logps, true_logps)
    eps = max(gradient_eps(logps), 2 * largest_logit(head) * FLOAT32_ROUNDING)
    for name in wanted:
        assert grads[name].dtype == getattr(head, name).dtype
        assert_within(times, grads[name], eager_grads[name], true_grads[name], eps, name)
    if "hidden" in wanted:
        assert (grads["hidden"][ignored] == 0).all()
