"""`given` and `st` of hypothesis. Where it is not installed, property tests are skipped and the rest of a file still runs."""

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Anything:
        """A strategy that is named but never drawn from."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **keywords):
            return self

    st = _Anything()

    def given(*args, **keywords):
        return pytest.mark.skip(reason="hypothesis is not installed")

else:
    settings.register_profile("project", deadline=None, derandomize=True, database=None, max_examples=25)
    settings.load_profile("project")

__all__ = ["given", "st"]
