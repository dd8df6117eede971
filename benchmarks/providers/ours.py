"""The fused ops of this library, from logits and from hidden states, on both backends."""

from __future__ import annotations

from operator import attrgetter

import larpo_kernels as lk
from benchmarks.core.problem import BETA, OBJECTIVE, SCHEDULES, Problem
from benchmarks.providers.registry import Output, provider

LOSSES = {  # side -> the function, and the tensors that it takes first
    "logits": (lk.fused_listwise_loss, attrgetter("logits", "labels", "relevance")),
    "linear": (lk.fused_linear_listwise_loss, attrgetter("hidden", "weight", "labels", "relevance")),
}


def _ours(side: str, **options):
    loss, tensors = LOSSES[side]

    def forward(problem: Problem) -> Output:
        lists = {"list_sizes": problem.list_sizes, "ref_logps": problem.ref_logps, "objective": OBJECTIVE, "beta": BETA}
        out = loss(*tensors(problem), **lists, **options)
        return Output(out.loss, out.logps)

    return forward


TAIL = {"tail_threshold": 2**-12}
MERGES = {"merges": 0.03}  # ten times the error that SmolLM2 has
for _backend, _devices in (("torch", ("cpu", "cuda")), ("triton", ("cuda",))):
    _use, _where = {"backend": _backend}, {"devices": _devices, "needs": "triton" if _backend == "triton" else None}
    _in_place = {"modes": ("train",), "overwrites_input": True, **_where}
    provider(f"ours ({_backend})", "logits", **_where)(_ours("logits", **_use))
    provider(f"ours ({_backend}), in place", "logits", **_in_place)(_ours("logits", inplace_backward=True, **_use))
    for _schedule, (_mode, _gemms) in SCHEDULES.items():
        _of_schedule = {"modes": (_mode,), "gemms": {_mode: _gemms}, **_where}
        provider(f"ours {_schedule} ({_backend})", "linear", **_of_schedule)(_ours("linear", schedule=_schedule, **_use))
    # the call of a user who names no schedule
    _auto = {"modes": ("trainable",), "gemms": {"trainable": 3}, "small": True, **_where}
    provider(f"ours auto ({_backend})", "linear", **_auto)(_ours("linear", schedule="auto", **_use))
    for _schedule in ("frozen_head", "list_hold"):
        _mode, _gemms = SCHEDULES[_schedule]  # GEMMs that an exact gradient takes
        _of_tail = {"modes": (_mode,), "gemms": {_mode: _gemms}, **MERGES, **_where}
        _forward = _ours("linear", schedule=_schedule, **TAIL, **_use)
        provider(f"ours {_schedule}, tail 2^-12 ({_backend})", "linear", **_of_tail)(_forward)
