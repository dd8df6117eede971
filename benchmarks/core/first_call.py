"""What the first call of a process costs: in fresh processes, one thread, forward and backward of 4 x 5 x 100 logits.

The child imports nothing but torch and, for ours, larpo_kernels: python -m benchmarks.core.first_call "ours, from logits"
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 3
CANDIDATES, TOKENS, WIDTH, VOCABULARY = 4, 5, 64, 100


def eager_from_logits(logits, weight, labels, relevance):
    logps = logits.log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2))
    return logps.logsumexp(0) - logps[relevance.argmax()]


def eager_from_hidden(hidden, weight, labels, relevance):
    return eager_from_logits(hidden @ weight.T, None, labels, relevance)


def ours_from_logits(logits, weight, labels, relevance):
    import larpo_kernels as lk

    return lk.fused_listwise_loss(logits, labels, relevance, list_sizes=CANDIDATES).loss


def ours_from_hidden(hidden, weight, labels, relevance):
    import larpo_kernels as lk

    return lk.fused_linear_listwise_loss(hidden, weight, labels, relevance, list_sizes=CANDIDATES).loss


CALLS = {
    "eager, from logits": eager_from_logits,
    "eager, from hidden": eager_from_hidden,
    "ours, from logits": ours_from_logits,
    "ours, from hidden": ours_from_hidden,
}


def measured(device: str) -> list[dict]:
    """A row for each call: seconds of every process, and whether it imported torch._dynamo."""
    return [{"call": name, **_over_processes(name, device)} for name in CALLS]


def _over_processes(name: str, device: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.core.first_call", name, device]
    texts = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout for _ in range(PROCESSES)]
    runs = [json.loads(text) for text in texts]
    return {key: [run[key] for run in runs] for key in ("import_s", "first_s", "second_s")} | {"dynamo": runs[0]["dynamo"]}


def _child(name: str, device: str) -> dict:
    draw = torch.Generator().manual_seed(0)
    width = VOCABULARY if name.endswith("logits") else WIDTH
    data = torch.randn(CANDIDATES, TOKENS, width, generator=draw).to(device).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw).to(device).requires_grad_()
    labels = torch.randint(VOCABULARY, (CANDIDATES, TOKENS), generator=draw).to(device)
    relevance = torch.randn(CANDIDATES, generator=draw).to(device)
    torch.zeros((), device=device, requires_grad=True).exp().backward()  # what torch itself starts at its first use
    seconds = [time.perf_counter()]
    if name.startswith("ours"):
        import larpo_kernels  # noqa: F401
    seconds.append(time.perf_counter())
    for _ in range(2):
        CALLS[name](data, weight, labels, relevance).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter())
    imported, first, second = (b - a for a, b in pairwise(seconds))
    return {"import_s": imported, "first_s": first, "second_s": second, "dynamo": "torch._dynamo" in sys.modules}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_child(*sys.argv[1:])))
