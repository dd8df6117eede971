"""The models of a run are freed when the next one is loaded, and circles are looked for only where there are some."""

import gc
import weakref

import pytest
import torch

from larpo.align import models
from tests.helpers import align_runs


@pytest.fixture
def collections(monkeypatch):
    """Calls of gc.collect; nothing else collects meanwhile."""
    calls, collect = [], gc.collect
    monkeypatch.setattr(models.gc, "collect", lambda: calls.append(collect()))
    gc.disable()
    yield calls
    gc.enable()


@pytest.fixture
def held(tmp_path):
    return models.Models(align_runs.config(tmp_path), torch.device("cpu"))


def test_a_model_without_a_trainer_is_freed_without_a_search_for_circles(held, collections):
    first = weakref.ref(held.load(held.initial))
    held.release()
    assert first() is None and collections == []


def test_a_model_that_a_trainer_holds_in_a_circle_is_freed_once_training_is_done(held, collections):
    model = held.load_for_training(held.initial)
    model.trainer = {"of": model}
    trained = weakref.ref(model)
    del model
    held.release()
    assert trained() is not None and collections == []  # in training
    held.release_all()
    assert trained() is None and len(collections) == 1
    held.release_all()
    assert len(collections) == 1
