"""Peak memory of one provider above its inputs, in a process of its own on a CPU.

The child loads the problem, warms libraries up, notes its resident size, resets the kernel's high-water mark
and runs once. malloc is told to give every freed block back, or a warm-up's leftovers would hide what the run
needs. Where the mark can't be reset, ru_maxrss since the start of the process stands in, an upper bound.
On a GPU torch's allocator counts exactly and no process is needed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "2"}


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
        "benchmarks.memory",
        str(problem_file),
        provider,
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=timeout)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    return found["bytes"], found["method"]


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _start() -> tuple[int, str]:
    """Baseline and the method that could be used."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            return _status_bytes("VmRSS"), "VmHWM after reset"
        except OSError:
            pass
    return _max_rss(), "ru_maxrss"


def _max_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _child(problem_file: str, name: str, threads: str) -> None:
    from benchmarks.measure import all_providers, run_once
    from benchmarks.prefix import ModelStep
    from benchmarks.problem import Problem

    torch.set_num_threads(int(threads))
    saved = torch.load(problem_file)
    problem = Problem(**saved) if "labels" in saved else ModelStep.build(**saved)
    provider = next(p for p in all_providers(problem.side, problem.mode) if p.name == name)
    problem = provider.prepare(problem)
    run_once(provider, problem if provider.compiles else provider.prepare(problem.first_list()))
    inputs = problem.fresh(copy=provider.overwrites_input)
    baseline, method = _start()
    run_once(provider, inputs, ready=True)
    peak = _status_bytes("VmHWM") if method.startswith("VmHWM") else _max_rss()
    print(json.dumps({"bytes": max(0, peak - baseline), "method": method}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
