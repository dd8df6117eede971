"""The scripts in examples/ run, and learn what they say they learn."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("transformers")
    from tests.helpers import tiny

    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return str(folder)


def test_every_script_is_run_here():
    assert {f.stem for f in EXAMPLES.glob("*.py")} == {"own_training_loop", "train_on_lists", "own_objective"}


def test_own_training_loop(model):
    losses = example("own_training_loop")(["--model", model, "--learning-rate", "1e-2"])
    assert losses[-1] < 0.7 * losses[0]


def test_train_on_lists(model, tmp_path, monkeypatch):
    for package in ("accelerate", "datasets", "peft"):
        pytest.importorskip(package)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trainer = example("train_on_lists")(["--model", model, "--out", str(tmp_path), "--steps", "20"])
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < logged[0]


def test_own_objective():
    losses = example("own_objective")()
    assert losses[-1] < 0.7 * losses[0]
