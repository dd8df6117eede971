"""Runs the tiny loop on processes that kill themselves.

`main` forks two ranks for every line of LIVES from its process, which must have run nothing. Nothing but the ranks themselves
ends the ones that are left: no launcher is there to do it. FOLDER/killed is the run they share, FOLDER/whole that of two that
are left in peace, FOLDER/three that of three. FOLDER/lives.json says how each rank ended.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import larpo.align.loop
import larpo.align.plots
import larpo.runs.ranks
from tests.helpers import align_runs
from tests.helpers.kills import after_the_next_new_file, at_step

SETTINGS = dict(iterations=1, chunk_size=2, training=dict(save_strategy="steps", save_steps=1, per_device_train_batch_size=1))


def raises() -> None:
    raise MemoryError("no memory left")


LIVES = (  # what befalls rank 0, and rank 1
    (None, lambda: after_the_next_new_file("sample-chunks/00001.parquet")),
    (lambda: after_the_next_new_file("iteration-01/sampled.parquet"), None),
    (None, lambda: at_step(3)),
    (None, lambda: at_step(1, raises)),
    (lambda: at_step(1), lambda: at_step(1)),
    (lambda: after_the_next_new_file("iteration-01/model"), None),
    (None, None),
)


def rank(folder: Path, name: str, life: int, rank: int, ranks: int, befalls) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # accelerate wants them set
    larpo.runs.ranks.GRACE = 1.0
    larpo.align.plots.draw = lambda *arguments: {}  # which takes longer than all else
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}-{life}", rank=rank, world_size=ranks)
    if befalls is not None:
        befalls()
    try:
        align_runs.align(folder / name, **SETTINGS, model=str(folder / "model"))
    except Exception as error:
        (folder / f"{name}-{life}-{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def ranks(folder: Path, name: str, life: int, befall) -> dict:
    """How each rank ended: its exit code and what it said; and how many seconds after the first the last one ended."""
    pids = {}
    for number, befalls in enumerate(befall):
        pid = os.fork()
        if pid == 0:
            rank(folder, name, life, number, len(befall), befalls)
        pids[pid] = number
    ended, times = {}, []
    for _ in pids:
        pid, status = os.wait()
        times.append(time.monotonic())
        said = folder / f"{name}-{life}-{pids[pid]}"
        ended[pids[pid]] = [os.waitstatus_to_exitcode(status), said.read_text() if said.exists() else ""]
    return {"ranks": [ended[number] for number in sorted(ended)], "seconds_apart": times[-1] - times[0]}


def main(folder: Path) -> None:
    for name, number in (("whole", 2), ("three", 3)):
        ranks(folder, name, 0, (None,) * number)
    lives = [ranks(folder, "killed", life, befall) for life, befall in enumerate(LIVES)]
    (folder / "lives.json").write_text(json.dumps(lives, indent=1))
