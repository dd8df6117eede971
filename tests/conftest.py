"""One device and two backends for every test; Triton runs on its interpreter where there is no GPU."""

import gc
import importlib.util
import os

import pytest
import torch

GPU = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so this comes first
    if TRITON:
        from tests.helpers import interpreter

        interpreter.make_bf16_exact()
        interpreter.list_builtins_once()
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when datasets is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers already fill the cores

from tests.helpers import optional_hypothesis  # noqa: F401  sets the profile
from tests.helpers.regimes import REGIMES

NO_TRITON = pytest.mark.skipif(not TRITON, reason="triton is not installed")


def pytest_collection_modifyitems(items):
    for item in items:
        on_triton = getattr(item, "callspec", None) and item.callspec.params.get("backend") == "triton"
        if on_triton and not GPU and item.get_closest_marker("slow_interpreted"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def no_search_for_garbage_in_what_stays():
    """accelerate collects garbage whenever a trainer starts, and so do tests that count memory: over all that was imported
    and compiled before, that takes longer than training a tiny model does."""
    gc.collect()
    gc.freeze()
    yield


def pytest_unconfigure(config):
    gc.unfreeze()  # or libraries complain at the end of what they take for leaks


@pytest.fixture(scope="module")
def one_thread():
    """For tiny matrices, at which threads only get in each other's way, and for times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device():
    return "cuda" if GPU else "cpu"


@pytest.fixture(params=["torch", pytest.param("triton", marks=NO_TRITON)])
def backend(request):
    """Every op is tested on both: small shapes, the interpreter takes milliseconds per row."""
    return request.param


@pytest.fixture(params=["torch", "triton"] if GPU and TRITON else ["torch"])
def fast_backend(request):
    """For shapes as real models have them, which are too large for Triton's interpreter: the kernels on a GPU only."""
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).split(".")[1])
def dtype(request):
    return request.param


@pytest.fixture(params=REGIMES)
def regime(request):
    """Name of a kind of logits: `REGIMES[regime]`, or `make_batch(regime=regime)`."""
    return request.param
