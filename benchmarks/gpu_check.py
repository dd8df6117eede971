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
from benchmarks.reporting.gpu_run import draw, drawn, merged, summary
from benchmarks.reporting.tables import aligned

NO_GPU = "gpu_check needs a GPU that torch can use, and there is none here: torch.cuda.is_available() is False."


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
    print(drawn(lambda found: "plots: " + " ".join(path.name for path in draw(found, asked.out)), done))
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
