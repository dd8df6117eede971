"""The models of a run are freed when the next one is loaded, and circles are looked for only where there are some."""

import gc
import weakref

import pytest
import torch

pytest.importorskip("transformers")

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
    first = weakref.ref(held.load(held.initial()))
    held.drop()
    assert first() is None and collections == []


def test_a_model_that_a_trainer_holds_in_a_circle_is_freed_once_training_is_done(held, collections):
    model = held.take(held.initial())
    model.trainer = {"of": model}
    trained = weakref.ref(model)
    del model
    held.drop()
    assert trained() is not None and collections == []  # in training
    held.forget()
    assert trained() is None and len(collections) == 1
    held.forget()
    assert len(collections) == 1
