"""Measures launch configurations on the GPU at hand and prints the entry for larpo_kernels/backends/triton/launch.py.

    python benchmarks/tune.py --minutes 6 --out RESULTS

launch.json in that folder is what `benchmarks/gpu_check.py --launch` takes; gpu_check tunes by itself without it.

Groups of parameters are tuned one after the other, each with the winners of those before it. Every candidate is compiled
first, in other processes and without the GPU; one that spills registers is left out. What is timed runs in turns. The
shipped entry wins unless a candidate is faster by more than NOISE.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from itertools import product
from pathlib import Path
from statistics import geometric_mean

import torch

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import calls, device
from benchmarks.gpu.timing import medians
from benchmarks.reporting.tables import aligned
from larpo_kernels.linear import tile_shapes

NO_GPU = "tune needs a GPU that torch can use, and there is none here: torch.cuda.is_available() is False."
NOISE = 0.02  # a candidate must be faster by this share
SCHEDULE_VALUES = ("GPU_TILE_BYTES", "GPU_TILE_TOKENS")  # names in linear/tile_shapes.py; the rest are fields of Launch


@dataclass(frozen=True)
class Group:
    """Parameters that are tuned together: what values each takes, and which combinations make no sense."""

    name: str
    values: dict[str, tuple[int, ...]]
    sensible: Callable[[dict[str, int]], bool] = lambda values: True
    share: float = 0.25  # of the time

    def candidates(self) -> list[dict[str, int]]:
        found = (dict(zip(self.values, chosen, strict=True)) for chosen in product(*self.values.values()))
        return [values for values in found if self.sensible(values)]


GROUPS = (
    Group(
        "rows",
        {"row_block": (2048, 4096, 8192), "row_warps": (4, 8), "row_registers": (64, 128)},
        # elements of a block per thread: fewer are no 16-byte load, more do not fit the registers
        lambda v: 8 <= v["row_block"] // (32 * v["row_warps"]) <= 32,
        share=0.2,
    ),
    Group("split", {"split_columns": (8192, 16384, 32768, 1 << 30)}, share=0.1),
    Group("fill", {"row_programs": (1024, 2048, 4096, 8192)}, share=0.05),
    Group(
        "tile",
        {"tile_span": (256, 512), "tile_rows": (8, 16), "tile_tokens": (256, 512), "tile_warps": (4, 8)},
        lambda v: (
            16 <= v["tile_rows"] * v["tile_tokens"] // (32 * v["tile_warps"]) <= 32 and v["tile_tokens"] >= 64 * v["tile_warps"]
        ),
        share=0.35,
    ),
    Group(
        "schedule",
        {"GPU_TILE_BYTES": (1 << 29, 1 << 30, 1 << 31), "GPU_TILE_TOKENS": (16384,)},
        share=0.25,
    ),
)


# --- a candidate in place of the shipped values ---------------------------------------------------------------------


def shipped(arch: str) -> dict[str, int]:
    from larpo_kernels.backends.triton import launch

    entry = {name: value for name, value in asdict(launch.TABLE[arch]).items() if name != "origin"}
    return entry | {name: getattr(tile_shapes, name) for name in SCHEDULE_VALUES}


def place(values: dict[str, int], arch: str) -> None:
    """Launches and schedules take these values from now on."""
    from larpo_kernels.backends.triton import launch

    entry = launch.TABLE[arch]
    known = {field.name for field in fields(entry)}
    launch.TABLE[arch] = replace(entry, **{name: value for name, value in values.items() if name in known})
    launch.for_device.cache_clear()
    for name in SCHEDULE_VALUES:
        setattr(tile_shapes, name, values.get(name, getattr(tile_shapes, name)))


@contextmanager
def using(values: dict[str, int], arch: str) -> Iterator[None]:
    """Launches and schedules take these values inside."""
    from larpo_kernels.backends.triton import launch

    entry, before = launch.TABLE[arch], {name: getattr(tile_shapes, name) for name in SCHEDULE_VALUES}
    place(values, arch)
    try:
        yield
    finally:
        place(before, arch)
        launch.TABLE[arch] = entry


def under(values: dict[str, int], arch: str, function: Callable) -> Callable:
    """The function, which launches with these values."""

    def run():
        with using(values, arch):
            return function()

    return run


# --- compiling beforehand -------------------------------------------------------------------------------------------

LAUNCHES = {  # group -> kernels of larpo_kernels/inspect/cases.py that its parameters reach
    "rows": ("token_logps_forward/plain", "token_logps_forward/split", "token_logps_backward/plain"),
    "split": ("token_logps_forward/split",),
    "tile": ("exp_tile/plain", "exp_tile/again", "level_spans/plain"),
}


def spills(group: str, values: dict[str, int], arch: str) -> int | None:
    """Compiles the group's kernels with these values into Triton's cache; spilled instructions, None if that failed."""
    from larpo_kernels.inspect.cases import choose
    from larpo_kernels.inspect.crosscompile import compile_case
    from larpo_kernels.inspect.disassembly import read
    from larpo_kernels.inspect.targets import TARGETS

    with using(values, arch):
        try:
            cases = [case for case in choose(LAUNCHES[group], ["bf16"]) if case.aligned]
            kernels = [compile_case(case, TARGETS[arch]) for case in cases]
        except Exception:  # a combination that the compiler refuses is no candidate
            return None
    try:
        return sum(read(kernel.asm).spills for kernel in kernels)
    except Exception:  # nothing here can read machine code: a clock will tell
        return 0


def compiled(groups: tuple[Group, ...], arch: str, deadline: float) -> Iterator[tuple[str, dict]]:
    """(group's name, values) of the candidates that were compiled by then without spilling, as they come."""
    base, context, todo = shipped(arch), multiprocessing.get_context("spawn"), {}
    pool = ProcessPoolExecutor(max(1, min(12, (os.cpu_count() or 2) - 2)), mp_context=context)
    try:
        for group in groups:
            for values in group.candidates()[: 2 if device.dry() else None]:
                if group.name in LAUNCHES and not device.dry():
                    todo[pool.submit(spills, group.name, base | values, arch)] = group.name, values
                else:
                    yield group.name, values
        for future in as_completed(todo, max(0.0, deadline - time.monotonic())):
            if future.result() == 0:
                yield todo[future]
    except TimeoutError:
        return
    finally:
        for process in list((pool._processes or {}).values()):  # none of them has anything to keep
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)


# --- what is timed --------------------------------------------------------------------------------------------------


SIZES = {  # group -> tokens, vocabulary
    "rows": ((8192, 128256), (8192, 32000), (1024, 128256)),
    "split": ((8192, 128256), (64, 128256), (4, 262144)),
    "fill": ((64, 128256), (1024, 128256), (8192, 32000)),
    "tile": ((4096, 128256), (8192, 65536)),
    "schedule": ((8192, 128256), (16384, 32000)),
}


PASSES = {"rows": ("forward", "backward"), "split": ("forward",), "fill": ("backward",)}  # that the parameters reach
SCHEDULES_OF = {"tile": ("frozen_head", "recompute"), "schedule": ("frozen_head", "list_hold", "recompute")}


def problems(group: str) -> Iterator[tuple[str, Callable]]:
    """Named functions whose time the group's parameters decide; made one at a time, for they hold memory."""
    for n, v in ((64, 96),) if device.dry() else SIZES[group]:
        if group in PASSES:
            _, passes = calls.of_rows(n, v, torch.bfloat16)
            yield from ((f"{name} {n} x {v}", passes[name]) for name in PASSES[group])
        else:
            h = 64 if group == "tile" or device.dry() else 4096  # few columns: the GEMM shall not hide the kernels
            inputs = calls.head_inputs(n, h, v)
            yield from ((f"{name} {n} x {v}", calls.of_head(name, *inputs)) for name in SCHEDULES_OF[group])


def measured(group: Group, candidates: list[dict], base: dict[str, int], arch: str, deadline: float) -> list[dict]:
    """Rows {values, seconds by problem, ratio to the first candidate}, the fastest first, of the problems in time.

    A candidate that raises, or that was not reached in time, is left out from then on.
    """
    seconds, alive = [{} for _ in candidates], set(range(len(candidates)))
    for name, function in problems(group.name):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        runs = {str(i): under(base | candidates[i], arch, function) for i in sorted(alive)}
        found = medians(runs, rounds=9, budget_s=min(left / 2, 10.0), warm_s=left / 2, failed={})
        alive = {int(i) for i in found}
        if 0 not in alive:  # nothing to compare with
            return []
        for i, value in found.items():
            seconds[int(i)][name] = value
        device.release()
    return ranked([candidates[i] for i in sorted(alive)], [seconds[i] for i in sorted(alive)])


def ranked(candidates: list[dict], seconds: list[dict[str, float]]) -> list[dict]:
    """By the geometric mean over problems of the time against the first candidate's; nothing measured: no order."""
    if not seconds or not seconds[0]:
        return []
    ratios = [geometric_mean([times[name] / seconds[0][name] for name in times]) for times in seconds]
    found = [
        {"values": values, "seconds": times, "ratio": ratio}
        for values, times, ratio in zip(candidates, seconds, ratios, strict=True)
    ]
    return sorted(found, key=lambda row: row["ratio"])


def winner(rows: list[dict], current: dict[str, int]) -> dict[str, int]:
    """The fastest candidate if it beats the current values by more than noise, else the current values."""
    best = min(rows, key=lambda row: row["ratio"], default=None)
    return best["values"] if best is not None and best["ratio"] < 1 - NOISE else current


# --- what is printed ------------------------------------------------------------------------------------------------


def table(group: Group, rows: list[dict], most: int = 8) -> str:
    if not rows:
        return f"{group.name}: not measured, the time limit was reached; shipped values stay"
    names, timed = list(group.values), list(rows[0]["seconds"])
    body = [
        [f"{row['ratio']:.3f}", *(str(row["values"][n]) for n in names), *(f"{row['seconds'][p] * 1e3:.3f}" for p in timed)]
        for row in rows[:most]
    ]
    return f"{group.name}: {len(rows)} candidates, time against the shipped values, ms\n" + aligned(
        [["ratio", *names, *timed], *body]
    )


def entry(arch: str, values: dict[str, int], origin: str) -> str:
    """A line of launch.TABLE, and lines of linear/tile_shapes.py."""
    launch = {name: value for name, value in values.items() if name not in SCHEDULE_VALUES}
    line = f'    "{arch}": Launch({", ".join(f"{name}={value}" for name, value in launch.items())}, origin="{origin}"),'
    return "\n".join([line, *(f"{name} = {_bytes(values[name])}  # {origin}" for name in SCHEDULE_VALUES)])


def _bytes(value: int) -> str:
    return f"1 << {int(math.log2(value))}" if value > 1 << 20 and value & (value - 1) == 0 else str(value)


def arch_here() -> str:
    from larpo_kernels.backends.triton import launch

    if device.dry():
        return "sm_90"
    used = launch.for_device(torch.cuda.current_device())
    return next(name for name, known in launch.TABLE.items() if known is used)


# --- the whole ------------------------------------------------------------------------------------------------------


def read(file: Path | None, arch: str) -> dict[str, int]:
    """Values of a launch.json for this architecture; none where there is no such file, or it is for another one."""
    if file is None or not file.exists():
        return {}
    found = json.loads(file.read_text())
    known = shipped(arch)
    return {name: value for name, value in found["chosen"].items() if name in known} if found["arch"] == arch else {}


def apply(file: Path | None) -> None:
    """This process launches as launch.json says."""
    arch = arch_here()
    place(read(file, arch), arch)


def tuned(seconds: float, file: Path, candidates: Callable[[str], list[dict]], only: list[str] | None = None) -> Iterator[dict]:
    """A row for each group of parameters; the winners so far are in the file after each.

    candidates(group's name): values that are compiled.
    """
    arch, end = arch_here(), time.monotonic() + seconds
    chosen, changed = shipped(arch), {}
    file.parent.mkdir(parents=True, exist_ok=True)
    groups = [g for g in GROUPS if (not only or g.name in only) and set(g.values) <= set(chosen)]
    for i, group in enumerate(groups):
        deadline = time.monotonic() + (end - time.monotonic()) * group.share / sum(g.share for g in groups[i:])
        own = {name: chosen[name] for name in group.values}
        others = [values for values in candidates(group.name) if values != own]
        rows = measured(group, [own, *others], chosen, arch, deadline)
        if rows:
            best = winner(rows, own)
            chosen |= best
            changed |= {name: value for name, value in best.items() if value != own[name]}  # of what was shipped
        origin = f"measured, {device.card()}, {date.today()}"
        found = {"arch": arch, "origin": origin, "chosen": chosen, "changed": changed}
        file.write_text(json.dumps(found, indent=1) + "\n")
        yield {
            "what": group.name,
            "compiled": len(others),
            "measured": len(rows),
            "chosen": {name: chosen[name] for name in own},
            "text": table(group, rows),
            "rows": rows[:8],
        }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6, help="for everything (default 6)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder for launch.json")
    parser.add_argument("--only", action="append", choices=[group.name for group in GROUPS], help="a group of parameters")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    end, arch, file = time.monotonic() + 60 * asked.minutes, arch_here(), asked.out / "launch.json"
    groups = tuple(group for group in GROUPS if not asked.only or group.name in asked.only)
    ahead = defaultdict(list)
    for group, values in compiled(groups, arch, time.monotonic() + 60 * asked.minutes / 3):
        ahead[group].append(values)
    for row in tuned(end - time.monotonic(), file, ahead.__getitem__, asked.only):
        print(row["text"], end="\n\n", flush=True)
    found = json.loads(file.read_text())
    print(entry(arch, found["chosen"], found["origin"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
