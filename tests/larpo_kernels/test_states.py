"""Passes over hidden states: the target's dot, and rows times a number per token, rounded once; on both backends."""

import importlib

import pytest
import torch

from larpo_kernels import backends
from larpo_kernels.backends.arguments import TargetTerm
from larpo_kernels.linear.vocab_shard import ELSEWHERE

TOKENS, HIDDEN, VOCABULARY = 13, 37, 19
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.t().contiguous().t(),
    "odd rows of a wider matrix": lambda x: torch.nn.functional.pad(x, (1, 2))[:, 1:-2],
}


@pytest.fixture
def states(backend, monkeypatch):
    module = importlib.import_module(f"{backends.get(backend).__name__}.states")
    if backend == "triton":
        monkeypatch.setattr(module, "COLUMNS", 16)  # several steps, the last one not full
    else:
        monkeypatch.setattr(module, "STEP", 4)
    return module


def draw(*size, dtype, device, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def a_batch(dtype, device, weight_dtype=None):
    labels = torch.arange(TOKENS, device=device) * 5 % VOCABULARY
    weight = draw(VOCABULARY, HIDDEN, dtype=weight_dtype or dtype, device=device, seed=1)
    return draw(TOKENS, HIDDEN, dtype=dtype, device=device), weight, labels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_a_targets_logit_is_a_dot_in_float32(states, device, dtype, layout, biased):
    hidden, weight, labels = a_batch(dtype, device)
    hidden, weight = LAYOUTS[layout](hidden), LAYOUTS[layout](weight)
    bias = draw(VOCABULARY, dtype=dtype, device=device, seed=2) if biased else None
    out = states.target_dots(hidden, weight, bias, labels, torch.float32)
    true = (hidden.double() * weight[labels].double()).sum(1)
    true = true if bias is None else true + bias[labels].double()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), true, rtol=2e-6, atol=2e-6)


def test_a_wider_weight_is_rounded_as_the_tiles_round_it(states, device):
    hidden, weight, labels = a_batch(torch.bfloat16, device, torch.float32)
    out = states.target_dots(hidden, weight, None, labels, torch.float32)
    true = (hidden.double() * weight.bfloat16()[labels].double()).sum(1)
    torch.testing.assert_close(out.double(), true, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", [False, True], ids=["", "targets"])
def test_rows_are_rounded_once(states, device, dtype, layout, targets):
    """Where float32 held the product the result is the number next to it; large factors, so that a second rounding shows."""
    _, weight, labels = a_batch(dtype, device)
    x = LAYOUTS[layout](draw(TOKENS, HIDDEN, dtype=torch.float32, device=device, seed=3))
    factor, value = (draw(TOKENS, dtype=torch.float32, device=device, seed=seed) * 50 for seed in (4, 5))
    labels[::4] = ELSEWHERE
    out = torch.empty(TOKENS, HIDDEN, dtype=dtype, device=device)
    states.scale_rows(x, factor, out, TargetTerm(value, LAYOUTS[layout](weight), labels) if targets else None)
    added = torch.where(labels < 0, 0, value.double())[:, None] * weight[labels].double() if targets else 0
    true = (x.double() + added) * factor.double()[:, None]
    largest = true.abs().amax(1, keepdim=True).clamp(min=1e-30)  # of a sum that cancels: float32 knows it to its terms
    assert ((out.double() - true).abs() <= torch.finfo(dtype).eps / 2 * 1.001 * true.abs() + 1e-6 * largest).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_in_place_and_by_one_factor_for_all(states, device, dtype):
    hidden, weight, labels = a_batch(dtype, device)
    rows, factor = hidden.float().clone(), torch.tensor(0.5, device=device).expand(TOKENS)
    states.scale_rows(rows, factor, rows, TargetTerm(torch.ones(TOKENS, device=device), weight, labels))
    torch.testing.assert_close(rows, 0.5 * (hidden.float() + weight[labels].float()))


def test_columns_further_apart_than_a_32_bit_offset_reaches(states, device):
    """A head kept as [H, V] has its columns V apart: H of them are 2^31 entries from 8192 x 262144 on."""
    apart = 1 << 30
    try:
        room = torch.empty(4 * apart + 1, dtype=torch.bfloat16, device=device)  # four pages of it are touched
    except RuntimeError:
        pytest.skip("no room for 2^32 entries")
    far = room.as_strided((1, 3), (3, apart), 2 * apart)
    far.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    room[0] = 0  # where an offset that wraps leads
    near, labels = torch.tensor([[1.0, 10.0, 100.0]], dtype=torch.bfloat16, device=device), torch.tensor([0], device=device)
    for hidden, weight in ((far, near), (near, far)):
        assert states.target_dots(hidden, weight, None, labels, torch.float32).item() == 321
    out, one = torch.empty(1, 3, device=device), torch.ones(1, device=device)
    states.scale_rows(far, one, out, TargetTerm(one, far, labels))
    assert out.tolist() == [[2.0, 4.0, 6.0]]


def test_no_rows_are_no_launch(states, device):
    hidden, weight, labels = (x[:0] for x in a_batch(torch.float32, device))
    assert states.target_dots(hidden, weight, None, labels, torch.float32).shape == (0,)
    states.scale_rows(hidden, hidden[:, 0], torch.empty_like(hidden))
