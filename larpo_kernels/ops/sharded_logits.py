"""Logits of which each rank has its own vocabulary rows -> token log-probs, by the row kernels of one device.

The row kernel gives l_j, the log-prob of one logit z_j among a rank's own, and so their sum exp(z_j - l_j) without loss of
precision. Which z_j a rank takes: the owner of a token's target takes the target, so that its sum without the target is
exp(k) (exp(-l_j) - 1); every other rank takes its largest logit as a stand-in (3 of the logits 1, 3, 2), and so does an owner
whose target lies far below its largest logit. Ranks exchange k and these sums, one number per token each.

In the backward the same row kernel gives -c exp(z - z_j + l') with l' = l + z_j - k. Only the entry at a stand-in has to be
corrected, since it is no target.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..backends.arguments import LogitRows
from ..backends.pytorch.rows import UNLIKELY_LOGP
from ..linear.vocab_shard import ELSEWHERE, IGNORED, add_up, largest
from .logits import logps_dtype


class _ShardedTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, logit_scale, softcap, group, backend):
        ctx.options = (logit_scale, softcap, backend)
        best = logits.argmax(-1) if logit_scale >= 0 else logits.argmin(-1)
        own, z = (_logit_at(y, logits, logit_scale, softcap).double() for y in (labels, best))
        far = (labels >= 0) & (own - z < UNLIKELY_LOGP) & (own > -torch.inf)
        stands_in = far | (labels == ELSEWHERE)
        stand_in, z = torch.where(stands_in, best, labels), torch.where(stands_in, z, own)
        given = LogitRows(logits, stand_in, None, False, IGNORED, logit_scale, softcap)
        local, _, _ = backends.get(backend).token_logps(given, False)
        local = local.double()
        k = add_up(torch.where(labels >= 0, own, 0), group)
        others = torch.where(stands_in, -local, -local + torch.log1p(-local.exp()))  # log of the sum here, less z
        others = torch.where(z == -torch.inf, -torch.inf, others + (z - k))
        top = largest(others.clone(), group).clamp_(min=torch.finfo(torch.float32).min)  # -inf - -inf is not 0
        log_s = top + add_up((others - top).exp(), group).log()
        logps = torch.where(k == -torch.inf, -torch.inf, -torch.logaddexp(log_s, torch.zeros_like(log_s)))
        at_stand_in = torch.where(stands_in & (logps > -torch.inf), logps + (z - k), logps)
        dtype = logps_dtype(logits)
        ctx.save_for_backward(logits, labels, stand_in, stands_in, far, at_stand_in.to(dtype), z.to(dtype), own.to(dtype))
        return torch.where(labels == IGNORED, 0, logps).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logit_scale, softcap, backend = ctx.options
        logits, labels, stand_in, stands_in, far, logps, z, own = ctx.saved_tensors
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        given = LogitRows(logits, stand_in, None, False, IGNORED, logit_scale, softcap)
        backends.get(backend).token_logps_backward(given, grad, logps, out, whole=False)

        def slope(z):
            return logit_scale if softcap is None else logit_scale * (1 - (z / softcap).square())

        def put(at, where, value):
            at, value = at.clamp(min=0)[..., None], value.to(out.dtype)[..., None]
            out.scatter_(-1, at, torch.where(where[..., None], value, out.gather(-1, at)))

        put(stand_in, stands_in, torch.where(logps == -torch.inf, 0, -grad * logps.exp() * slope(z)))
        put(labels, far, grad * slope(own))  # 1 - exp(l) is 1 there
        return out, None, None, None, None, None


def _logit_at(labels: Tensor, logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """z of each token at its label, scaled and soft-capped."""
    x = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    z = x.to(logps_dtype(x)) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def sharded_token_logps(logits, labels, *, logit_scale, softcap, group, backend):
    """-> logps [S, T] on every rank of the group, of its logits [S, T, V_r] and `VocabShard.local_labels`."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    return _ShardedTokenLogps.apply(logits, labels, float(logit_scale), softcap, group, backend)
