"""Everything that only a GPU can show, in one command: right, capturable, deterministic, and how fast.

    python benchmarks/gpu_check.py --minutes 9 --out RESULTS

Made for a bare machine: torch, Triton and pytest are enough. What matters most comes first, each step is a process of its
own, results.json is written after every step, and the table comes last; so a time limit costs only what had not begun.
Other libraries are measured where they are installed, or found in the folder given by --peers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.steps import ROOT, Step, run, write_rows
from benchmarks.reporting.by_shape import by_shape
from benchmarks.reporting.tables import aligned, plain

NO_GPU = "gpu_check needs a GPU that torch can use, and there is none here: torch.cuda.is_available() is False."
LAST_S = 15  # seconds kept for plots and tables

# name: module of benchmarks.gpu with a generator of that name, seconds it may take, what it shows
STEPS = {
    "tests": ("correct", 150, "the kernel tests, on the GPU"),
    "big": ("correct", 60, "more than 2^31 elements and more than 65,535 rows"),
    "graphs": ("correct", 60, "no waiting for the device; CUDA graphs, forward and backward"),
    "rows": ("speed", 60, "from logits, against copying as many bytes"),
    "linear": ("speed", 75, "from hidden and weight, against the GEMMs alone"),
    "determinism": ("correct", 60, "the same numbers in 100 runs, and in any batch"),
    "profile": ("speed", 40, "kernels by time"),
    "suites": ("speed", 240, "against eager, torch.compile and installed libraries"),
    "prefix": ("speed", 60, "a prompt that runs once for its candidates, against separate rows"),
}


def steps(only: list[str] | None) -> list[Step]:
    command = [sys.executable, str(Path(__file__).resolve()), "--step"]
    return [Step(name, what, [*command, name], s) for name, (_, s, what) in STEPS.items() if not only or name in only]


def rows_of(step: str):
    module = importlib.import_module(f"benchmarks.gpu.{STEPS[step][0]}")
    return getattr(module, step)()


# --- results -------------------------------------------------------------------------------------------------------


def record(results, folder: Path, header: dict, say=print) -> list[dict]:
    """Collects results of steps, on disk after each one; suites also in the form that benchmarks/report.py reads."""
    done = []
    for result in results:
        done.append(result)
        say(f"{result['step']}: {result['status']}, {result['seconds']:.0f} s {result['message']}")
        (folder / "results.json").write_text(json.dumps({**header, "steps": done}, indent=1) + "\n")
        tables = [row["table"] for row in result["rows"] if "table" in row]
        if tables:
            (folder / "suites.json").write_text(json.dumps({**header, "tables": tables}, indent=1) + "\n")
    return done


def summary(done: list[dict]) -> str:
    """Tables of what was measured, the most important ones and a line for each step last."""
    results = {result["step"]: result["rows"] for result in done}
    drawn = [table(results[step]) for step, table in TABLES.items() if results.get(step)]
    lines = [[r["step"], r["status"], f"{r['seconds']:.0f} s"] for r in done]
    table = aligned([["step", "status", "time"], *lines]).splitlines()
    said = ["", *(_says(result) for result in done)]
    return "\n\n".join([*drawn, "\n".join(f"{line}  {text}".rstrip() for line, text in zip(table, said, strict=True))])


def _says(result: dict) -> str:
    rows, said = result["rows"], [result["message"][:150]] if result["message"] else []
    checks = [row for row in rows if "ok" in row]
    if result["step"] == "tests" and rows:
        said.append(", ".join(f"{rows[-1][what]} {what}" for what in ("passed", "skipped", "failed") if what in rows[-1]))
    elif checks:
        said.append(f"{sum(row['ok'] for row in checks)} of {len(checks)} checks")
    elif rows:
        said.append(f"{len(rows)} measured")
    return "; ".join(said)


def _suites(rows: list[dict]) -> str:
    few = ["provider", "time", "time, eager = 1", "GEMMs alone / time", "GB/s", "peak", "logps", "d logits", "d hidden"]
    return "\n\n".join(plain(row["table"], few) for row in rows)


def _profile(rows: list[dict]) -> str:
    cells = [(r["what"], k) for r in rows for k in r["kernels"][:5]]
    lines = [[f"{what}: {k['kernel'][:60]}", f"{k['ms']:.2f} ms", f"{k['launches']} x"] for what, k in cells]
    return "Where the time goes\n" + aligned([["kernel", "time", "launches"], *lines])


def _linear(rows: list[dict]) -> str:
    names = ["TFLOP/s", "GEMMs TFLOP/s", "GEMMs alone / time"]
    lines = [
        [_head_name(r), f"{r['seconds'] * 1e3:.2f}", *(_short(r[name]) for name in names), f"{r['peak bytes'] / 1e9:.2f}"]
        for r in rows
    ]
    head = f"Head, forward and backward: H {rows[0]['H']}, V {rows[0]['V']}, bfloat16\n"
    return head + aligned([["tokens, schedule", "ms", *names, "peak GB"], *lines])


def _rows(rows: list[dict]) -> str:
    names = ["forward GB/s", "forward of copy", "backward GB/s", "backward of copy", "copy GB/s"]
    lines = [[f"{r['T']} x {r['V']} {r['dtype']}", *(_short(r[name]) for name in names)] for r in rows]
    return "From logits: bandwidth, and its share of what copying as many bytes reaches\n" + aligned(
        [["logits", *names], *lines]
    )


def _prefix(rows: list[dict]) -> str:
    return "A prompt run once\n" + aligned(by_shape([row["table"] for row in rows]))


TABLES = {
    "prefix": _prefix,
    "suites": _suites,
    "profile": _profile,
    "linear": _linear,
    "rows": _rows,
}  # in the order they are printed


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def _head_name(row: dict) -> str:
    return f"{row['T']}{' - ' + str(row['ignored']) if row['ignored'] else ''}, {row['schedule']}"


# --- plots ---------------------------------------------------------------------------------------------------------


def draw(done: list[dict], folder: Path) -> list[Path]:
    """Bandwidth of the rows and rate of the head, if they were measured and matplotlib is there."""
    rows = {r["step"]: r["rows"] for r in done}
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return []
    files = []
    if bf16 := [r for r in rows.get("rows", []) if r["dtype"] == "bfloat16"]:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
        for axis, which in zip(axes, ("forward", "backward"), strict=True):
            for v in sorted({r["V"] for r in bf16}):
                line = sorted((r["T"], 100 * r[f"{which} of copy"]) for r in bf16 if r["V"] == v)
                axis.plot(*zip(*line, strict=True), "o-", label=f"V {v}")
            axis.set(xscale="log", title=which, xlabel="tokens", ylabel="% of measured copy bandwidth", ylim=(0, 110))
            axis.grid(alpha=0.3)
        axes[1].legend()
        files.append(_save(figure, folder / "rows.png"))
    if head := [r for r in rows.get("linear", []) if not r["ignored"]]:
        figure, axis = plt.subplots(figsize=(9, 4))
        names = [_head_name(r) for r in head][::-1]
        axis.barh(names, [r["GEMMs TFLOP/s"] for r in head][::-1], color="lightgrey", label="its GEMMs alone")
        axis.barh(names, [r["TFLOP/s"] for r in head][::-1], height=0.5, color="tab:blue", label="ours")
        axis.set(xlabel="TFLOP/s")
        axis.legend()
        files.append(_save(figure, folder / "head.png"))
    return files


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    return path


# --- command -------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """0: all that ran is right. 1: something failed. 2: no GPU, nothing was run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="for everything (default 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/out", help="folder for results.json, log and plots")
    parser.add_argument("--only", action="append", choices=list(STEPS), help="a step; may be given several times")
    parser.add_argument("--peers", type=Path, help="folder with other libraries, added to PYTHONPATH if it exists")
    parser.add_argument("--show", type=Path, help="a recorded results.json: print its tables and run nothing")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("file", nargs="?", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.step:
        write_rows(rows_of(asked.step), asked.file)
        return 0
    if asked.show:
        print(summary(json.loads(asked.show.read_text())["steps"]))
        return 0
    import torch

    if not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    from benchmarks.core import machine

    start = time.monotonic()
    asked.out.mkdir(parents=True, exist_ok=True)
    paths = [
        str(ROOT),
        *([str(asked.peers.resolve())] if asked.peers and asked.peers.is_dir() else []),
        os.environ.get("PYTHONPATH"),
    ]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    header = machine.header("cuda")
    seconds = 60 * asked.minutes - LAST_S
    log = asked.out / "log.txt"
    done = record(run(steps(asked.only), seconds, log, environment), asked.out, header)
    files = [asked.out / "results.json", log, *draw(done, asked.out)]
    print(f"\n{header['machine']['gpu']}, torch {torch.__version__}, {time.monotonic() - start:.0f} s")
    print(f"wrote {', '.join(map(str, files))}\n")
    print(summary(done))
    return int(any(result["status"] == "failed" for result in done))


if __name__ == "__main__":
    sys.exit(main())
