"""The primitives in plain PyTorch: every device, every floating dtype; on a CPU, the product."""

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
