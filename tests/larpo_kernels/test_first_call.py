"""The first call is a call like any other: a compiler that nobody asked for is not imported, which takes a second."""

import subprocess
import sys
import textwrap

from tests.helpers import HANGS


def test_eager_calls_import_no_compiler():
    code = """
        import sys
        import torch
        import larpo_kernels as lk
        hidden, weight = torch.randn(4, 5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
        labels, relevance = torch.randint(20, (4, 5)), torch.randn(4)
        logits = hidden @ weight.t()
        lk.fused_listwise_loss(logits, labels, relevance, list_sizes=2).loss.backward(retain_graph=True)
        lk.fused_linear_listwise_loss(hidden, weight, labels, relevance, list_sizes=2).loss.backward()
        lk.sequence_logps(logits, labels).sum().backward()
        with torch.no_grad():
            lk.token_logps(logits, labels, return_stats=True)
        print([name for name in ("torch._dynamo", "torch._inductor", "triton") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=HANGS)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
