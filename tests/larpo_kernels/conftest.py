"""One list of plain numbers at a time, under any objective; and a compiler that has compiled nothing."""

import pytest
import torch

import larpo_kernels as lk
from tests.helpers.list_losses import OBJECTIVES


@pytest.fixture(params=[name for name in OBJECTIVES if name not in ("lambdarank_dcg_k", "lambdarank_dcg2_k", "listnet_cold")])
def name(request):
    """Each objective once; cut-offs and temperatures are compared with the loops."""
    return request.param


@pytest.fixture
def loss_of(backend, device):
    """One list of plain numbers -> its loss as a plain number."""

    def loss_of(scores, relevance, objective):
        scores, relevance = (torch.tensor(x, dtype=torch.float32, device=device) for x in (scores, relevance))
        return lk.listwise_loss(scores, relevance, list_sizes=len(scores), objective=objective, backend=backend).item()

    return loss_of


@pytest.fixture
def gradient_of(backend, device):
    """One list of plain numbers -> the gradient of its loss, a list of plain numbers."""

    def gradient_of(scores, relevance, objective):
        scores, relevance = (torch.tensor(x, dtype=torch.float32, device=device) for x in (scores, relevance))
        scores.requires_grad_()
        lk.listwise_loss(scores, relevance, list_sizes=len(scores), objective=objective, backend=backend).backward()
        return scores.grad.tolist()

    return gradient_of


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
