"""What a training step is made of: the loss of a list, what lists weigh, what is logged, and what stops it."""
