"""From a transformers model to log-likelihoods of candidates: the head, row layouts, shared prompts, the reference."""
