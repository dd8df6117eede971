"""What only a GPU can show of correctness: sizes past 2^31, CUDA graphs, no waiting for the device, determinism.

Each step yields rows {"what": ..., "ok": ..., numbers}; benchmarks/gpu_check.py runs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

import larpo_kernels as lk
from benchmarks.core.problem import BETA, IGNORE, SCHEDULES, WANTED
from benchmarks.gpu import device, pytest_rows
from benchmarks.gpu.plan import shapes

ROOT = Path(__file__).resolve().parents[2]
TESTS = (  # of the kernels, by importance
    "every_op",
    "token_logps",
    "linear_logps",
    "fused_linear_listwise_loss",
    "fused_listwise_loss",
    "objectives",
    "ties",
    "extreme_lists",
    "sequence_logps",
    "extreme_logits",
    "row_blocks",
    "schedules",
    "tail",
    "microbatch",
    "second_derivatives",
    "unread_input",
    "operators",
    "bad_input",
    "compile",
    "compile_linear",
)
WANTED_BY = {schedule: WANTED[mode] for schedule, (mode, _) in SCHEDULES.items()}  # which inputs require grad
TRAINING = [schedule for schedule, wanted in WANTED_BY.items() if wanted]


def guarded(what: str, check: Callable[..., dict], *arguments) -> dict:
    """The row of a check that returns numbers, among them perhaps "ok"; an exception is a failure with its message."""
    try:
        return {"what": what, "ok": True, **check(*arguments)}
    except Exception as error:  # one failure must not hide the others
        text = str(error).strip().splitlines() or [""]
        return {"what": what, "ok": False, "error": f"{type(error).__name__}: {text[0]}"[:300]}


# --- the tests -----------------------------------------------------------------------------------------------------


def test_files() -> list[Path]:
    """A dry run has few."""
    files = [ROOT / f"tests/larpo_kernels/test_{name}.py" for name in TESTS]
    return [ROOT / "tests/test_import.py"] if device.dry() else [file for file in files if file.exists()]


def tests(context, every_s: float = 5.0) -> Iterator[dict]:
    """The kernel tests, on the GPU; counted as they end, so that a cut run still says how far it came."""
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if find_spec("xdist") and not device.dry() else []
    flags = ["-o", "addopts=", "-q", "--tb=short", "--maxfail=40", "-p", "no:cacheprovider", "-p", pytest_rows.__name__]
    command = [sys.executable, "-m", "pytest", *map(str, test_files()), *flags, *workers]
    with tempfile.TemporaryDirectory() as folder:
        ended = Path(folder) / "tests"
        own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}  # it is no worker of another pytest
        environment = {**own, pytest_rows.FILE: str(ended), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        process, said, shown = subprocess.Popen(command, cwd=ROOT, env=environment), time.monotonic(), 0
        while process.poll() is None:
            time.sleep(0.1)
            counts = _counts(ended)
            if sum(counts.values()) > shown and time.monotonic() - said > every_s:
                said, shown = time.monotonic(), sum(counts.values())
                yield {"what": "so far", **counts, "failures": _failures(ended)}
        counts, failures = _counts(ended), _failures(ended)
    ok = process.returncode == 0 and counts.get("passed", 0) > 0
    what = f"{len(failures)} failed, first {failures[0]['test']}" if failures else "kernel tests"
    yield {"what": what, "ok": ok, "exit": process.returncode, **counts, "failures": failures}


def _ended(file: Path) -> list[dict]:
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def _counts(file: Path) -> dict[str, int]:
    counts = {}
    for test in _ended(file):
        counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
    return counts


def _failures(file: Path) -> list[dict]:
    return [{"test": test["test"], "error": test["error"]} for test in _ended(file) if test["outcome"] == "failed"]


# --- against float64 -----------------------------------------------------------------------------------------------


def smoke_rows(context) -> Iterator[dict]:
    """Log-probabilities of rows and their gradient, in every dtype; the loss of every objective."""
    for n, v, dtype in shapes().smoke_rows:
        yield guarded(f"rows, {n} x {v} {dtype}", _rows, n, v, getattr(torch, dtype))
    for objective in ("contrastive", "pairwise", "listmle", "lambdarank", "listnet"):
        yield guarded(f"loss from logits, {objective}", _list_loss, objective)


def smoke_head(context) -> Iterator[dict]:
    """Every schedule."""
    n, h, v = shapes().smoke_head
    for schedule in SCHEDULES:
        yield guarded(f"hidden, {schedule}: {n} tokens x {v} columns", _head, n, h, v, schedule)


def smoke_graph(context) -> Iterator[dict]:
    yield guarded("graph, from logits", _replayed, partial(_from_logits, "contrastive", False))
    yield guarded("graph, from hidden", _replayed, partial(_from_hidden, "list_hold", False))


def _list_loss(objective: str) -> dict:
    """The whole of fused_listwise_loss against its specification in float64."""
    s, t, _, v = shapes().graph
    torch.manual_seed(0)
    logits = torch.randn(s, t, v, device=device.name()).bfloat16().requires_grad_()
    labels, relevance = _labels(s * t, v).view(s, t), torch.randn(s, device=device.name())
    given = {"list_sizes": 4, "objective": objective}
    out = lk.fused_listwise_loss(logits, labels, relevance, beta=BETA, backend=device.backend(), **given)
    (grad,) = torch.autograd.grad(3 * out.loss, logits)
    few = slice(0, 4)  # the gradient of the first list; lists do not affect each other
    z = logits.detach().double()
    logps = _truth(z, labels, torch.ones_like(labels))[0].sum(-1).requires_grad_()
    loss = lk.reference.listwise_loss(BETA * logps, relevance.double(), **given)
    (c,) = torch.autograd.grad(3 * loss, logps)
    _, d = _truth(z[few], labels[few], c[few, None])
    loss, value = loss.detach(), out.loss.detach().double()
    errors = {
        "loss": float((value - loss).abs() / loss.abs().clamp(min=1e-3)),
        "logps": _worst(out.logps, logps.detach()),
        "d_logits": _worst(grad[few], d),
    }
    return {"ok": errors["loss"] < 1e-4 and errors["logps"] < 1e-5 and errors["d_logits"] < 8e-3, **errors}


# --- sizes ---------------------------------------------------------------------------------------------------------


def big(context) -> Iterator[dict]:
    """More than 2^31 elements and more than 65,535 rows, against float64 on the first, middle and last rows."""
    size = shapes()
    for n, v in size.big_rows:
        yield guarded(f"logits: {n} x {v}", _more, n * v, _rows, n, v, torch.bfloat16)
        device.release()
    n, h, v = size.big_head
    scored = int((_labels(n, v) != IGNORE).sum())  # the tiles, and E where it is held, are of these tokens alone
    for schedule in TRAINING:
        what = f"hidden, {schedule}: {scored} scored tokens x {v} columns"
        yield guarded(what, _more, scored * v, _head, n, h, v, schedule)
        device.release()


def _more(elements: int, check: Callable[..., dict], *arguments) -> dict:
    """A check that fails too where its matrix is not as large as it is meant to be."""
    found = check(*arguments)
    return {**found, "ok": found["ok"] and elements > shapes().more_than, "elements": elements}


def _some(n: int) -> torch.Tensor:
    """The first, middle and last rows."""
    starts = (0, n // 2, max(0, n - 32))
    return torch.cat([torch.arange(a, min(a + 32, n), device=device.name()) for a in starts]).unique()


def _labels(n: int, v: int) -> torch.Tensor:
    labels = torch.randint(v, (n,), device=device.name())
    labels[1::7] = IGNORE
    return labels


def _worst(x: torch.Tensor, y: torch.Tensor) -> float:
    """Largest difference, relative to the largest true value."""
    return float((x.double() - y).abs().max() / y.abs().max())


def _truth(z: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [...] and their gradient to z [..., V], float64, times upstream; 0 where ignored."""
    keep, at = labels != IGNORE, labels.clamp(min=0)[..., None]
    d = -z.softmax(-1)
    d.scatter_add_(-1, at, torch.ones_like(d[..., :1]))
    d *= (upstream.double() * keep)[..., None]
    return torch.where(keep, z.log_softmax(-1).gather(-1, at)[..., 0], 0), d


def _rows(n: int, v: int, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    logits = torch.empty(n, v, dtype=dtype, device=device.name()).normal_().requires_grad_()
    labels, upstream, at = _labels(n, v), torch.randn(n, device=device.name()), _some(n)
    logps = lk.token_logps(logits, labels, backend=device.backend())
    (grad,) = torch.autograd.grad(logps, logits, upstream)
    true, d = _truth(logits.detach()[at].double(), labels[at], upstream[at])
    errors = {"logps": _worst(logps.detach()[at], true), "d_logits": _worst(grad[at], d)}
    zero = bool((grad[labels == IGNORE] == 0).all())
    ok = errors["logps"] < 1e-5 and errors["d_logits"] < torch.finfo(dtype).eps + 1e-5 and zero
    return {"ok": ok, **errors, "ignored rows are 0": zero}


def _head(n: int, h: int, v: int, schedule: str) -> dict:
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device=device.name()).bfloat16().requires_grad_("hidden" in WANTED_BY[schedule])
    weight = (torch.randn(v, h, device=device.name()) / h**0.5).bfloat16().requires_grad_("weight" in WANTED_BY[schedule])
    labels, upstream, at = _labels(n, v), torch.randn(n, device=device.name()), _some(n)
    logps = lk.linear_token_logps(hidden, weight, labels, schedule=schedule, backend=device.backend())
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    grads = torch.autograd.grad(logps, wanted, upstream) if wanted else ()
    true, d = _truth(hidden.detach()[at].double() @ weight.detach().double().T, labels[at], upstream[at])
    errors = {"logps": _worst(logps.detach()[at], true)}
    if grads:
        errors["d_hidden"] = _worst(grads[0][at], d @ weight.detach().double())
    if len(grads) > 1:
        errors["d_weight"] = _worst(grads[1][:64], _d_weight(hidden.detach(), weight.detach(), labels, upstream, 64))
    return {"ok": errors["logps"] < 4e-3 and all(e < 2e-2 for e in errors.values()), **errors}


def _d_weight(hidden, weight, labels, upstream, rows: int) -> torch.Tensor:
    """float64 d weight of the first vocabulary rows, in blocks of tokens."""
    found = torch.zeros(rows, hidden.shape[1], dtype=torch.float64, device=device.name())
    c = (upstream.double() * (labels != IGNORE))[:, None]
    for a in range(0, len(hidden), 4096):
        h, part = hidden[a : a + 4096].double(), slice(a, a + 4096)
        g = -(h @ weight.double().T).softmax(-1)[:, :rows]
        g += labels[part, None] == torch.arange(rows, device=device.name())
        found += (g * c[part]).T @ h
    return found


# --- CUDA graphs, waiting for the device ---------------------------------------------------------------------------


def graphs(context) -> Iterator[dict]:
    """Forward and backward captured once give, on replay with other numbers, what a fresh call gives."""
    for objective in ("contrastive", "lambdarank"):
        for packed in (False, True):
            what = f"from logits, {objective}, {'packed' if packed else 'padded'}"
            case = partial(_from_logits, objective, packed)
            yield guarded(f"no waiting, {what}", _without_waiting, case)
            yield guarded(f"graph, {what}", _replayed, case)
    for schedule in (*TRAINING, "score_only", "auto"):
        every_label_counts = partial(_from_hidden, schedule, ignored=False, ignore_index=None)
        yield guarded(f"no waiting, from hidden, {schedule}", _without_waiting, every_label_counts)
        for ignored in (False, True):
            what = f"graph, from hidden, {schedule}, {'ignored tokens' if ignored else 'all tokens count'}"
            exact = not ignored and schedule != "auto"  # which takes another schedule in a graph
            yield guarded(what, _replayed, partial(_from_hidden, schedule, ignored), exact)
    sizes = [[4] * 4, torch.full((4,), 4, device=device.name())]
    for name, list_sizes in zip(("a Python list", "a tensor"), sizes, strict=True):
        row = guarded("", _without_waiting, partial(_from_logits, "listmle", False, list_sizes))
        yield {"what": f"list_sizes as {name}", "waits": not row["ok"], "note": row.get("error", "")}


def _from_logits(objective: str, packed: bool, list_sizes=4):
    """-> tensors to change between replays, and a step that returns loss, logps and gradient."""
    s, t, _, v = shapes().graph
    logits = torch.randn(s, t, v, device=device.name()).bfloat16().requires_grad_()
    labels = _labels(s * t, v).view(s, t)
    borders = {}
    if packed:
        logits, labels = logits.detach().flatten(0, 1).requires_grad_(), labels.flatten()
        borders = {"cu_seqlens": torch.arange(s + 1, device=device.name()) * t}
    changing = {"logits": logits, "labels": labels, "relevance": torch.randn(s, device=device.name())}
    ref = torch.randn(s, device=device.name())

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
    s, t, h, v = shapes().graph
    wanted = WANTED_BY.get(schedule, ("hidden", "weight"))  # auto: all
    hidden = torch.randn(s, t, h, device=device.name()).bfloat16().requires_grad_("hidden" in wanted)
    weight = (torch.randn(v, h, device=device.name()) / 16).bfloat16().requires_grad_("weight" in wanted)
    labels = _labels(s * t, v).view(s, t) if ignored else torch.randint(v, (s, t), device=device.name())
    changing = {"hidden": hidden, "labels": labels, "relevance": torch.randn(s, device=device.name())}

    def step():
        relevance, given = changing["relevance"], {"list_sizes": 4, "objective": "listmle", "beta": BETA, **options}
        out = lk.fused_linear_listwise_loss(hidden, weight, labels, relevance, schedule=schedule, **given)
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
                x.copy_(torch.where(x == IGNORE, x, (x * 7 + 3) % shapes().graph[-1]))


def _replayed(case: Callable, exact: bool = True) -> dict:
    changing, step = case()
    captured, replay = device.captured(step)
    _shuffle(changing)
    replay()
    replayed = [x.clone() for x in captured]
    fresh = step()
    largest = max(_worst(a, b.double()) for a, b in zip(replayed, fresh, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(replayed, fresh, strict=True))
    # Without ignored tokens both walk the same tokens in the same GEMMs. With them the GEMMs differ in shape.
    return {"ok": same if exact else largest < 2e-2, "bitwise": same, "largest relative difference": largest}


def _without_waiting(case: Callable) -> dict:
    _, step = case()
    step()  # compiles
    device.synchronize()
    with device.waiting_is_an_error():
        step()
    return {}


# --- determinism ---------------------------------------------------------------------------------------------------


def determinism(context) -> Iterator[dict]:
    """Bitwise the same numbers in 100 runs, and for a list whatever other lists are in the batch."""
    cases = {f"from logits, {o}": partial(_from_logits, o, False) for o in ("contrastive", "lambdarank", "listnet")}
    cases |= {f"from hidden, {s}": partial(_from_hidden, s, True) for s in (*TRAINING, "score_only")}
    for what, case in cases.items():
        yield guarded(f"{shapes().runs} runs, {what}", _same_every_time, case)
    yield guarded("a list alone and in a larger batch, from logits", _alone_and_in_a_batch)


def _same_every_time(case: Callable) -> dict:
    _, step = case()
    first = [x.clone() for x in step()]
    different = sum(not all(map(torch.equal, first, step())) for _ in range(shapes().runs - 1))
    return {"ok": different == 0, "different": different}


def _alone_and_in_a_batch() -> dict:
    s, t, v = shapes().batch
    logits = torch.randn(s, t, v, device=device.name()).bfloat16()
    labels, relevance = _labels(s * t, v).view(s, t), torch.randn(s, device=device.name())

    def run(a: int, b: int):
        x = logits[a:b].clone().requires_grad_()
        out = lk.fused_listwise_loss(x, labels[a:b], relevance[a:b], list_sizes=4, objective="listmle", reduction="sum")
        return out.logps, *torch.autograd.grad(out.loss, x)

    together = run(0, s)
    wrong = [
        a for a in (0, 20, 60) if not all(torch.equal(x[a : a + 4], y) for x, y in zip(together, run(a, a + 4), strict=True))
    ]
    return {"ok": not wrong, "lists that differ": wrong}
