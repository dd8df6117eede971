"""Peak memory of one provider above its inputs: by torch's allocator on a GPU, in a process of its own on a CPU.

In that process malloc gives every freed block back, or a warm-up's leftovers would hide what the run needs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "2"}


def give_back_freed() -> None:
    """To the system, what the allocator keeps for later."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def peak_on_gpu(run) -> int:
    """Bytes torch's allocator held at most during run(), above what it held before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_in_child(problem_file: Path, provider: str, timeout: float) -> tuple[int, str]:
    """(bytes, method). Raises RuntimeError with the child's last line, or subprocess.TimeoutExpired."""
    env = {**os.environ, **GIVE_BACK, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [
        sys.executable,
        "-m",
        "benchmarks.core.memory_child",
        str(problem_file),
        provider,
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=timeout)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    return found["bytes"], found["method"]
