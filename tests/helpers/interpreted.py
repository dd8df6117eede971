"""Parameters of tests that take long in Triton's interpreter."""

import pytest


def few_interpreted(values, few):
    """Parameters (a tuple for several names) that every other backend runs all of. The interpreter runs `few` in `make test`,
    enough to start every kernel, and the others in `make test-all`."""
    tuples = {value: value if isinstance(value, tuple) else (value,) for value in values}
    assert tuples.keys() >= set(few)
    return [pytest.param(*one, marks=() if value in few else pytest.mark.slow_interpreted) for value, one in tuples.items()]
