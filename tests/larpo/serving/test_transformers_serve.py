"""A run that samples from `transformers serve`, a real server in a process of its own."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("fastapi")
from larpo.runs.files import read_rows
from larpo.serving.client import ServerError
from tests.helpers import HANGS
from tests.helpers.align_runs import align, model_folder

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu", "--host", "127.0.0.1", "--port"]


@pytest.fixture
def server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen([*COMMAND, str(port)], env=environment, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "server.log")
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _wait_for(address, process, log):
    until = time.monotonic() + HANGS
    while process.poll() is None and time.monotonic() < until:
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


def test_every_policy_of_a_run_is_sampled_from_until_the_server_is_killed(server, tmp_path):
    process, address = server
    draws = {"generation_config": json.dumps({"do_sample": True, "top_k": 0})}  # or the model's own settings: greedy
    sizes = dict(k=3, eval_prompts=2, eval_k=1, prompts_per_iteration=2, max_new_tokens=4)
    settings = sizes | dict(sampler="server", sampler_options={"base_url": address, "extra_body": draws, "retries": 0})
    found = align(tmp_path / "run", iterations=1, **settings)
    counts = found.metrics[1]["sample"]
    assert counts["weights"] == {"checkpoint": model_folder(), "iteration": 0, "stale": False}
    assert counts["candidates"] == 6 and counts["duplicates"] < 6 and counts["prompts_not_exact"] == 0
    rows = read_rows(tmp_path / "run/iteration-01/sampled.parquet")
    for one, exact in ((ids, flag) for row in rows for ids, flag in zip(row["completion_ids"], row["exact"], strict=True)):
        assert not exact or len(one) == 4 or (len(one) < 4 and one[-1] == 2)  # cut off, or with the token that ends it
    asked = (tmp_path / "server.log").read_text()
    assert asked.count(f"Loading {model_folder()}@main") == asked.count(f"Loading {tmp_path}/run/iteration-01/model@main") == 1
    process.kill()
    process.wait()
    with pytest.raises(ServerError, match=r"can't be reached .* 0 of 2 prompts are kept"):
        align(tmp_path / "run", iterations=2, **settings)
