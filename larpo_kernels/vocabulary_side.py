"""Calls of the public functions, validated: token log-probs of given logits, or of hidden states and a head."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from . import backends, ops, validation
from .linear import schedules
from .linear.dtypes import dtype_of_tiles
from .linear.vocab_shard import IGNORED, Sharded, VocabShard
from .outputs import TokenLogps


class LogitTransform(NamedTuple):
    """Which labels count, and what a model does to its logits after the head."""

    ignore_index: int | None = -100
    logit_scale: float = 1.0
    softcap: float | None = None


class _Call:
    """What both kinds of call have in common: what comes of their token log-probs."""

    tokens: validation.Tokens
    transform: LogitTransform
    backend: str
    shard: VocabShard | None  # where ranks share the vocabulary: values are of this rank, labels of the whole

    def _check(self, name: str, values: Tensor, labels: Any, cu_seqlens: Any, vocab_size: int, candidates: bool) -> None:
        """values: logits or hidden states, checked; candidates: whether their borders are needed."""
        ignore_index, logit_scale, softcap = self.transform
        self.tokens = validation.tokens(name, values, labels, cu_seqlens, vocab_size, ignore_index, candidates)
        validation.check_options(logit_scale=logit_scale, softcap=softcap)

    def step(self, stats: bool = False) -> ops.Step:
        """logps, entropy, top1 of the labels' shape."""
        raise NotImplementedError

    def run(self, then: ops.Step | tuple[()] = (), stats: bool = False) -> tuple:
        """logps, entropy, top1; with a step of the list side, what that makes of logps instead of them."""
        if self.shard is None:
            return ops.run(*self.step(stats), *then)
        if stats:
            raise TypeError("return_stats is not available where ranks share the vocabulary")
        logps = self.shard.nan_where_out_of_range(self._sharded_logps(), self.tokens.labels, self.transform.ignore_index)
        if not then:
            return logps, None, None
        op, args = then
        return ops.run(op, op.arguments(logps, *args[1:]))

    def _sharded_logps(self) -> Tensor:
        return ops.run(*self.step())[0]

    def token_logps(self, stats: bool) -> Tensor | TokenLogps:
        out = self.run(stats=stats)
        return TokenLogps(*out) if stats else out[0]

    def sequence_logps(self, length_normalized: bool) -> Tensor:
        return self.run(ops.candidate_step(self.mean_mask(length_normalized), self.tokens.cu_tokens, self.backend))[0]

    def mean_mask(self, length_normalized: bool) -> Tensor | None:
        """The tokens that a candidate's mean runs over; None for a sum."""
        return validation.token_mask(self.tokens.labels, self.transform.ignore_index) if length_normalized else None


class LogitsCall(_Call):
    """Given logits with their labels."""

    def __init__(
        self,
        logits: Any,
        labels: Any,
        cu_seqlens: Any,
        transform: LogitTransform,
        backend: str | None,
        inplace_backward: bool = False,
        candidates: bool = True,
    ):
        logits, self.shard = Sharded.parts(logits)
        self.transform = transform
        validation.check_values("logits", logits)
        vocab_size = logits.shape[-1] if self.shard is None else self.shard.size
        self._check("logits", logits, labels, cu_seqlens, vocab_size, candidates)
        if self.shard is not None and inplace_backward:
            raise TypeError("inplace_backward is not available where ranks share the vocabulary")
        self.inplace_backward = inplace_backward
        self.backend = backends.pick(backend, logits)

    def step(self, stats: bool = False) -> ops.Step:
        return ops.token_step(self.tokens, self.transform, stats, self.inplace_backward, self.backend)

    def _sharded_logps(self) -> Tensor:
        ignore_index, logit_scale, softcap = self.transform
        return ops.sharded_token_logps(
            self.tokens.values,
            self.shard.local_labels(self.tokens.labels, ignore_index),
            logit_scale=logit_scale,
            softcap=softcap,
            group=self.shard.name,
            backend=self.backend,
        )


class LinearHeadCall(_Call):
    """Hidden states and the head that is applied to them; planned when made."""

    def __init__(
        self,
        hidden: Any,
        weight: Any,
        labels: Any,
        bias: Any,
        cu_seqlens: Any,
        asked: schedules.Request,
        transform: LogitTransform,
        backend: str | None,
        candidates: bool = True,
    ):
        self.weight, self.shard = Sharded.parts(weight)
        self.bias, self.transform, shard = bias, transform, self.shard
        validation.check_head(hidden, self.weight, bias)
        vocab_size = self.weight.shape[0] if shard is None else shard.size
        self._check("hidden", hidden, labels, cu_seqlens, vocab_size, candidates)
        if asked.tail_threshold is not None:
            validation.probability("tail_threshold", asked.tail_threshold)
        self.compute = dtype_of_tiles(hidden, self.weight, sharded=shard is not None)
        self.backend = backends.pick(backend, hidden, self.compute)
        self.labels, self.token_indices = self.tokens.labels, self.tokens.token_indices
        if not self.tokens.checked:
            self.token_indices = ops.find_token_indices(self.labels, transform.ignore_index)
        num_tokens = self.labels.numel() if self.token_indices is None else self.token_indices.shape[0]
        self.plan = schedules.plan_for(
            hidden,
            self.weight,
            bias,
            num_tokens,
            asked,
            self.compute,
            whole_vocab_size=None if shard is None else vocab_size,
            one_tile=self.tokens.checked and self.backend == "torch" and shard is None,
        )

    def step(self, stats: bool = False) -> ops.Step:
        labels, transform, group = self.labels, self.transform, ""
        if self.shard is not None:
            labels, group = self.shard.local_labels(labels, transform.ignore_index), self.shard.name
            transform = transform._replace(ignore_index=None if transform.ignore_index is None else IGNORED)
        tensors = self.tokens.values, self.weight, self.bias, labels, self.token_indices
        return ops.linear_step(tensors, self.tokens.checked, self.plan, self.compute, transform, stats, self.backend, group)
