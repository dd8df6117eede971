"""From which checkpoint training resumes, and what a stream of lists skips then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerState

from ..runs.checkpoints import STATE, checkpoint_to_go_on_from, refuse_incomplete

if TYPE_CHECKING:
    from ..config import LarPOConfig


def checkpoint_asked_for(asked: str | bool | None, args: LarPOConfig) -> str | bool | None:
    """The checkpoint to resume from: `asked`, or args.resume_from_checkpoint if that is None; True is the newest whole one.

    Raises ValueError where there is none, or where it is not whole.
    """
    checkpoint = args.resume_from_checkpoint if asked is None else asked
    if checkpoint is True:
        checkpoint = checkpoint_to_go_on_from(args.output_dir, args)
        if checkpoint is None:
            raise ValueError(f"resume_from_checkpoint=True, but output_dir={args.output_dir!r} holds no whole checkpoint")
    if checkpoint:
        refuse_incomplete(checkpoint, args)
    return checkpoint


def lists_before(checkpoint: str | bool | None, args: LarPOConfig) -> int:
    """Lists of a stream, on all ranks, that transformers skips when it resumes; 0 where several workers share files out,
    since each of them then skips its own."""
    if not checkpoint or args.ignore_data_skip or args.dataloader_num_workers > 1:
        return 0
    steps = TrainerState.load_from_json(str(Path(checkpoint) / STATE)).global_step
    return steps * args.gradient_accumulation_steps * args.per_device_train_batch_size * args.world_size
