"""hidden x weight without logits: the schedules, the walk over tiles, and a vocabulary cut over ranks."""
