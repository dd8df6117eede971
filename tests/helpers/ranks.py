"""Checks that run on several processes at once: one start for all of them, one test for each."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.helpers import HANGS, prepared


def checks_of(module: str, num_ranks: int, tmp_path_factory, before=None) -> dict[str, str]:
    """Runs every check of tests/helpers/`module`.py on gloo ranks; {name: what went wrong, "" if nothing}.

    Once per test run: workers of pytest-xdist share what the first of them found. before(folder) runs first, in this process;
    the ranks find the folder in the environment, as CHECKS_FOLDER.
    """
    shared = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent / module if shared else tmp_path_factory.mktemp(module)
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        results = folder / "results.json"
        if not results.exists():
            if before is not None:
                before(folder)
            results.write_text(json.dumps(_run(module, num_ranks, folder)), encoding="utf-8")
        return json.loads(results.read_text(encoding="utf-8"))


def _run(module: str, num_ranks: int, folder: Path) -> dict[str, str]:
    """A rank that fails stops there, since the others' collectives would not match any more; what was not run says so."""
    processes = [prepared.start(_rank, module, rank, num_ranks, str(folder)) for rank in range(num_ranks)]
    end = time.monotonic() + HANGS
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):  # the others wait for it in vain
            end = min(end, time.monotonic() + 60)
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.join()
    found: dict[str, str] = {}
    for name in check_names(module):
        said = [folder / f"{name}.{rank}" for rank in range(num_ranks)]
        texts = [path.read_text(encoding="utf-8") if path.exists() else "not run to its end" for path in said]
        found[name] = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
    return found


def _checks(module: str) -> dict[str, Callable[[int, int], None]]:
    """Functions check_* of tests/helpers/`module`.py, and those of a table CHECKS of it, where there is one."""
    found = vars(importlib.import_module(f"tests.helpers.{module}"))
    return found.get("CHECKS", {}) | {name: function for name, function in found.items() if name.startswith("check_")}


def check_names(module: str) -> list[str]:
    return list(_checks(module))


def passes(found: dict[str, str], name: str) -> None:
    if found[name]:
        pytest.fail(found[name], pytrace=False)


def _rank(module: str, rank: int, num_ranks: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "CHECKS_FOLDER": folder}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}  # accelerate wants them set
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=HANGS),
    )
    for name, check in _checks(module).items():
        try:
            check(rank, num_ranks)
        except BaseException:
            Path(folder, f"{name}.{rank}").write_text(traceback.format_exc(), encoding="utf-8")
            raise
        Path(folder, f"{name}.{rank}").write_text("", encoding="utf-8")
    dist.destroy_process_group()
