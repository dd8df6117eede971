"""For every test of the loop."""

import pytest


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than an iteration. A run that a whole module shares is made before this, and has them."""
    monkeypatch.setattr("larpo.align.plots.draw", lambda *arguments: {})


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """transformers hands its precision on through the environment, where the next trainer would find it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
