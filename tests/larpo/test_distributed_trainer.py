"""LarPOTrainer on two gloo ranks, DDP and FSDP2, against one process on the same global batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers import ranks

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch has no gloo", allow_module_level=True)

from tests.helpers import trainer_checks

pytestmark = pytest.mark.slow


def one_process(folder):
    expected = {
        name: trainer_checks.train(folder / "run", 1, **trainer_checks.made(options))
        for name, options in trainer_checks.EXPECTED.items()
    }
    torch.save(expected, folder / "expected.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.checks_of("trainer_checks", 2, tmp_path_factory, before=one_process)


@pytest.mark.parametrize("name", ranks.check_names("trainer_checks"))
def test(found, name):
    ranks.passes(found, name)


CONFIGS = sorted((Path(__file__).parents[2] / "docs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_the_configurations(path, monkeypatch):
    """All the way to the environment in which `accelerate launch` starts processes."""
    from accelerate.commands import launch

    asked = launch.launch_command_parser().parse_args(["--config_file", str(path), "--machine_rank", "0", "train.py"])
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: True, raising=False)
    asked, *_ = launch._validate_launch_command(asked)
    config = launch.load_config_from_file(str(path))
    assert asked.num_processes == config.num_processes and asked.num_processes % asked.num_machines == 0
    assert asked.use_fsdp == path.name.startswith("fsdp2") and asked.multi_gpu == (path.name == "ddp.yaml")
    if asked.use_fsdp:
        assert int(asked.fsdp_version) == 2


def test_there_are_configurations():
    assert len(CONFIGS) == 4
