"""What can be known of the GPU's path without a GPU: it mixes no devices, and never asks the device for a value."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import HANGS

pytestmark = pytest.mark.slow

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
KERNELS = {
    *("token_logps_forward", "token_logps_backward", "candidate_logps", "list_losses"),
    *("exp_tile", "merge_spans", "level_spans", "rescale", "put_target", "target_dots", "scale_rows"),
}

COSTS = {  # of a step from 8 candidates x 16 tokens: operations of PyTorch, launches
    "token_logps": (10, 2),
    "sequence_logps": (14, 3),
    "packed sequence_logps": (18, 3),
    "listwise_loss": (17, 2),
    "fused_listwise_loss": (22, 4),
    "frozen_head": (142, 8),
    "list_hold": (171, 9),
    "recompute": (177, 8),
}


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """guard.cpp as a library."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernel tests run on it")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    library, root = tmp_path_factory.mktemp("guard") / "guard.so", Path(torch.__file__).parent
    headers, links = f"-I{root / 'include'}", [f"-L{root / 'lib'}", "-lc10"]
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-std=c++20", headers, HELPERS / "guard.cpp", "-o", library, *links], check=True
    )
    return library


def run(guard, *change):
    """gpu_path.py, or the same with one text of it replaced by another."""
    code = (HELPERS / "gpu_path.py").read_text()
    if change:
        assert change[0] in code
    code = code.replace(*change) if change else code
    return subprocess.run([sys.executable, "-c", code, str(guard)], capture_output=True, text=True, timeout=HANGS)


@pytest.fixture(scope="module")
def done(guard):
    return run(guard)


def test_it_mixes_no_devices_and_waits_for_nothing(done):
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split("launched: ")[1].split()) == KERNELS


@pytest.mark.parametrize("name", COSTS)
def test_a_step_asks_no_more_of_the_host_than_it_did(done, name):
    """Operations of PyTorch and launches of kernels, forward and backward: each takes the host some microseconds."""
    ops, launches = json.loads(done.stdout.split("costs: ")[1].split("\n")[0])[name]
    assert ops <= COSTS[name][0] and launches <= COSTS[name][1], (ops, launches)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("list_sizes in (4,", "list_sizes in (torch.tensor([3, 5]),"), "DataDependent"),
        (("relevance, ref_logps = labels(S, T), randn(S)", "relevance, ref_logps = labels(S, T), torch.randn(S)"), "on cpu"),
        (("capturing = lambda: True", "capturing = lambda: False"), "nonzero"),
    ],
    ids=["reading a value", "another device", "counting tokens"],
)
def test_it_would_notice(guard, change, error):
    done = run(guard, *change)
    assert done.returncode != 0 and error in done.stderr
