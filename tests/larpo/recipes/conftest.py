"""What the tests of recipes share."""

import pytest


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """Trainers of other tests leave a precision behind, which accelerate would keep for the whole process."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    state._reset_state(reset_partial_state=False)
