"""The primitives in plain PyTorch: every device, every floating dtype; on a CPU, the product."""

from .lists import candidate_logps, list_stage
from .rows import token_logps, token_logps_backward
from .states import scale_rows
from .tiles import Tiles

__all__ = ["Tiles", "candidate_logps", "list_stage", "scale_rows", "token_logps", "token_logps_backward"]
