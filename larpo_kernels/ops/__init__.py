"""The autograd graph, once, as torch.library ops: opaque to torch.compile, the same on every backend.

    token_logps     logits, labels        -> l_t                      backward: one row pass over the logits
    linear_logps    hidden, weight        -> l_t                      backward: GEMMs (linear/schedules.py)
    candidate_logps l_t                   -> L_s                      backward: a gather
    list_stage      l_t                   -> loss, L_s, g_s           backward: a gather of c_s, formed in the forward

`sharded_token_logps` is `token_logps` of a vocabulary cut over ranks, a plain autograd function.

The vocabulary side ends in l_t, one number per token; the list side starts there. Fused losses chain the two.
"""

from .linear import counted_tokens, linear_logps
from .lists import candidate_logps, list_stage, reduce
from .logits import token_logps
from .sharded_logits import sharded_token_logps

__all__ = [
    "candidate_logps",
    "counted_tokens",
    "flops",
    "linear_logps",
    "list_stage",
    "reduce",
    "sharded_token_logps",
    "token_logps",
]
