"""The steps of gpu_check.py: what only a GPU can show."""
