"""The process in which `memory.peak_in_child` measures one provider: python -m benchmarks.core.memory_child FILE NAME THREADS

It loads the problem, warms libraries up, notes its resident size, resets the kernel's high-water mark and runs once. Where
the mark can't be reset, ru_maxrss since the start of the process stands in, an upper bound.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path

import torch

from benchmarks.core.kinds import load
from benchmarks.core.measure import all_providers, run_once
from benchmarks.core.memory import give_back_freed


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _start() -> tuple[int, str]:
    """Baseline and the method that could be used."""
    gc.collect()
    give_back_freed()
    if sys.platform == "linux":
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
    torch.set_num_threads(int(threads))
    problem = load(Path(problem_file))
    provider = next(p for p in all_providers(problem.side, problem.mode, small=True) if p.name == name)
    problem = provider.prepare(problem)
    run_once(provider, problem if provider.leaves_memory else provider.prepare(problem.first_list()))
    inputs = problem.fresh(copy=provider.overwrites_input)
    baseline, method = _start()
    run_once(provider, inputs, ready=True)
    peak = _status_bytes("VmHWM") if method.startswith("VmHWM") else _max_rss()
    print(json.dumps({"bytes": max(0, peak - baseline), "method": method}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
