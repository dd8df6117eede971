"""The small worlds that recipes train in: a toy language model, naming, questions, a frozen lake, a corridor."""
