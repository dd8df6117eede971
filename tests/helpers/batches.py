"""Lists of candidates to test on: ragged lists of ragged candidates, padded or packed."""

from dataclasses import dataclass, replace

import torch

from tests.helpers.regimes import REGIMES

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """S candidates in lists, one after the other, padded to T tokens."""

    logits: torch.Tensor  # [S, T, V]
    labels: torch.Tensor  # [S, T], IGNORE in prompts and padding
    relevance: torch.Tensor  # [S]
    ref_logps: torch.Tensor  # [S]
    lengths: tuple[int, ...]  # tokens per candidate, its prompt included
    list_sizes: tuple[int, ...]
    cu_seqlens: torch.Tensor | None = None  # [S + 1] once packed; logits are [N, V] and labels [N] then

    def packed(self):
        """The same candidates without their padding."""
        rows = [(s, slice(0, length)) for s, length in enumerate(self.lengths)]
        ends = torch.tensor([0, *self.lengths]).cumsum(0).to(self.labels.device)
        return replace(
            self,
            logits=torch.cat([self.logits[row] for row in rows]) if rows else self.logits.flatten(0, 1),
            labels=torch.cat([self.labels[row] for row in rows]) if rows else self.labels.flatten(),
            cu_seqlens=ends,
        )

    def with_logits(self, logits):
        return replace(self, logits=logits)

    def lists(self, order):
        """The lists numbered in `order`, in that order (padded batches)."""
        starts = torch.tensor([0, *self.list_sizes]).cumsum(0).tolist()
        rows = [s for i in order for s in range(starts[i], starts[i + 1])]
        return replace(
            self,
            logits=self.logits[rows],
            labels=self.labels[rows],
            relevance=self.relevance[rows],
            ref_logps=self.ref_logps[rows],
            lengths=tuple(self.lengths[s] for s in rows),
            list_sizes=tuple(self.list_sizes[i] for i in order),
        )

    @property
    def data(self):
        """Positional arguments of fused_listwise_loss."""
        return self.logits, self.labels, self.relevance

    @property
    def layout(self):
        """Keywords that say where candidates and lists begin and end."""
        keywords = {"list_sizes": list(self.list_sizes)}
        return keywords if self.cu_seqlens is None else {**keywords, "cu_seqlens": self.cu_seqlens}


def make_batch(
    list_sizes=(3, 1, 2),
    lengths=None,
    vocabulary=31,
    dtype=torch.float32,
    device="cpu",
    regime="initialisation",
    prompt=1,
    padding=1,
    seed=0,
):
    """`lengths` default to 2, 3, 4, 2, ...; the first `prompt` tokens of each and the padding are ignored."""
    generator = torch.Generator().manual_seed(seed)
    candidates = sum(list_sizes)
    lengths = tuple(2 + s % 3 for s in range(candidates)) if lengths is None else tuple(lengths)
    width = max(lengths, default=0) + padding
    labels = torch.randint(0, vocabulary, (candidates, width), generator=generator)
    place = torch.arange(width)
    for s, length in enumerate(lengths):
        labels[s, (place < prompt) | (place >= length)] = IGNORE
    return Batch(
        logits=REGIMES[regime](labels, vocabulary, generator).to(device, dtype),
        labels=labels.to(device),
        relevance=torch.randn(candidates, generator=generator).to(device),
        ref_logps=(-torch.rand(candidates, generator=generator) * 10).to(device),
        lengths=lengths,
        list_sizes=tuple(list_sizes),
    )


def leaf(tensor):
    """A copy that collects its gradient."""
    return tensor.detach().clone().requires_grad_()


def gradient(function, logits, upstream=None):
    """d <upstream, function(logits)> / d logits, with ones for upstream by default."""
    logits = leaf(logits)
    out = function(logits)
    return torch.autograd.grad(out, logits, torch.ones_like(out) if upstream is None else upstream.to(out))[0]
