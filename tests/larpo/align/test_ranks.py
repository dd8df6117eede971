"""The loop on several processes over gloo: what it writes, and how it ends."""

import pytest
import torch.distributed as dist

for package in ("transformers", "accelerate", "datasets", "matplotlib", "yaml"):
    pytest.importorskip(package)
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)

from tests.helpers import loop_checks, ranks, tiny


def one_process(folder):
    tiny.causal_lm(spread=2.0).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    loop_checks.align(folder / "alone", 1)
    loop_checks.refilled(folder / "refilled-alone", 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.checks_of("loop_checks", 2, tmp_path_factory, before=one_process)


@pytest.mark.parametrize("name", ranks.check_names("loop_checks"))
def test(found, name):
    ranks.passes(found, name)
