"""Listwise ranking losses over a language model's candidates, fused from logits or hidden states down to one number."""

from . import reference
from .fused_listwise_loss import fused_listwise_loss
from .logps import sequence_logps, token_logps
from .objectives import Contrastive, LambdaRank, ListMLE, ListNet, Pairwise, listwise_loss
from .outputs import ListwiseLossOutput, TokenLogps

__all__ = [
    "Contrastive",
    "LambdaRank",
    "ListMLE",
    "ListNet",
    "ListwiseLossOutput",
    "Pairwise",
    "TokenLogps",
    "fused_listwise_loss",
    "listwise_loss",
    "reference",
    "sequence_logps",
    "token_logps",
]

__version__ = "0.1.0"
