"""What tests of trainers share."""

import warnings

import pytest

from tests.helpers import tiny


@pytest.fixture
def own_precision(monkeypatch):
    """transformers hands bf16=True on through the environment, where the next trainer would find it."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=False)


@pytest.fixture(scope="session")
def data():
    """Six lists of one to five candidates."""
    from datasets import Dataset

    return Dataset.from_list(tiny.lists(6, m=None, seed=3))


@pytest.fixture
def unwarned():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        yield
