"""The autograd graph, once: ops that are opaque to torch.compile, the same on every backend (operator.py).

    token_logps                logits, labels  -> l_t               backward: one row pass over the logits
    linear_logps               hidden, weight  -> l_t               backward: GEMMs (linear/schedules.py)
    small_linear_logps         the same of a few tokens and a small head on a CPU
    candidate_logps            l_t             -> L_s               backward: a gather
    scores_and_listwise_loss   l_t             -> loss, L_s, g_s    backward: a gather of c_s, formed in the forward

`sharded_token_logps` is `token_logps` of a vocabulary cut over ranks, a plain autograd function.

The vocabulary side ends in l_t, one number per token; the list side starts there. Each is a step, an op with its arguments:
`run(*vocabulary_step, *list_step)` is a fused loss.
"""

from .linear import find_token_indices, linear_step
from .lists import candidate_step, list_step
from .logits import logps_dtype, token_step
from .operator import Step, run
from .sharded_logits import sharded_token_logps

__all__ = [
    "Step",
    "candidate_step",
    "find_token_indices",
    "linear_step",
    "list_step",
    "logps_dtype",
    "run",
    "sharded_token_logps",
    "token_step",
]
