"""The fused ops of this library, from logits and from hidden states, on both backends."""

from __future__ import annotations

import larpo_kernels as lk
from benchmarks.core.problem import BETA, OBJECTIVE, Problem
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


SCHEDULE_GEMMS = {  # schedule -> mode -> GEMMs
    "score_only": {"score": 1},
    "frozen_head": {"frozen": 2},
    "list_hold": {"trainable": 3},
    "recompute": {"trainable": 4},
}

for _backend, _devices in (("torch", ("cpu", "cuda")), ("triton", ("cuda",))):
    _needs = "triton" if _backend == "triton" else None
    provider(f"ours ({_backend})", "logits", devices=_devices, needs=_needs)(_ours_from_logits(_backend, False))
    provider(
        f"ours ({_backend}), in place",
        "logits",
        devices=_devices,
        needs=_needs,
        modes=("train",),
        overwrites_input=True,
    )(_ours_from_logits(_backend, True))
    for _schedule, _gemms in SCHEDULE_GEMMS.items():
        provider(
            f"ours {_schedule} ({_backend})",
            "linear",
            devices=_devices,
            needs=_needs,
            modes=tuple(_gemms),
            gemms=_gemms,
        )(_ours_from_hidden(_schedule, _backend))
    provider(  # what is called where nobody names a schedule
        f"ours auto ({_backend})",
        "linear",
        devices=_devices,
        needs=_needs,
        modes=("trainable",),
        gemms={"trainable": 3},
        small=True,
    )(_ours_from_hidden("auto", _backend))
    for _schedule, _mode in (("frozen_head", "frozen"), ("list_hold", "trainable")):
        provider(
            f"ours {_schedule}, tail 2^-12 ({_backend})",
            "linear",
            devices=_devices,
            needs=_needs,
            modes=(_mode,),
            gemms={_mode: SCHEDULE_GEMMS[_schedule][_mode]},  # that an exact gradient takes
            merges=0.03,  # ten times what SmolLM2 has
        )(_ours_from_hidden(_schedule, _backend, 2**-12))
