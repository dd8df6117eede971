"""Listwise ranking losses over a language model's candidates, fused from logits or hidden states down to one number."""

from . import reference
from .fused_listwise_loss import fused_linear_listwise_loss, fused_listwise_loss
from .linear.schedules import Plan
from .linear.tail import TailShares
from .logps import linear_sequence_logps, linear_token_logps, plan, sequence_logps, token_logps
from .microbatch import backward_in_slices
from .objectives import Contrastive, LambdaRank, ListMLE, ListNet, Pairwise, listwise_loss
from .outputs import ListwiseLossOutput, TokenLogps

__all__ = [
    "Contrastive",
    "LambdaRank",
    "ListMLE",
    "ListNet",
    "ListwiseLossOutput",
    "Pairwise",
    "Plan",
    "TailShares",
    "TokenLogps",
    "backward_in_slices",
    "fused_linear_listwise_loss",
    "fused_listwise_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "listwise_loss",
    "plan",
    "reference",
    "sequence_logps",
    "token_logps",
]

__version__ = "0.1.0"
