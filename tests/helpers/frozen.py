"""Imported last by the server that processes are forked from: their collections visit, and so copy, nothing that it has."""

import gc

gc.collect()
gc.freeze()
