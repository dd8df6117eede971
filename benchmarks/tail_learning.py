"""Does training with `tail_threshold` learn what exact gradients learn? Three worlds, three seeds: a table of docs/numerics.md.

    python benchmarks/tail_learning.py                       # what docs/tail_learning.json does not hold yet
    python benchmarks/tail_learning.py --worlds demo --seeds 0

| world | policy | what is trained | loop |
|---|---|---|---|
| demo | SmolLM2-135M, vocabulary 49152 | the last 4 layers, a frozen head | `python -m larpo.align.demo` |
| naming | two layers, vocabulary 8192 | everything, the head too | none: fixed lists, PRO, as in `larpo.recipes.objectives` |
| naming, frozen head | the same | all but the head | the same |

All arms of a seed start from the same weights. The head of `naming` is too small for a threshold to save time, so that the
library would ignore it; here it acts. The demo samples, which turns on the last bit of a logit: its runs part sooner or later.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import larpo_kernels as lk
from benchmarks.studies import tails

DOCS = Path(__file__).resolve().parents[1] / "docs"
ARMS: dict[str, dict[str, Any]] = {
    "exact": {},
    "2^-12": {"tail_threshold": 2**-12},
    "1e-3": {"tail_threshold": 1e-3},
}
Row = dict[str, Any]


def demo(seed: int, training: dict[str, Any], folder: str) -> Row:
    from larpo import align
    from larpo.align.demo import config

    result = align.run(config(folder, seed=seed, training=training), progress=False)
    first, last = (result.metrics[i]["evaluate"] for i in (0, -1))
    return {"start": first["reward"]["mean"], "reward": last["reward"]["mean"], "kl": last["kl"]["mean"]}


NAMING_VOCAB = 8192  # words of which the task says 34: a head that is large enough for rows to be left out


@cache
def _naming_start(seed: int):
    from larpo.recipes.tasks import naming as task
    from larpo.recipes.tasks import toy_lm

    said = ["name", "and", *task.TOPICS, *task.WORDS]
    tokenizer = toy_lm.tokenizer([*said, *(f"word{i}" for i in range(NAMING_VOCAB - len(said) - 4))])
    return tokenizer, task.start_policy(tokenizer, seed=seed)


def naming(seed: int, training: dict[str, Any], folder: str, *, frozen: bool = False) -> Row:
    """As `larpo.recipes.objectives` runs its arms: equal lists, steps and learning rate, no sampling in between.

    PRO is a sum of contrastive losses and imitates the best candidate. Without that, exact gradients too move all they can
    to the words that are in no list, which a vocabulary of this size has 8158 of.
    """
    from larpo.recipes import objectives
    from larpo.recipes.harness.trainer import train
    from larpo.recipes.tasks import naming as task

    tokenizer, start = _naming_start(seed)
    model, loss = copy.deepcopy(start), objectives.OBJECTIVES["PRO"]
    model.lm_head.requires_grad_(not frozen)
    data = task.lists(tokenizer, 256, 6, seed=1000 + seed)
    settings = dict(max_steps=48, per_device_train_batch_size=16, learning_rate=3e-4, seed=seed, **training)
    train(model, tokenizer, data, loss, **settings)
    held_out = task.lists(tokenizer, 64, 6, seed=2000 + seed)
    test = dict(start=start, tokenizer=tokenizer, held_out=held_out, drawn_per_prompt=64, seed=seed)
    before, after = (objectives.measure(policy, loss, **test) for policy in (start, model))
    return {"start": before["reward"], "reward": after["reward"], "kl": after["kl"]}


WORLDS: dict[str, Callable[[int, dict[str, Any], str], Row]] = {
    "naming": naming,
    "naming, frozen head": partial(naming, frozen=True),
    "demo": demo,
}


def run_one(world: str, arm: str, seed: int) -> Row:
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder, tails.for_small_heads(), lk.TailShares() as shares:
        found = WORLDS[world](seed, ARMS[arm], folder)
    seconds = round(time.process_time() - start)
    return {"world": world, "arm": arm, "seed": seed, **found, "rows kept": shares.rows, "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=DOCS / "tail_learning.json")
    asked = parser.parse_args()
    rows = json.loads(asked.out.read_text()) if asked.out.exists() else []
    done = {(row["world"], row["arm"], row["seed"]) for row in rows}
    for world in asked.worlds:
        for seed in asked.seeds:
            for arm in asked.arms:
                if (world, arm, seed) not in done:
                    rows.append(run_one(world, arm, seed))
                    asked.out.write_text(json.dumps(rows, indent=1) + "\n")
                    print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
