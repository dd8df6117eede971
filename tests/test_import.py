"""What importing the package gives, and what it leaves alone: in fresh interpreters, each asked several questions."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest

from tests.helpers import HANGS

SET_UP = """
    import sys, torch
    hidden, weight = torch.randn(4, 5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    labels, relevance = torch.randint(20, (4, 5)), torch.randn(4)
    logits = hidden @ weight.t()

    def step(backend=None):
        given = logits.detach().requires_grad_()
        out = larpo_kernels.fused_listwise_loss(given, labels, relevance, list_sizes=2, return_stats=True, backend=backend)
        out.loss.backward()
        assert out.loss.isfinite() and given.grad.abs().sum() > 0

    def refused():
        try:
            step("triton")
        except (ImportError, RuntimeError, ValueError) as error:
            print(error)
"""


def run(code):
    """Standard output of `code` in a fresh interpreter, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SET_UP) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_is_light_and_eager_calls_import_no_compiler():
    """Which would take a second. The module comes first, under the name of its function: that is a callable all the same."""
    message = run("""
        before = set(sys.modules)
        import larpo_kernels.fused_listwise_loss
        assert callable(larpo_kernels.fused_listwise_loss)
        from larpo_kernels.fused_listwise_loss import fused_listwise_loss
        assert fused_listwise_loss is larpo_kernels.fused_listwise_loss
        heavy = {"triton", "transformers", "matplotlib", "jax"} & {name.split(".")[0] for name in set(sys.modules) - before}
        assert not heavy, heavy

        step()
        larpo_kernels.fused_linear_listwise_loss(hidden, weight, labels, relevance, list_sizes=2).loss.backward()
        larpo_kernels.sequence_logps(logits.detach().requires_grad_(), labels).sum().backward()
        with torch.no_grad():
            larpo_kernels.token_logps(logits, labels, return_stats=True)
        compilers = {"torch._dynamo", "torch._inductor", "triton"} & set(sys.modules)
        assert not compilers, compilers
        refused()
    """)
    if importlib.util.find_spec("triton"):  # on tensors of a CPU, without the interpreter
        assert "backend" in message and "TRITON_INTERPRET" in message


def test_without_triton_the_torch_backend_serves():
    """The function first, from its module of the same name."""
    message = run("""
        sys.modules["triton"] = None  # any import of it fails from here on
        from larpo_kernels.fused_listwise_loss import fused_listwise_loss
        import larpo_kernels
        assert fused_listwise_loss is larpo_kernels.fused_listwise_loss
        step()
        step("torch")
        refused()
    """)
    assert "backend" in message and "triton" in message.lower() and "halted" not in message


def test_every_public_name_exists():
    import larpo_kernels

    assert {"fused_listwise_loss", "sequence_logps", "token_logps", "listwise_loss", "reference"} <= set(larpo_kernels.__all__)
    for name in larpo_kernels.__all__:
        assert hasattr(larpo_kernels, name), name


def test_every_public_name_of_larpo_exists():
    for package in ("transformers", "accelerate", "peft", "datasets"):
        pytest.importorskip(package)
    import larpo

    for name in larpo.__all__:
        assert callable(getattr(larpo, name)), name
