"""What tests of trainers and commands share. They need what requirements.txt installs; elsewhere none of them is collected."""

import importlib.util
import sys
import warnings

import pytest

from tests.helpers import tiny

if not all(map(importlib.util.find_spec, ("transformers", "accelerate", "datasets"))):
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """transformers hands bf16=True on through the environment, and accelerate keeps it: the next trainer would find it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=False)


@pytest.fixture(scope="session")
def data():
    """Six lists of one to five candidates."""
    from datasets import Dataset

    return Dataset.from_list(tiny.lists(6, m=None, seed=3))


@pytest.fixture
def larpo(monkeypatch, capsys):
    """The command as a function of its arguments: exit status, standard output and standard error."""

    def run(*arguments):
        from larpo.cli import main

        monkeypatch.setattr(sys, "argv", ["larpo", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def unwarned():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        yield
