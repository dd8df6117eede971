"""Everything that only a GPU can show, in one command: right, tuned, how fast against whom, capturable, deterministic.

    python benchmarks/gpu_check.py --minutes 7.75 --out RESULTS

Made for a bare machine and a short time: torch, Triton and pytest are enough. What matters most comes first
(benchmarks/gpu/plan.py), each step is a process of its own that imports while the one before it measures, what it finds is on
disk at once, and the table comes last; so a time limit costs only what had not begun. Other libraries are measured where they
are installed, or found in the folder given by --peers. --dry-run runs every step on a CPU with tiny shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import BEGIN, device, plan
from benchmarks.gpu.steps import ROOT, run, wait_to_go, write_rows
from benchmarks.reporting.by_shape import by_shape
from benchmarks.reporting.tables import aligned, cells, shown

NO_GPU = "gpu_check needs a GPU that torch can use, and there is none here: torch.cuda.is_available() is False."
MOST_CHARACTERS = 9_500  # of what is printed last: some terminals keep no more


# --- results -------------------------------------------------------------------------------------------------------


def record(results, folder: Path, header: dict, say=print) -> list[dict]:
    """Collects results of steps, on disk after each one; tables also in the form that benchmarks/report.py reads."""
    done = []
    for result in results:
        done.append(result)
        say(f"{result['step']}: {result['status']}, {result['seconds']:.0f} s {result['message'][:150]}")
        sys.stdout.flush()
        _write(folder / "results.json", {**header, "steps": done})
        if tables := merged(done):
            _write(folder / "suites.json", {**header, "tables": tables})
    return done


def _write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def merged(done: list[dict]) -> list[dict]:
    """One table a case, side and mode, of the rows that several steps measured."""
    found = {}
    for table in (row["table"] for result in done for row in result["rows"] if "table" in row):
        key = tuple(table[name] for name in ("case", "side", "mode", "dtype"))
        if key in found:
            known = {row["provider"] for row in found[key]["rows"]}
            rows = [*found[key]["rows"], *(row for row in table["rows"] if row["provider"] not in known)]
            found[key] = {**found[key], "rows": rows}
        else:
            found[key] = table
    return list(found.values())


def summary(done: list[dict], most: int = MOST_CHARACTERS) -> str:
    """Tables of what was measured, the most important ones and a line for each step last; cut at the top if too long."""
    found = {result["step"]: [row for row in result["rows"] if row.get("ok", True)] for result in done}
    drawn = [_drawn(table, rows) for step, table in TABLES.items() if (rows := found.get(step))]
    if tables := merged(done):
        drawn.append(_drawn(_cases, tables))
    text = "\n\n".join([*drawn, _steps(done)])
    return text if len(text) <= most else f"...{text[-most:]}"


def _drawn(table, rows: list[dict]) -> str:
    try:
        return table(rows)
    except Exception as error:  # minutes of a GPU lie behind the other tables
        return f"{table.__name__.strip('_')}: could not be drawn, {type(error).__name__}: {error}"


def _steps(done: list[dict]) -> str:
    """Steps that are fine and were made for others alone are left out."""
    shown = [r for r in done if r["status"] != "ok" or not r["step"].startswith("ahead")]
    table = aligned([["step", "status", "time"], *([r["step"], r["status"], f"{r['seconds']:.0f} s"] for r in shown)])
    said = ["", *map(_says, shown)]
    return "\n".join(f"{line}  {text}".rstrip() for line, text in zip(table.splitlines(), said, strict=True))


def _says(result: dict) -> str:
    rows, said = result["rows"], [result["message"][:120]] if result["message"] else []
    checks = [row for row in rows if "ok" in row]
    if result["step"] == "tests" and rows:
        said.append(", ".join(f"{rows[-1][what]} {what}" for what in ("passed", "skipped", "failed") if what in rows[-1]))
    elif result["step"] == "tune" and rows:
        said.append("; ".join(", ".join(f"{name} {value}" for name, value in row["chosen"].items()) for row in rows))
    elif tables := [row["table"] for row in rows if "table" in row]:
        said += [f"{r['provider']}: {r['status']} {r['message'][:120]}" for t in tables for r in t["rows"] if _worth_saying(r)]
        said.append(f"{len(tables)} tables")
    elif checks:
        said.append(f"{sum(row['ok'] for row in checks)} of {len(checks)} checks")
    elif rows:
        said.append(f"{len(rows)} measured")
    return "; ".join(said)


def _worth_saying(row: dict) -> bool:
    return bool(row["message"]) and (row["status"] != "not run" or "not installed" in row["message"])


def _cases(tables: list[dict]) -> str:
    """A line a provider, the fastest first."""
    names = ["time", "eager = 1", "of GEMMs", "peak", "logps", "gradient"]
    found, prefixes = [], [table for table in tables if table["side"] == "prefix"]
    for table in (table for table in tables if table["side"] != "prefix"):
        found.append([f"{table['side']}, {table['mode']}: {table['case']}", *[""] * len(names)])
        for row in (row for row in shown(table) if row["status"] != "not run"):
            text = cells(table, row)
            worst = max((e for name, e in row["errors"].items() if name.startswith("d_") and e is not None), default=None)
            line = [text["time"], text["time, eager = 1"], text["GEMMs alone / time"], text["peak"], text["logps"]]
            found.append([f"  {text['provider']}"[:44], *line, "" if worst is None else f"{worst:.1e}"])
    drawn = [aligned([["case and provider", *names], *found])] if found else []
    if prefixes:
        drawn.insert(0, "A prompt run once\n" + aligned(by_shape(prefixes)))
    return "\n\n".join(drawn)


def _profile(rows: list[dict]) -> str:
    found = [(r["what"], k) for r in rows for k in r["kernels"][:5]]
    lines = [[f"{what}: {k['kernel'][:44]}", f"{k['ms']:.2f} ms", f"{k['launches']} x"] for what, k in found]
    return "Where the time goes\n" + aligned([["kernel", "time", "launches"], *lines])


def _head(rows: list[dict]) -> str:
    names = ["ms", "TFLOP/s", "GEMMs TFLOP/s", "time / GEMMs alone", "host ms", "peak GB"]
    lines = [
        [
            f"{_head_name(r)}, {r['launch']}",
            f"{r['seconds'] * 1e3:.2f}",
            _short(r["TFLOP/s"]),
            _short(r["GEMMs TFLOP/s"]),
            f"{r['time / GEMMs alone']:.3f}",
            f"{r['on the host'] * 1e3:.2f}",
            f"{r['peak bytes'] / 1e9:.2f}",
        ]
        for r in rows
    ]
    return "Head, forward and backward, bfloat16\n" + aligned([["tokens x H x V, schedule", *names], *lines])


def _rows(rows: list[dict]) -> str:
    names = ["forward GB/s", "of copy", "backward GB/s", "of copy", "copy GB/s", "host us"]
    lines = [
        [
            f"{r['T']} x {r['V']} {r['dtype']}, {r['launch']}",
            _short(r["forward GB/s"]),
            f"{r['forward of copy']:.2f}",
            _short(r["backward GB/s"]),
            f"{r['backward of copy']:.2f}",
            _short(r["copy GB/s"]),
            f"{(r['forward on the host'] + r['backward on the host']) * 1e6:.0f}",
        ]
        for r in rows
    ]
    return "From logits: bandwidth, and its share of what copying as many bytes reaches\n" + aligned(
        [["logits", *names], *lines]
    )


TABLES = {"profile": _profile, "rows": _rows, "head": _head}  # in the order they are printed


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def _head_name(row: dict) -> str:
    return f"{row['T']}{' - ' + str(row['ignored']) if row['ignored'] else ''} x {row['H']} x {row['V']}, {row['schedule']}"


# --- plots ---------------------------------------------------------------------------------------------------------


def draw(done: list[dict], folder: Path) -> list[Path]:
    """Bandwidth of the rows and rate of the head, if they were measured and matplotlib is there."""
    rows = {r["step"]: [row for row in r["rows"] if row.get("ok", True)] for r in done}
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return []
    files = []
    if bf16 := [r for r in _best_launch(rows.get("rows", [])) if r["dtype"] == "bfloat16"]:
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
        for axis, which in zip(axes, ("forward", "backward"), strict=True):
            for v in sorted({r["V"] for r in bf16}):
                line = sorted((r["T"], 100 * r[f"{which} of copy"]) for r in bf16 if r["V"] == v)
                axis.plot(*zip(*line, strict=True), "o-", label=f"V {v}")
            axis.set(xscale="log", title=which, xlabel="tokens", ylabel="% of measured copy bandwidth", ylim=(0, 110))
            axis.grid(alpha=0.3)
        axes[1].legend()
        files.append(_save(figure, folder / "rows.png"))
    if head := [r for r in _best_launch(rows.get("head", [])) if not r["ignored"]]:
        figure, axis = plt.subplots(figsize=(9, 1 + len(head) / 3))
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


def _best_launch(rows: list[dict]) -> list[dict]:
    """Those of the tuned launches where there are any."""
    return [r for r in rows if r["launch"] == rows[-1]["launch"]]


# --- command -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--minutes", type=float, default=plan.MINUTES, help=f"for everything (default {plan.MINUTES})")
    found.add_argument("--out", type=Path, default=ROOT / "benchmarks/out", help="folder for what is found, 8 files at most")
    found.add_argument("--only", action="append", help="steps whose name has this word; may be given several times")
    found.add_argument("--peers", type=Path, help="folder with other libraries")
    found.add_argument("--launch", type=Path, help="launch.json of an earlier run or of tune.py: nothing is tuned")
    found.add_argument("--commit", help="what is measured, where the files are no git checkout")
    found.add_argument("--dry-run", action="store_true", help="every step on a CPU with tiny shapes: figures mean nothing")
    found.add_argument("--plan", action="store_true", help="print the steps and their seconds, run nothing")
    found.add_argument("--show", type=Path, help="a recorded results.json: print its tables and run nothing")
    for hidden, kind in (("--step", str), ("--seconds", float), ("--rows", Path)):
        found.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    return found


def refused(asked) -> str | None:
    """What is wrong with the arguments."""
    if 60 * asked.minutes <= plan.LAST_S:
        return f"--minutes: got {asked.minutes:g}, expected more than the {plan.LAST_S} seconds that tables take"
    if asked.launch and not asked.launch.is_file():
        return f"--launch: got {asked.launch}, expected a launch.json; there is no such file"
    if asked.peers and not asked.peers.is_dir():
        return f"--peers: got {asked.peers}, expected a folder; there is none"
    for word in asked.only or ():
        if not any(word in one.name for one in plan.plan()):
            return f"--only: got {word!r}, expected a word of a step's name, as --plan prints them"
    return None


def one_step(asked) -> int:
    """What a step's process does."""
    (planned,) = (one for one in plan.plan() if one.name == asked.step)
    planned.load()
    wait_to_go(sys.stdin)
    context = plan.Context(asked.rows, asked.launch, asked.seconds)
    if not asked.step.startswith(("smoke", "ahead", "tune", "rows", "head")):  # rows and head measure both
        from benchmarks import tune

        tune.apply(asked.launch)
    write_rows(planned.rows(context), asked.rows, asked.step)
    return 0


def described(asked) -> dict:
    """The head of the recorded files."""
    from benchmarks.core import machine

    if asked.peers:
        sys.path.append(str(asked.peers))  # versions are found there
    header = machine.header(device.name())
    if asked.commit:
        header["git"] = {"commit": asked.commit, "dirty": None}
    return {**header, "command": f"gpu_check --minutes {asked.minutes:g}"}


def check(asked, start=None, begin: float = BEGIN) -> int:
    """Runs the plan. 0: all that ran is right. 1: something failed."""
    asked.out.mkdir(parents=True, exist_ok=True)
    rows, log = asked.out / "rows.jsonl", asked.out / "log.txt"
    for file in (rows, log):
        file.unlink(missing_ok=True)
    launch = asked.launch or asked.out / "launch.json"
    command = [sys.executable, str(Path(__file__).resolve()), "--rows", str(rows.resolve()), "--launch", str(launch.resolve())]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Inductor's pool of compilers takes longer to start than the few kernels here to compile.
    environment = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    steps = plan.steps([*command, "--step"], asked.minutes, asked.only, environment, asked.peers)
    if asked.launch:
        steps = [step for step in steps if step.name not in ("tune", "ahead: launches")]
    else:
        launch.unlink(missing_ok=True)  # an earlier run's
    header, spent = described(asked), time.monotonic() - begin
    done = record(run(steps, 60 * asked.minutes - plan.LAST_S - spent, rows, log, start), asked.out, header)
    print(_drawn(lambda found: "plots: " + " ".join(path.name for path in draw(found, asked.out)), done))
    (asked.out / "table.txt").write_text(summary(done, most=10**9) + "\n")
    print(f"\n{device.card()}, commit {header['git']['commit']}, {time.monotonic() - begin:.0f} s; wrote {asked.out}\n")
    print(summary(done), flush=True)
    return int(any(result["status"] == "failed" for result in done))


def main(arguments: list[str] | None = None) -> int:
    """0: all that ran is right. 1: something failed. 2: no GPU, nothing was run."""
    asked = parser().parse_args(arguments)
    if asked.dry_run:
        os.environ[device.DRY_RUN] = "1"
    if asked.step:
        return one_step(asked)
    if asked.show:
        print(summary(json.loads(asked.show.read_text())["steps"]))
        return 0
    if asked.plan:
        print(aligned([["step", "seconds", "beside"], *([o.name, f"{o.seconds:g}", "x" * o.beside] for o in plan.plan())]))
        print(f"{plan.planned_seconds():g} s, and {plan.LAST_S} s for tables and plots")
        return 0
    if message := refused(asked):
        parser().error(message)
    import torch

    if not asked.dry_run and not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    return check(asked)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    if "--step" in sys.argv:
        os._exit(status)  # all is on disk: what libraries do at exit takes seconds
    sys.exit(status)
