"""The primitives as Triton launches: GPUs, and CPU tensors in Triton's interpreter."""

from .lists import candidate_logps, scores_and_listwise_loss
from .rows import token_logps, token_logps_backward
from .states import scale_rows
from .tiles import ForwardTiles, Tiles

__all__ = [
    "ForwardTiles",
    "Tiles",
    "candidate_logps",
    "scale_rows",
    "scores_and_listwise_loss",
    "token_logps",
    "token_logps_backward",
]
