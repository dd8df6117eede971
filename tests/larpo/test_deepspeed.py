"""LarPOTrainer under DeepSpeed's ZeRO on two gloo ranks, against one process on the same global batch.

Runs where DeepSpeed is installed: `pip install deepspeed`. It is no dependency: on a GPU machine without a CUDA toolkit it
cannot even be imported, and accelerate imports it wherever it is installed.
"""

import pytest

from tests.helpers import ranks

pytest.importorskip("deepspeed")

from tests.larpo.test_distributed_trainer import one_process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.checks_of("deepspeed_checks", 2, tmp_path_factory, before=one_process)


@pytest.mark.parametrize("name", ranks.check_names("deepspeed_checks"))
def test(found, name):
    ranks.passes(found, name)
