"""What importing the package gives, and what it leaves alone. Most of it in a fresh interpreter."""

import os
import subprocess
import sys
import textwrap

import pytest

from tests.helpers import HANGS


def run(code, **environment):
    """Standard output of `code` in a fresh interpreter, which must end well."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        timeout=HANGS,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_module_leaves_a_callable():
    code = """
        import larpo_kernels.fused_listwise_loss
        print(callable(larpo_kernels.fused_listwise_loss))
        from larpo_kernels.fused_listwise_loss import fused_listwise_loss
        print(fused_listwise_loss is larpo_kernels.fused_listwise_loss)
    """
    assert run(code).split() == ["True", "True"]


def test_the_function_comes_from_its_submodule_first():
    code = """
        from larpo_kernels.fused_listwise_loss import fused_listwise_loss
        import larpo_kernels
        print(fused_listwise_loss is larpo_kernels.fused_listwise_loss)
    """
    assert run(code) == "True"


def test_importing_pulls_in_neither_triton_nor_transformers_nor_matplotlib():
    code = """
        import sys, torch
        before = set(sys.modules)
        import larpo_kernels
        heavy = {"triton", "transformers", "matplotlib", "jax"}
        print(sorted(heavy & {name.split(".")[0] for name in set(sys.modules) - before}))
    """
    assert run(code) == "[]"


def test_every_public_name_exists():
    import larpo_kernels

    assert {"fused_listwise_loss", "sequence_logps", "token_logps", "listwise_loss", "reference"} <= set(larpo_kernels.__all__)
    for name in larpo_kernels.__all__:
        assert hasattr(larpo_kernels, name), name


STEP = """
    import torch, larpo_kernels
    logits = torch.randn(4, 3, 31, requires_grad=True)
    labels = torch.randint(0, 31, (4, 3))

    def step(backend=None):
        out = larpo_kernels.fused_listwise_loss(
            logits, labels, torch.arange(4.0), list_sizes=2, return_stats=True, backend=backend
        )
        out.loss.backward()
        return out.loss
"""


def test_without_triton_the_torch_backend_serves():
    code = f"""
    import sys
    sys.modules["triton"] = None  # any import of it fails from here on
    {STEP}
    assert step().isfinite() and step("torch").isfinite() and logits.grad.abs().sum() > 0
    try:
        step("triton")
    except (ImportError, RuntimeError, ValueError) as error:
        print(error)
    """
    message = run(code)
    assert "backend" in message and "triton" in message.lower() and "halted" not in message


def test_triton_on_cpu_tensors_without_the_interpreter_is_a_clear_error():
    pytest.importorskip("triton")
    code = f"""
    {STEP}
    try:
        step("triton")
    except (RuntimeError, ValueError) as error:
        print(error)
    """
    message = run(code)
    assert "backend" in message and "TRITON_INTERPRET" in message


def test_every_public_name_of_larpo_exists():
    for package in ("transformers", "accelerate", "peft", "datasets"):
        pytest.importorskip(package)
    import larpo

    for name in larpo.__all__:
        assert callable(getattr(larpo, name)), name
