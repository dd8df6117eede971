"""What only a GPU can show of correctness: sizes past 2^31, CUDA graphs, no waiting for the device, determinism.

Each function yields rows {"what": ..., "ok": ..., numbers}; benchmarks/gpu_check.py runs them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

import larpo_kernels as lk
from benchmarks.core.problem import BETA, IGNORE

ROOT = Path(__file__).resolve().parents[2]
TESTS = (  # of the kernels, by importance
    "token_logps",
    "sequence_logps",
    "objectives",
    "linear_logps",
    "fused_listwise_loss",
    "fused_linear_listwise_loss",
    "extreme_logits",
    "microbatch",
    "bad_input",
    "bad_linear_input",
    "compile",
    "compile_linear",
)
TRAINING = {  # schedule -> which inputs require grad
    "frozen_head": ("hidden",),
    "list_hold": ("hidden", "weight"),
    "recompute": ("hidden", "weight"),
}
RUNS = 100


def guarded(what: str, check, **shown) -> dict:
    """The row of a check that returns numbers, among them perhaps "ok"; an exception is a failure with its message."""
    try:
        return {"what": what, "ok": True, **shown, **check()}
    except Exception as error:  # one failure must not hide the others
        text = str(error).strip().splitlines() or [""]
        return {"what": what, "ok": False, **shown, "error": f"{type(error).__name__}: {text[0]}"[:300]}


# --- the tests -----------------------------------------------------------------------------------------------------


def tests() -> Iterator[dict]:
    """The kernel tests, on the GPU; counted as they end, so that a cut run still says how far it came."""
    files = [f"tests/larpo_kernels/test_{name}.py" for name in TESTS]
    workers = ["-n", "12"] if find_spec("xdist") else []
    flags = ["-o", "addopts=", "-v", "--tb=short", "-rf", "--maxfail=20", "-p", "no:cacheprovider", *workers]
    command = [sys.executable, "-m", "pytest", *files, *flags]
    counts, failed = {}, []
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        sys.stdout.write(line)
        found = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", line)
        if not found or "::" not in line or " - " in line:  # a line of the summary says it a second time
            continue
        counts[found[1].lower()] = counts.get(found[1].lower(), 0) + 1
        if found[1] in ("FAILED", "ERROR"):
            failed.append(re.search(r"\S+::\S+", line)[0])
        if sum(counts.values()) % 50 == 0:
            yield {"what": "so far", **counts}
    code = process.wait()
    if failed:
        yield {"what": f"{len(failed)} tests failed, first {failed[0]}", "ok": False, "failed": failed, **counts}
    else:
        yield {"what": "kernel tests", "ok": code == 0 and bool(counts), "exit": code, **counts}


# --- sizes ---------------------------------------------------------------------------------------------------------


def big() -> Iterator[dict]:
    """More than 2^31 elements and more than 65,535 rows, against float64 on the first, middle and last rows."""
    shapes = [(70_000, 32_000, "many rows"), (9_000, 262_144, "long rows"), (66_000, 50_257, "misaligned rows")]
    for n, v, name in shapes:
        yield guarded(f"logits, {name}: {n} x {v}", lambda n=n, v=v: _big_logits(n, v), elements=n * v)
        torch.cuda.empty_cache()
    n, v = 70_000, 32_768
    for schedule in TRAINING:
        what = f"hidden, {schedule}: {n} tokens x {v} columns"
        yield guarded(what, lambda s=schedule: _big_hidden(70_000, 64, 32_768, s), elements=n * v)
        torch.cuda.empty_cache()


def _some(n: int) -> torch.Tensor:
    """The first, middle and last rows."""
    return torch.cat([torch.arange(a, a + 32, device="cuda") for a in (0, n // 2, n - 32)])


def _labels(n: int, v: int) -> torch.Tensor:
    labels = torch.randint(v, (n,), device="cuda")
    labels[1::7] = IGNORE
    return labels


def _worst(x: torch.Tensor, y: torch.Tensor) -> float:
    """Largest difference, relative to the largest true value."""
    return float((x.double() - y).abs().max() / y.abs().max())


def _big_logits(n: int, v: int) -> dict:
    torch.manual_seed(0)
    logits = torch.empty(n, v, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    labels, upstream, at = _labels(n, v), torch.randn(n, device="cuda"), _some(n)
    logps = lk.token_logps(logits, labels, backend="triton")
    (grad,) = torch.autograd.grad(logps, logits, upstream)
    z, y = logits.detach()[at].double(), labels[at]
    keep = y != IGNORE
    true = torch.where(keep, z.log_softmax(-1).gather(1, y.clamp(min=0)[:, None])[:, 0], 0)
    d = -z.softmax(-1)
    d[torch.arange(len(at), device="cuda"), y.clamp(min=0)] += 1
    d *= (upstream[at].double() * keep)[:, None]
    errors = {"logps": _worst(logps.detach()[at], true), "d_logits": _worst(grad[at], d)}
    zero = bool((grad[labels == IGNORE] == 0).all())
    return {"ok": errors["logps"] < 1e-5 and errors["d_logits"] < 8e-3 and zero, **errors, "ignored rows are 0": zero}


def _big_hidden(n: int, h: int, v: int, schedule: str) -> dict:
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(v, h, device="cuda") / h**0.5).bfloat16().requires_grad_("weight" in TRAINING[schedule])
    labels, upstream, at = _labels(n, v), torch.randn(n, device="cuda"), _some(n)
    logps = lk.linear_token_logps(hidden, weight, labels, schedule=schedule, backend="triton")
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    grads = torch.autograd.grad(logps, wanted, upstream)
    y, keep = labels[at], labels[at] != IGNORE
    z = hidden.detach()[at].double() @ weight.detach().double().T
    true = torch.where(keep, z.log_softmax(-1).gather(1, y.clamp(min=0)[:, None])[:, 0], 0)
    d = -z.softmax(-1)
    d[torch.arange(len(at), device="cuda"), y.clamp(min=0)] += 1
    d *= (upstream[at].double() * keep)[:, None]
    errors = {"logps": _worst(logps.detach()[at], true), "d_hidden": _worst(grads[0][at], d @ weight.detach().double())}
    if len(grads) > 1:
        errors["d_weight"] = _worst(grads[1][:64], _d_weight(hidden.detach(), weight.detach(), labels, upstream, 64))
    return {"ok": errors["logps"] < 4e-3 and all(e < 2e-2 for e in errors.values()), **errors}


def _d_weight(hidden, weight, labels, upstream, rows: int) -> torch.Tensor:
    """float64 d weight of the first vocabulary rows, in blocks of tokens."""
    found = torch.zeros(rows, hidden.shape[1], dtype=torch.float64, device="cuda")
    c = (upstream.double() * (labels != IGNORE))[:, None]
    for a in range(0, len(hidden), 4096):
        h, part = hidden[a : a + 4096].double(), slice(a, a + 4096)
        g = -(h @ weight.double().T).softmax(-1)[:, :rows]
        g += labels[part, None] == torch.arange(rows, device="cuda")
        found += (g * c[part]).T @ h
    return found


# --- CUDA graphs, waiting for the device ---------------------------------------------------------------------------


def graphs() -> Iterator[dict]:
    """Forward and backward captured once give, on replay with other numbers, what a fresh call gives."""
    for objective in ("contrastive", "lambdarank"):
        for packed in (False, True):
            what = f"from logits, {objective}, {'packed' if packed else 'padded'}"
            yield guarded(f"no waiting, {what}", lambda o=objective, p=packed: _without_waiting(_from_logits(o, p)))
            yield guarded(f"graph, {what}", lambda o=objective, p=packed: _replayed(_from_logits(o, p), exact=True))
    for schedule in (*TRAINING, "score_only", "auto"):
        every_label = lambda s=schedule: _without_waiting(_from_hidden(s, ignored=False, ignore_index=None))  # noqa: E731
        yield guarded(f"no waiting, from hidden, {schedule}", every_label)
        for ignored in (False, True):
            what = f"graph, from hidden, {schedule}, {'ignored tokens' if ignored else 'all tokens count'}"
            exact = not ignored and schedule != "auto"  # which takes another schedule in a graph
            yield guarded(what, lambda s=schedule, i=ignored, e=exact: _replayed(_from_hidden(s, i), exact=e))
    sizes = [[4] * 4, torch.full((4,), 4, device="cuda")]
    for name, list_sizes in zip(("a Python list", "a tensor"), sizes, strict=True):
        row = guarded("", lambda x=list_sizes: _without_waiting(_from_logits("listmle", False, x)))
        yield {"what": f"list_sizes as {name}", "waits": not row["ok"], "note": row.get("error", "")}


def _from_logits(objective: str, packed: bool, list_sizes=4):
    """-> tensors to change between replays, and a step that returns loss, logps and gradient."""
    s, t, v = 16, 32, 32_000
    logits = torch.randn(s, t, v, device="cuda").bfloat16().requires_grad_()
    labels = _labels(s * t, v).view(s, t)
    borders = {}
    if packed:
        logits, labels = logits.detach().flatten(0, 1).requires_grad_(), labels.flatten()
        borders = {"cu_seqlens": torch.arange(s + 1, device="cuda") * t}
    changing = {"logits": logits, "labels": labels, "relevance": torch.randn(s, device="cuda")}
    ref = torch.randn(s, device="cuda")

    def step():
        out = lk.fused_listwise_loss(
            logits,
            labels,
            changing["relevance"],
            list_sizes=list_sizes,
            objective=objective,
            ref_logps=ref,
            beta=BETA,
            **borders,
        )
        return out.loss.detach(), out.logps, *torch.autograd.grad(out.loss, logits)

    return changing, step


def _from_hidden(schedule: str, ignored: bool, **options):
    s, t, h, v = 16, 32, 256, 32_000
    wanted = TRAINING.get(schedule, () if schedule == "score_only" else ("hidden", "weight"))
    hidden = torch.randn(s, t, h, device="cuda").bfloat16().requires_grad_("hidden" in wanted)
    weight = (torch.randn(v, h, device="cuda") / 16).bfloat16().requires_grad_("weight" in wanted)
    labels = _labels(s * t, v).view(s, t) if ignored else torch.randint(v, (s, t), device="cuda")
    changing = {"hidden": hidden, "labels": labels, "relevance": torch.randn(s, device="cuda")}

    def step():
        out = lk.fused_linear_listwise_loss(
            hidden, weight, labels, changing["relevance"], list_sizes=4, objective="listmle", schedule=schedule, beta=BETA,
            **options,
        )  # fmt: skip
        asked = [x for x in (hidden, weight) if x.requires_grad]
        return out.loss.detach(), out.logps, *(torch.autograd.grad(out.loss, asked) if asked else ())

    return changing, step


def _shuffle(changing: dict[str, torch.Tensor]) -> None:
    """Other numbers in the same memory; what was ignored stays so."""
    with torch.no_grad():
        for x in changing.values():
            if x.is_floating_point():
                x.copy_(torch.randn_like(x))
            else:
                x.copy_(torch.where(x == IGNORE, x, (x * 7 + 3) % 32_000))


def _replayed(case, exact: bool) -> dict:
    changing, step = case
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and opens the libraries' handles
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    _shuffle(changing)
    graph.replay()
    replayed = [x.clone() for x in captured]
    fresh = step()
    largest = max(_worst(a, b.double()) for a, b in zip(replayed, fresh, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(replayed, fresh, strict=True))
    # Without ignored tokens both walk the same tokens in the same GEMMs. With them the GEMMs differ in shape.
    return {"ok": same if exact else largest < 2e-2, "bitwise": same, "largest relative difference": largest}


def _without_waiting(case) -> dict:
    _, step = case
    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


# --- determinism ---------------------------------------------------------------------------------------------------


def determinism() -> Iterator[dict]:
    """Bitwise the same numbers in 100 runs, and for a list whatever stands beside it."""
    cases = {f"from logits, {o}": (lambda o=o: _from_logits(o, False)) for o in ("contrastive", "lambdarank", "listnet")}
    cases |= {f"from hidden, {s}": (lambda s=s: _from_hidden(s, True)) for s in (*TRAINING, "score_only")}
    for what, make in cases.items():
        yield guarded(f"{RUNS} runs, {what}", lambda m=make: _same_every_time(m()[1]))
    yield guarded("a list alone and in company, from logits", _company)


def _same_every_time(step) -> dict:
    first = [x.clone() for x in step()]
    different = sum(not all(map(torch.equal, first, step())) for _ in range(RUNS - 1))
    return {"ok": different == 0, "different": different}


def _company() -> dict:
    s, t, v = 64, 64, 128_256
    logits = torch.randn(s, t, v, device="cuda").bfloat16()
    labels, relevance = _labels(s * t, v).view(s, t), torch.randn(s, device="cuda")

    def run(a: int, b: int):
        x = logits[a:b].clone().requires_grad_()
        out = lk.fused_listwise_loss(x, labels[a:b], relevance[a:b], list_sizes=4, objective="listmle", reduction="sum")
        return out.logps, *torch.autograd.grad(out.loss, x)

    together = run(0, s)
    wrong = [
        a for a in (0, 20, 60) if not all(torch.equal(x[a : a + 4], y) for x, y in zip(together, run(a, a + 4), strict=True))
    ]
    return {"ok": not wrong, "lists that differ": wrong}
