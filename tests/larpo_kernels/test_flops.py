"""torch's FLOP counter counts the GEMMs of the linear ops, as it does those of the logits they replace."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import larpo_kernels as lk
from tests.helpers import HANGS

N, H, V = 32, 8, 50
GEMM = 2 * N * H * V


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def tensors(device, wanted):
    hidden, weight = (torch.randn(n, H, device=device, requires_grad=x in wanted) for n, x in ((N, "hidden"), (V, "weight")))
    return hidden, weight, torch.randint(V, (N,), device=device)


def train(hidden, weight, labels, **options):
    lk.linear_token_logps(hidden, weight, labels, **options).sum().backward()


def eager(hidden, weight, labels):
    F.linear(hidden, weight).log_softmax(-1).gather(1, labels[:, None]).sum().backward()


@pytest.mark.parametrize(
    ("wanted", "schedule", "gemms_more_than_eager"),
    [
        ({"hidden"}, "frozen_head", 0),
        ({"hidden", "weight"}, "list_hold", 0),
        ({"weight"}, "list_hold", 0),
        ({"hidden", "weight"}, "recompute", 1),
        ({"weight"}, "recompute", 1),
    ],
)
def test_a_step_counts_as_eagers_and_one_gemm_more_where_logits_are_formed_again(
    device, backend, wanted, schedule, gemms_more_than_eager
):
    given = tensors(device, wanted)
    ours = flops(lambda: train(*given, schedule=schedule, backend=backend))
    assert ours == flops(lambda: eager(*given)) + gemms_more_than_eager * GEMM
    assert ours == lk.plan(*given, schedule=schedule).gemms * GEMM


def test_scoring_is_one_gemm(device):
    hidden, weight, labels = tensors(device, ())
    assert flops(lambda: lk.linear_token_logps(hidden, weight, labels)) == GEMM


def test_ignored_tokens_do_not_count(device):
    hidden, weight, labels = tensors(device, ())
    labels[: N // 2] = -100
    assert flops(lambda: lk.linear_sequence_logps(hidden[None], weight, labels[None])) == GEMM // 2


def test_what_is_held_of_the_vocabulary_is_not_formed_again(device, monkeypatch):
    from tests.helpers.linear_heads import use_small_tiles

    use_small_tiles(monkeypatch, rows=10)
    given = tensors(device, {"hidden", "weight"})
    least, most = (lk.plan(*given, schedule=x).extra_bytes for x in ("recompute", "list_hold"))
    plan = lk.plan(*given, memory_budget=(least + most) // 2)
    assert 0 < plan.held_rows < V
    counted = flops(lambda: train(*given, memory_budget=(least + most) // 2))
    assert counted == 3 * GEMM + 2 * N * H * (V - plan.held_rows)


def test_a_fused_loss_counts_its_head_only(device):
    hidden, weight, labels = tensors(device, {"hidden", "weight"})
    relevance = torch.arange(4.0, device=device)

    def call():
        lk.fused_linear_listwise_loss(
            hidden.view(4, 8, H), weight, labels.view(4, 8), relevance, list_sizes=4, schedule="list_hold"
        ).loss.backward()

    assert flops(call) == 3 * GEMM
    logits = torch.randn(4, 8, V, device=device, requires_grad=True)
    given = logits, labels.view(4, 8), relevance
    assert flops(lambda: lk.fused_listwise_loss(*given, list_sizes=4).loss.backward()) == 0


def test_a_backward_counts_alone(device):
    hidden, weight, labels = tensors(device, {"hidden", "weight"})
    loss = lk.linear_token_logps(hidden, weight, labels, schedule="list_hold").sum()
    assert flops(loss.backward) == 2 * GEMM


@pytest.mark.slow
def test_the_first_call_of_a_process_counts():
    code = """
        from torch.utils.flop_counter import FlopCounterMode
        import torch, larpo_kernels as lk
        with FlopCounterMode(display=False) as counter:
            lk.linear_token_logps(torch.randn(16, 4), torch.randn(10, 4), torch.zeros(16, dtype=torch.long))
        print(counter.get_total_flops())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=HANGS)
    assert done.stdout.strip() == str(2 * 16 * 4 * 10), done.stderr
