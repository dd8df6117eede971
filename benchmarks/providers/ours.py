"""The fused ops of this library, from logits and from hidden states, on both backends."""

from __future__ import annotations

import larpo_kernels as lk
from benchmarks.core.problem import BETA, OBJECTIVE, SCHEDULES, Problem
from benchmarks.providers.registry import Output, provider


def _common(problem: Problem) -> dict:
    return {
        "list_sizes": problem.list_sizes,
        "objective": OBJECTIVE,
        "ref_logps": problem.ref_logps,
        "beta": BETA,
    }


def _ours_from_logits(backend: str, inplace: bool):
    def forward(problem: Problem) -> Output:
        out = lk.fused_listwise_loss(
            problem.logits,
            problem.labels,
            problem.relevance,
            inplace_backward=inplace,
            backend=backend,
            **_common(problem),
        )
        return Output(out.loss, out.logps)

    return forward


def _ours_from_hidden(schedule: str, backend: str, tail_threshold: float | None = None):
    def forward(problem: Problem) -> Output:
        out = lk.fused_linear_listwise_loss(
            problem.hidden,
            problem.weight,
            problem.labels,
            problem.relevance,
            schedule=schedule,
            tail_threshold=tail_threshold,
            backend=backend,
            **_common(problem),
        )
        return Output(out.loss, out.logps)

    return forward


TAIL = 2**-12
for _backend, _devices in (("torch", ("cpu", "cuda")), ("triton", ("cuda",))):
    _where = {"devices": _devices, "needs": "triton" if _backend == "triton" else None}
    provider(f"ours ({_backend})", "logits", **_where)(_ours_from_logits(_backend, False))
    provider(f"ours ({_backend}), in place", "logits", modes=("train",), overwrites_input=True, **_where)(
        _ours_from_logits(_backend, True)
    )
    for _schedule, (_mode, _gemms) in SCHEDULES.items():
        provider(f"ours {_schedule} ({_backend})", "linear", modes=(_mode,), gemms={_mode: _gemms}, **_where)(
            _ours_from_hidden(_schedule, _backend)
        )
    # what is called where nobody names a schedule
    provider(f"ours auto ({_backend})", "linear", modes=("trainable",), gemms={"trainable": 3}, small=True, **_where)(
        _ours_from_hidden("auto", _backend)
    )
    for _schedule in ("frozen_head", "list_hold"):
        _mode, _gemms = SCHEDULES[_schedule]  # GEMMs that an exact gradient takes
        _tail = {"merges": 0.03}  # ten times the error that SmolLM2 has
        provider(
            f"ours {_schedule}, tail 2^-12 ({_backend})", "linear", modes=(_mode,), gemms={_mode: _gemms}, **_tail, **_where
        )(_ours_from_hidden(_schedule, _backend, TAIL))
