"""For every test of the loop."""

import pytest


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than an iteration. A run that a whole module shares is made before this, and has them."""
    monkeypatch.setattr("larpo.align.plots.draw", lambda *arguments: {})
