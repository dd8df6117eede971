"""Is it right, how exact, how fast, how lean: larpo_kernels against everybody else. Start at run.py."""
