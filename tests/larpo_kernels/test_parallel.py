"""larpo_kernels.parallel on three gloo ranks against one process. The checks are in parallel_checks.py, one test each."""

import pytest
import torch.distributed as dist

from tests.helpers import ranks

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)

from larpo_kernels import parallel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.checks_of("parallel_checks", 3, tmp_path_factory)


@pytest.mark.parametrize("name", ranks.check_names("parallel_checks"))
def test(found, name):
    ranks.passes(found, name)


def test_without_a_process_group_the_error_says_so():
    with pytest.raises(ValueError, match="init_process_group"):
        parallel.VocabShard.of(10)
