"""Runs the code of a GPU on tensors without data that say they are on one: no driver, no card, no kernels.

    python gpu_path.py GUARD.so

Such tensors refuse to mix devices, and to tell the host their values: that would be a wait in the middle of a step. Kernels
are replaced by a check of their arguments. GUARD is a do-nothing device guard (guard.cpp), which CPU builds of torch lack.
"""

import contextlib
import json
import sys
from collections import Counter
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

torch.ops.load_library(sys.argv[1])

import larpo_kernels as lk
from larpo_kernels.backends import triton as primitives
from larpo_kernels.backends.arguments import CandidateArguments, ListwiseArguments, LogitRows
from larpo_kernels.backends.triton import launch, lists, rows, states, tiles
from larpo_kernels.linear import memory, tile_shapes, walk
from larpo_kernels.ops import linear, operator

S, T, H, V = 8, 16, 256, 1088  # a head that is not small
BF16 = torch.bfloat16
LAUNCHED: Counter[str] = Counter()


class Kernels:
    """In place of a module of kernels: `kernels.name[grid](...)` counts, and looks where its tensors are."""

    def __getattr__(self, name):
        def run(*args, **options):
            strangers = [x.device for x in args if isinstance(x, torch.Tensor) and not x.is_cuda]
            assert not strangers, f"{name} got a tensor on {strangers[0]}"
            LAUNCHED[name] += 1

        return type("Launcher", (), {"__getitem__": lambda self, grid: run})()


def stand_in_for_a_gpu():
    tiles.tiles, states.states, rows.rows, lists.lists = (Kernels() for _ in range(4))
    for module in (tiles, states, rows, lists):
        module.on_device = lambda x: contextlib.nullcontext()
    tiles.for_tensor = rows.for_tensor = lambda x: launch.TABLE["sm_90"]
    torch.cuda.is_current_stream_capturing = lambda: True  # so that no step may ask how many tokens count, or what is free


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def labels(*shape):
    return torch.zeros(*shape, device="cuda", dtype=torch.long)


def backward(out):
    """Without the engine, which wants an accelerator."""
    out.grad_fn.apply(torch.ones_like(out), *(None,) * 4)


def the_walk():
    """Every schedule, forward and backward, in one block of tokens and in two."""
    held = {"score_only": 0, "frozen_head": 0, "list_hold": V, "recompute": 0, "partly held": 512}
    cases = ((BF16, None, False, 512), (BF16, 30.0, True, 20000), (torch.float32, None, True, 20000))
    for schedule, held_rows in held.items():
        for dtype, softcap, biased, n in cases:
            hidden, weight = randn(n, H, dtype=dtype), randn(V, H, dtype=dtype)
            bias = randn(V, dtype=dtype) if biased else None
            head = walk.Head(weight, bias, 1.0, softcap, dtype)
            keeps = {"held_rows": held_rows, "held_dtype": BF16, "fuse_hidden_grad": schedule == "frozen_head"}
            results, saved = walk.forward(head, hidden, labels(n), **keeps, stats=biased, backend="triton")
            if schedule not in ("score_only", "frozen_head"):
                new = [None if x is None else torch.empty_like(x) for x in (hidden, weight, bias)]
                outputs = dict(zip(("d_hidden", "d_weight", "d_bias"), new, strict=True))
                walk.backward(head, hidden, labels(n), randn(n), results.logps, saved, **outputs, backend="triton")


def the_ops():
    """Around the walk: tokens that count or all of them, padding, and back."""
    hidden, weight, y = randn(130, H, dtype=BF16), randn(V, H, dtype=BF16), labels(130)
    for token_indices in (None, torch.arange(100, device="cuda")):
        for fuse_hidden_grad, held_rows in ((True, 0), (False, V)):
            given, transform = (hidden, weight, None, y, token_indices), (False, -100, 1.0, None, BF16)
            keeps = (BF16, held_rows, fuse_hidden_grad)
            out = linear.linear_logps(linear.Arguments(*given, *transform, *keeps, True, "triton"))
            needs = (True, not fuse_hidden_grad, False)
            grads = linear.linear_logps_backward(
                linear.BackwardArguments(randn(130), *given, out[0], *out[3:], *transform, *needs, "triton")
            )
            assert out[0].shape == y.shape and grads[0].shape == hidden.shape


def the_rows_and_lists():
    logits, y = randn(S, T, V, dtype=BF16), labels(S, T)
    given = LogitRows(logits, y, None, False, -100, 1.0, None)
    logps, _, _ = primitives.token_logps(given, True)
    primitives.token_logps_backward(given, randn(S, T), logps, torch.empty_like(logits))
    borders = torch.arange(S + 1, device="cuda") * T
    primitives.candidate_logps(CandidateArguments(logps.view(-1), y.view(-1) != -100, borders, "triton"))
    terms = (randn(S), randn(S), 0.1, "listmle", "none", 0, 1.0, "order", "none", "triton")
    cu_lists = torch.arange(3, device="cuda") * 4
    primitives.scores_and_listwise_loss(ListwiseArguments(logps.view(-1), None, borders, cu_lists, 0, *terms))
    primitives.scores_and_listwise_loss(ListwiseArguments(logps, y != -100, None, None, 4, *terms))


def the_api():
    """From the user's line to the ops: validation must not read a tensor."""
    y, relevance, ref_logps = labels(S, T), randn(S), randn(S)
    for list_sizes in (4, torch.tensor([3, 5], device="cuda")):
        options = {"list_sizes": list_sizes, "ref_logps": ref_logps, "length_normalized": True, "return_stats": True}
        for dtype in (BF16, torch.float32):
            logits, hidden = randn(S, T, V, dtype=dtype), randn(S, T, H, dtype=dtype).requires_grad_()
            out = lk.fused_listwise_loss(logits.requires_grad_(), y, relevance, objective="lambdarank", **options)
            assert out.loss.is_cuda and out.loss.requires_grad and out.entropy.shape == y.shape
            for trained in (True, False):
                weight = randn(V, H).requires_grad_(trained)
                out = lk.fused_linear_listwise_loss(hidden, weight, y, relevance, **options)
                assert out.loss.is_cuda and out.loss.requires_grad
                assert lk.plan(hidden, weight, y).schedule == ("recompute" if trained else "frozen_head")
    borders = torch.arange(S + 1, device="cuda") * T
    lk.sequence_logps(randn(S * T, V, dtype=BF16), y.view(-1), cu_seqlens=borders)
    lk.listwise_loss(randn(S).requires_grad_(), relevance, list_sizes=4, objective="listnet")


def the_trainer():
    """The head as larpo's trainer calls it, with no graph being captured: rows hold only tokens that count, so there is
    nothing to ask the device."""
    from larpo.modeling.policy import Policy

    capturing, torch.cuda.is_current_stream_capturing = torch.cuda.is_current_stream_capturing, lambda: False
    memory.free_bytes = lambda device: 1 << 36
    config = SimpleNamespace(model_type="llama", get_text_config=lambda: config)
    head = torch.nn.Linear(H, V, bias=False, device="cuda", dtype=BF16)
    lm = SimpleNamespace(config=config, get_output_embeddings=lambda: head)
    hidden, y, borders = randn(S * T, H, dtype=BF16).requires_grad_(), labels(S * T), torch.arange(S + 1, device="cuda") * T
    for schedule, trained in (("list_hold", True), ("frozen_head", False)):
        head.weight.requires_grad_(trained)
        assert lk.plan(hidden, head.weight, y, ignore_index=None).schedule == schedule
        backward(Policy(lm)._head(lm, hidden, y, borders))
    torch.cuda.is_current_stream_capturing = capturing


class Aten(TorchDispatchMode):
    """Counts what is asked of PyTorch."""

    def __enter__(self):
        self.ops = 0
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops += op.namespace == "aten"  # not what a tensor tells of itself
        return op(*args, **(kwargs or {}))


def the_costs():
    """Forward and backward of each public call, as plain tensors are served: (operations of PyTorch, launches)."""
    y, relevance, ref_logps, borders = labels(S, T), randn(S), randn(S), torch.arange(S + 1, device="cuda") * T
    sizes = (S, T, V), (S * T, V), (S, T, H), (V, H), (S,)
    logits, packed, hidden, weight, scores = (randn(*size, dtype=BF16).requires_grad_() for size in sizes)
    lists = {"list_sizes": 4, "ref_logps": ref_logps}
    calls = {
        "token_logps": lambda: lk.token_logps(logits, y),
        "sequence_logps": lambda: lk.sequence_logps(logits, y),
        "packed sequence_logps": lambda: lk.sequence_logps(packed, y.view(-1), cu_seqlens=borders),
        "listwise_loss": lambda: lk.listwise_loss(scores, relevance, list_sizes=4),
        "fused_listwise_loss": lambda: lk.fused_listwise_loss(logits, y, relevance, **lists).loss,
        "frozen_head": lambda: lk.fused_linear_listwise_loss(hidden, weight.detach(), y, relevance, **lists).loss,
        "list_hold": lambda: lk.fused_linear_listwise_loss(hidden, weight, y, relevance, **lists, schedule="list_hold").loss,
        "recompute": lambda: lk.fused_linear_listwise_loss(hidden, weight, y, relevance, **lists, schedule="recompute").loss,
    }
    operator.are_intercepted = lambda args: False  # the tensors here are not plain ones
    costs = {}
    for name, call in calls.items():
        before = LAUNCHED.total()
        with Aten() as aten:
            out = call()
            backward(out)
        costs[name] = aten.ops, LAUNCHED.total() - before
    print("costs:", json.dumps(costs))


if __name__ == "__main__":
    stand_in_for_a_gpu()
    with FakeTensorMode():
        the_api()
        the_rows_and_lists()
        the_ops()
        for widens, tile in ((True, tile_shapes.GPU_TILE_BYTES), (False, 1 << 22)):
            walk.ADDMM_WIDENS = widens  # torch 2.9's addmm does not write float32
            tile_shapes.GPU_TILE_BYTES = tile  # the vocabulary in one tile, and in several
            the_walk()
        the_trainer()
        the_costs()
    print("launched:", *sorted(LAUNCHED))
