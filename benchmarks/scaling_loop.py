"""Time of an iteration of `larpo align` on paper: docs/scaling.md. A model, not a measurement.

python benchmarks/scaling_loop.py                    # prints the tables
python benchmarks/scaling_loop.py --write            # and puts them into docs/
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import scaling
from benchmarks.reporting.tables import aligned, as_markdown, filled
from benchmarks.scaling import HALF, Machine, Policy, Work

BATCH = (128, 8)  # lists of an update, candidates of each
GPUS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Iteration:
    """What an iteration does."""

    prompts: int = 1024
    k: int = 8
    tokens: int = 512  # of a prompt, and of a completion
    held_out: int = 128
    held_out_k: int = 4
    epochs: int = 2


@dataclass(frozen=True)
class Engine:
    """What samples. A copy of the policy is on `gpus` of them, and generates `rows` completions at a time."""

    name: str
    gpus: int
    rows: int
    host: float  # seconds that the host takes for a layer of a step: launches of kernels, Python
    hbm: float = 0.7 * 4.8e12  # bytes/s of memory on an H200, 70 % of its peak: assumed


TRANSFORMERS = Engine("transformers", gpus=1, rows=64, host=4e-4)
SERVER = Engine("server, 8 GPUs a copy", gpus=8, rows=256, host=0.0)
LOADING = 2e9  # bytes/s at which the GPUs of a node read weights, or the first process writes them: assumed


def sampling(policy: Policy, engine: Engine, machine: Machine, gpus: int, completions: int, tokens: int) -> float:
    """Seconds: copies take batches in turn; a batch reads its prompts, and then takes a step for each new token."""
    rounds = -(-completions // (engine.rows * max(1, gpus // engine.gpus)))
    prefill = 2 * engine.rows * tokens * policy.parameters / machine.layers / engine.gpus
    cache = 2 * HALF * policy.key_values * policy.layers * engine.rows * 1.5 * tokens  # half of the new tokens, on average
    step = max((HALF * policy.parameters + cache) / engine.gpus / engine.hbm, policy.layers * engine.host)
    over_gpus = 0.0 if engine.gpus == 1 else 4 * policy.layers * machine.hop * (engine.gpus - 1)  # two sums a layer
    return rounds * (prefill + tokens * (step + over_gpus))


def forwards(policy: Policy, machine: Machine, gpus: int, completions: int, tokens: int) -> float:
    return 2 * completions * 2 * tokens * policy.parameters / machine.layers / gpus


def stages(policy: Policy, engine: Engine, machine: Machine, gpus: int, what: Iteration) -> dict[str, float]:
    """Seconds of each stage, lists aside. The reward is a classifier of 7B on each GPU; the policy is trained under FSDP2."""
    judge = scaling.POLICIES[0]
    completions, held_out = what.prompts * what.k, what.held_out * what.held_out_k
    update = scaling.step(policy, Work.of(gpus, *BATCH), machine, gpus, "FSDP2").seconds
    load = HALF * policy.parameters / LOADING
    return {
        "sample": load + sampling(policy, engine, machine, gpus, completions, what.tokens),
        "score": forwards(judge, machine, gpus, completions, what.tokens),
        "train": load + what.epochs * what.prompts / BATCH[0] * update + 2 * load,  # written in float32
        "evaluate": 2 * load
        + sampling(policy, engine, machine, gpus, held_out, what.tokens)
        + forwards(judge, machine, gpus, held_out, what.tokens)
        + 2 * forwards(policy, machine, gpus, held_out, what.tokens),
    }


def table(policy: Policy, engine: Engine, machine: Machine, what: Iteration) -> list[list[str]]:
    columns = [stages(policy, engine, machine, gpus, what) for gpus in GPUS]
    lines = [["GPUs", *columns[0], "minutes"]]
    for gpus, column in zip(GPUS, columns, strict=True):
        cells = [*(f"{s:.0f} s" for s in column.values()), f"{sum(column.values()) / 60:.1f}"]
        fits = scaling.step(policy, Work.of(gpus, *BATCH), machine, gpus, "FSDP2").memory <= machine.memory
        lines.append([str(gpus), *(cells if fits else [f"({cell})" for cell in cells])])
    return lines


def tables(machine: Machine, what: Iteration) -> dict[str, list[list[str]]]:
    small, large = scaling.POLICIES
    asked = {"7B-transformers": (small, TRANSFORMERS), "7B-server": (small, SERVER), "70B-server": (large, SERVER)}
    return {name: table(policy, engine, machine, what) for name, (policy, engine) in asked.items()}


def written(text: str, found: dict[str, list[list[str]]]) -> str:
    """The page with its tables made anew."""
    for name, rows in found.items():
        text = filled(text, f"loop:{name}", as_markdown(rows, "---:"))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = Iteration()
    parser.add_argument("--prompts", type=int, default=what.prompts, help="of an iteration")
    parser.add_argument("--tokens", type=int, default=what.tokens, help="of a prompt, and of a completion")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/")
    asked = parser.parse_args()
    found = tables(Machine(), Iteration(prompts=asked.prompts, tokens=asked.tokens))
    for name, rows in found.items():
        print(f"{name}\n{aligned(rows)}\n")
    if asked.write:
        page = scaling.DOCS / "scaling.md"
        page.write_text(written(page.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
