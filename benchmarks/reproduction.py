"""Six findings of the paper at a small scale: each a few arms of `larpo align`, several seeds, one figure per arm and seed.

    python benchmarks/reproduction.py --seeds 0 --seeds 1 --seeds 2 --jobs 2

The policy is a language model of 2 M parameters (benchmarks/studies/tiny_lm.py), the reward a sentiment classifier, the prompts
openings of film reviews. Arms differ from the base by the settings named. Runs are kept and resumed in --runs; their
figures go to docs/reproduction.json, from which tables and plots are drawn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reporting.tables import as_markdown

DOCS = Path(__file__).resolve().parents[1] / "docs"

BASE: dict[str, Any] = {
    "prompts": "imdb",
    "reward": "imdb_sentiment",
    "iterations": 3,
    "prompts_per_iteration": 32,
    "k": 8,
    "max_new_tokens": 16,
    "memory": "none",
    "subset": "all",
    "eval_prompts": 48,
    "eval_k": 8,
    "solved_above": 1.0,
    "sample_batch_size": 256,
    "chunk_size": 64,
    "model_init_kwargs": {"dtype": "float32"},
    "keep_models": "last",
    "training": {
        "objective": "contrastive",
        "beta": 0.1,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "logging_steps": 4,
        "save_strategy": "no",
        "use_cpu": True,
    },
}

ARMS: dict[str, dict[str, Any]] = {
    "contrastive, k = 8": {},
    "best against worst of 8": {"baseline": "dpo", "subset": "paper", "training.objective": "pairwise"},
    "ListMLE": {"training.objective": "listmle"},
    "LambdaRank": {"training.objective": "lambdarank"},
    "k = 2": {"k": 2},
    "k = 4": {"k": 4},
    "k = 16": {"k": 16},
    "1 against 3": {"subset": [1, 3]},
    "memory: previous": {"memory": "previous", "subset": [1, 3]},
    "memory: all": {"memory": "all", "subset": [1, 3]},
    "negatives: random": {"negatives": "random", "subset": [1, 3]},
    "negatives: related": {"negatives": "related", "subset": [1, 3]},
    "negatives: hard": {"negatives": "hard", "subset": [1, 3]},
    "temperature 0.4": {"temperatures": 0.4},
    "temperature 0.7": {"temperatures": 0.7},
    "temperature 1.3": {"temperatures": 1.3},
    "temperature 1.6": {"temperatures": 1.6},
}
CURVES = "Recall@N"  # of the initial model only

FINDINGS = {
    "1. Objectives, equal generations": ["best against worst of 8", "contrastive, k = 8", "ListMLE", "LambdaRank"],
    "2. Candidates per prompt": ["k = 2", "k = 4", "contrastive, k = 8", "k = 16"],
    "3. Memory": ["1 against 3", "memory: previous", "memory: all"],
    "4. Negatives": ["negatives: random", "negatives: related", "1 against 3", "negatives: hard"],
    "5. Temperature": ["temperature 0.4", "temperature 0.7", "contrastive, k = 8", "temperature 1.3", "temperature 1.6"],
}


def settings(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """Of one run, as `larpo.align.load_config` takes them."""
    from benchmarks.studies import tiny_lm

    values = {**BASE, "model": str(tiny_lm.folder()), "seed": seed, "output_dir": str(folder)}
    if arm == CURVES:
        return values | {"iterations": 1, "eval_k": 32, "eval_temperatures": [0.4, 0.7, 1.0, 1.3]}
    return values | ARMS[arm]


def run_one(arm: str, seed: int, runs: Path) -> dict[str, Any]:
    """The figures of the last policy, or for the curves of the first one."""
    from larpo import align

    folder = runs / f"{arm.replace(' ', '-').replace(':', '').replace(',', '')}-{seed}"
    config = align.load_config(None, settings(arm, seed, folder))
    result = align.run(config, progress=False)
    first, last = result.metrics[0]["evaluate"], result.metrics[-1]["evaluate"]
    if arm == CURVES:
        return {"arm": arm, "seed": seed, "recall_at_n": first["recall_at_n"], "best_of_n": first["best_of_n"]}
    return {
        "arm": arm,
        "seed": seed,
        "start": first["reward"]["mean"],
        "reward": last["reward"]["mean"],
        "kl": last["kl"]["mean"],
        "win_rate": last["win_rate"]["mean"],
        "distinct": last["distinct"],
        "steps": sum(m["train"]["steps"] for m in result.metrics[1:]),
    }


def main(
    seeds: Annotated[list[int], typer.Option(help="seeds of every arm")] = [0, 1, 2],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="runs at a time, each on one core")] = 2,
    runs: Annotated[Path, typer.Option(help="where the runs are kept")] = Path("runs/reproduction"),
    only: Annotated[str, typer.Option(help="run this arm and seed (ARM@SEED) and print its figures")] = "",
    minutes: Annotated[float, typer.Option(help="start no run after this long")] = 600.0,
) -> None:
    """Run what is missing, then write docs/reproduction.json and its plots."""
    if only:
        arm, seed = only.rsplit("@", 1)
        print(json.dumps(run_one(arm, int(seed), runs)))
        return
    from tqdm import tqdm

    from benchmarks.studies import tiny_lm

    tiny_lm.folder()
    file = DOCS / "reproduction.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    todo = [(arm, seed) for seed in seeds for arm in (*ARMS, CURVES) if (arm, seed) not in done]
    deadline = time.monotonic() + 60 * minutes
    pool = ThreadPoolExecutor(jobs)
    try:
        started = [pool.submit(run_in_a_process, arm, seed, runs, deadline) for arm, seed in todo]
        for ended in tqdm(as_completed(started), total=len(started), unit="run"):
            if row := ended.result():
                rows.append(row)
                file.write_text(json.dumps(rows, indent=1) + "\n")
    finally:
        pool.shutdown(cancel_futures=True)
    print(table(rows))
    draw(rows, DOCS / "reproduction")


def run_in_a_process(arm: str, seed: int, runs: Path, deadline: float) -> dict[str, Any] | None:
    """`run_one` on one core; None where the time is up."""
    if time.monotonic() > deadline:
        return None
    command = [sys.executable, __file__, "--runs", str(runs), "--only", f"{arm}@{seed}"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ended.returncode:
        raise SystemExit(f"{arm}, seed {seed}, ended with status {ended.returncode}")
    return json.loads(ended.stdout.splitlines()[-1])


def values(rows: list[dict[str, Any]], arm: str, name: str) -> list[float]:
    """Of an arm, one a seed."""
    return [row[name] for row in rows if row["arm"] == arm]


def start_of(rows: list[dict[str, Any]]) -> float:
    """The held-out reward before training, over all runs."""
    return mean(row["start"] for row in rows if "start" in row)


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, arm by arm, as Markdown."""
    lines = [["finding", "arm", "seeds", "held-out reward", "KL, nats", "win rate", "distinct", "steps"]]
    lines.append(["", "start", "", f"{start_of(rows):.2f}", "0", "", "", ""])
    for finding, arms in FINDINGS.items():
        for arm in arms:
            if rewards := values(rows, arm, "reward"):
                spreads = [spread(values(rows, arm, name)) for name in ("reward", "kl", "win_rate")]
                distinct, steps = (mean(values(rows, arm, name)) for name in ("distinct", "steps"))
                lines.append([finding, arm, str(len(rewards)), *spreads, f"{distinct:.2f}", f"{steps:.0f}"])
    return as_markdown(lines)


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """A plot per finding: reward of every seed, and its mean; Recall@N curves for the sixth."""
    from benchmarks.reporting.plots import plt

    folder.mkdir(parents=True, exist_ok=True)
    for number, (finding, arms) in enumerate(FINDINGS.items(), 1):
        rewards = {arm: found for arm in reversed(arms) if (found := values(rows, arm, "reward"))}
        figure, axes = plt.subplots(figsize=(7, 0.5 * len(rewards) + 1.2), layout="constrained")
        for y, found in enumerate(rewards.values()):
            axes.plot(found, [y] * len(found), "o", color="tab:blue", alpha=0.5)
            axes.plot([mean(found)], [y], "|", color="black", markersize=18, markeredgewidth=2)
        axes.axvline(start_of(rows), color="grey", linestyle=":", label="before training")
        axes.set_yticks(range(len(rewards)), list(rewards))
        axes.set(xlabel="held-out reward; a dot per seed, a bar at the mean", title=finding)
        axes.legend(loc="lower right")
        figure.savefig(folder / f"finding-{number}.png", dpi=110)
        plt.close(figure)
    curves = [row["recall_at_n"] for row in rows if row["arm"] == CURVES]
    if curves:
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for temperature, recall in curves[0].items():
            means = [mean(curve[temperature][n] for curve in curves) for n in recall]
            axes.plot([int(n) for n in recall], means, "o-", label=f"temperature {temperature}")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="N", ylabel="Recall@N: one of N completions has a reward above 1")
        axes.set_title("6. Recall@N of the initial model")
        axes.legend()
        figure.savefig(folder / "finding-6.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
