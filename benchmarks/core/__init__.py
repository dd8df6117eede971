"""What a case is, what is true of it, and how a provider's time, memory and error are measured."""
