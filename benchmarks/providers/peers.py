"""Other libraries, each through its own public call where it is installed. None has a loss over lists."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import cache
from types import ModuleType

import torch

from benchmarks.core.problem import BETA, IGNORE
from benchmarks.providers.registry import Output, list_loss, provider, scored, token_output

RECOMPUTE_GEMMS = {"score": 1, "frozen": 3, "trainable": 4}  # logits formed again in backward
TRAINING = {"modes": ("frozen", "trainable"), "gemms": {"frozen": 2, "trainable": 3}}  # gradient formed in forward, by chunks
TOKENS_ON_A_GPU = {"computes": "token logps", "devices": ("cuda",)}
SUM_ON_A_GPU = {"computes": "sum of logps", "devices": ("cuda",), **TRAINING}


# --- from logits ----------------------------------------------------------------------------------------


_liger = {"needs": "liger_kernel", "modes": ("train",), "overwrites_input": True, "rounds_tokens": True}


@provider("liger cross_entropy", "logits", **_liger, **TOKENS_ON_A_GPU)
def liger_cross_entropy(problem):
    from liger_kernel.transformers.functional import liger_cross_entropy as loss

    return token_output(-loss(problem.rows, problem.labels.flatten(), ignore_index=IGNORE, reduction="none"), problem)


@provider("flash-attn cross_entropy", "logits", needs="flash_attn", **TOKENS_ON_A_GPU)
def flash_attn_cross_entropy(problem):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    loss, _ = cross_entropy_loss(problem.rows, problem.labels.flatten(), ignore_index=IGNORE)
    return token_output(-loss, problem)


@provider("quack cross_entropy", "logits", needs="quack", **TOKENS_ON_A_GPU)
def quack_cross_entropy(problem):
    from quack.cross_entropy import cross_entropy

    return token_output(-cross_entropy(problem.rows, problem.labels.flatten(), ignore_index=IGNORE, reduction="none"), problem)


@provider("trl selective_log_softmax", "logits", needs="trl", devices=("cuda",))
def trl_selective_log_softmax(problem):
    from trl.kernels import selective_log_softmax_and_entropy

    keep = problem.labels != IGNORE
    logps, _ = selective_log_softmax_and_entropy(problem.logits, problem.labels.where(keep, 0), row_mask=keep)
    return list_loss(logps.where(keep, 0.0), problem)


# --- from hidden x weight -------------------------------------------------------------------------------

TRL_VOCABULARY_CHUNK = 32768  # what TRL 1.16's trainers pass


@cache
def _import_what_trl_needs_for_backward() -> str:
    """-> a note, if there is anything to say.

    Its backward asks trl.trainer.utils for a context that does nothing without DeepSpeed. That module imports libraries
    which a bare machine may lack; a module with that context alone then stands in for it.
    """
    try:
        import trl.trainer.utils  # noqa: F401
    except Exception as error:
        stand_in = ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *parameters: nullcontext()
        sys.modules["trl.trainer.utils"] = stand_in
        return f"an empty trl.trainer.utils stands in for what is missing: {error}"[:200]
    return ""


@provider("trl fused head", "linear", needs="trl", gemms=RECOMPUTE_GEMMS)
def trl_fused_head(problem):
    """As TRL's patched forward calls it: compacted where Triton runs, every position elsewhere."""
    from trl.kernels import ChunkedLogProbFunction

    note = _import_what_trl_needs_for_backward()

    def call(hidden, labels):
        return ChunkedLogProbFunction.apply(hidden, problem.weight, None, labels, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ())[0]

    if problem.device.type == "cuda":
        hidden, labels, back = scored(problem)
        return list_loss(back(call(hidden, labels)), problem)._replace(note=note)
    labels = problem.labels.flatten()
    return list_loss(call(problem.rows, labels.clamp(min=0)).masked_fill(labels == IGNORE, 0.0), problem)._replace(note=note)


@provider("liger fused_linear_cross_entropy", "linear", needs="liger_kernel", **SUM_ON_A_GPU)
def liger_fused_linear_cross_entropy(problem):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    total = loss(problem.rows, problem.weight, problem.labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return Output(-total)


@provider(
    "liger DPO",
    "linear",
    needs="liger_kernel",
    computes="pair loss",
    leaves_memory=True,
    pairs_only=True,
    **TRAINING,
)
def liger_dpo(problem):
    """Consecutive candidates as chosen and rejected: the same tokens, the same head, one pair at a time."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    pairs = problem.relevance.view(-1, 2)
    first = torch.arange(0, len(problem.labels), 2, device=pairs.device)
    swapped = (pairs[:, 1] > pairs[:, 0]).long()  # a tie keeps the input order
    order = torch.cat([first + swapped, first + 1 - swapped])
    dpo = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA, use_ref_model=False)
    loss, (chosen, rejected, *_) = dpo(problem.weight, problem.hidden[order], problem.labels[order])
    logps = torch.empty(len(order), dtype=torch.float64, device=order.device)
    logps[order] = torch.cat([chosen, rejected]).detach().double()
    return Output(loss, logps)


@provider("cut-cross-entropy", "linear", needs="cut_cross_entropy", gemms=RECOMPUTE_GEMMS, **TOKENS_ON_A_GPU)
def cut_cross_entropy(problem):
    """Its default filter skips vocabulary blocks whose softmax is below bf16's resolution."""
    from cut_cross_entropy import linear_cross_entropy

    labels = problem.labels.flatten()
    loss = linear_cross_entropy(problem.rows, problem.weight, labels, ignore_index=IGNORE, reduction="none")
    return token_output(-loss, problem)


@provider("quack linear_cross_entropy", "linear", needs="quack", **SUM_ON_A_GPU)
def quack_linear_cross_entropy(problem):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    total = chunked_linear_cross_entropy(
        problem.rows, problem.weight, problem.labels.flatten(), ignore_index=IGNORE, reduction="sum", tuned=False
    )  # tuned: measures tens of kernels at the first call
    return Output(-total)
