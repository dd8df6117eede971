"""What is inspected. A new kernel is one entry of KERNELS: its name, a call of the backend that launches it on tensors
without data, and the variants of that call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from ..backends.arguments import CandidateArguments, ListwiseArguments, LogitRows, TargetTerm
from ..backends.triton import lists, rows, states, tiles
from ..linear import walk

IGNORE = -100
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCABULARY = {True: 32000, False: 32003}  # by alignment; rows that one program reads
BATCH = (4, 1024)  # candidates, tokens
TOKENS = {True: 4096, False: 4093}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# --- the launches ----------------------------------------------------------------------------------------------------


def forward(dtype, aligned, vocab_size=None, logit_scale=1.0, softcap=None, stats=False):
    logits, labels = empty(*BATCH, vocab_size or VOCABULARY[aligned], dtype=dtype), empty(*BATCH, dtype=torch.int64)
    rows.token_logps(LogitRows(logits, labels, None, False, IGNORE, logit_scale, softcap), stats)


def backward(dtype, aligned, logit_scale=1.0, softcap=None):
    logits, labels = empty(*BATCH, VOCABULARY[aligned], dtype=dtype), empty(*BATCH, dtype=torch.int64)
    grad, logps = empty(*BATCH), empty(*BATCH)
    given = LogitRows(logits, labels, None, False, IGNORE, logit_scale, softcap)
    rows.token_logps_backward(given, grad, logps, torch.empty_like(logits))


def candidate_logps(dtype, aligned, mean=False, padded=False):
    shape = (64, 64) if padded else (4096,)
    mean_mask = empty(*shape, dtype=torch.bool) if mean else None
    cu_tokens = None if padded else empty(65, dtype=torch.int64)
    lists.candidate_logps(CandidateArguments(empty(*shape), mean_mask, cu_tokens, "triton"))


def list_losses(dtype, aligned, objective, weighting="none", ties="order", list_size=0):
    """list_size: of every list; 0: their borders are given."""
    scores, relevance = empty(64), empty(64, dtype=torch.float64)
    cu_lists = None if list_size else empty(9, dtype=torch.int64)
    of_objective = (0.1, objective, weighting, 0, 1.0, ties)
    layout = (None, None, cu_lists, list_size)
    lists.scores_and_listwise_loss(ListwiseArguments(scores, *layout, relevance, None, *of_objective, "none", "triton"))


def tile(dtype, aligned, again=False, bias=False, softcap=None, stats=False, for_grad=True, step=None):
    """A tile of 2048 vocabulary rows: formed (step None), formed again, or `step` done with it."""
    tokens, hidden_size, vocabulary = TOKENS[aligned], 256, VOCABULARY[True]
    weight = empty(vocabulary, hidden_size, dtype=dtype)
    head = walk.Head(weight, empty(vocabulary, dtype=dtype) if bias else None, 1.0, softcap, dtype)
    hidden, labels = empty(tokens, hidden_size, dtype=dtype), empty(tokens, dtype=torch.int64)
    e = empty(2048, tokens, dtype=dtype)
    if again:
        tiles.Tiles(head, hidden, labels, empty(tokens), empty(tokens)).form_again(0, weight[:2048], e, empty(tokens))
        return
    formed = tiles.ForwardTiles(head, hidden, labels, stats=stats)
    if step == "rescale":
        tiles.Rescale(empty(tokens)).apply(hidden.float())
    elif step == "put_target":
        formed.put_target(e, 0, empty(tokens))
    elif step == "shares":
        formed.shares(e, tokens)
    else:
        formed.form(0, weight[:2048], e, for_grad)


def target_dots(dtype, aligned, bias=False):
    width = 4096 if aligned else 4093
    weight = empty(VOCABULARY[True], width, dtype=dtype)
    labels = empty(TOKENS[True], dtype=torch.int64)
    hidden, biases = empty(TOKENS[True], width, dtype=dtype), empty(VOCABULARY[True], dtype=dtype) if bias else None
    states.target_dots(hidden, weight, biases, labels, torch.float32)


def scale_rows(dtype, aligned, widened=False, targets=False):
    """Hidden states times what each token weighs; widened: d hidden, summed in float32, with or without its targets."""
    width, tokens = 4096 if aligned else 4093, TOKENS[True]
    out = empty(tokens, width, dtype=dtype)
    x = empty(tokens, width) if widened else out
    weight, labels = empty(VOCABULARY[True], width, dtype=dtype), empty(tokens, dtype=torch.int64)
    more = TargetTerm(empty(tokens), weight, labels) if targets else None
    states.scale_rows(x, empty(tokens), out, more)


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    name: str  # of the @triton.jit function
    launch: Callable  # (dtype, aligned, **variant)
    variants: dict[str, dict]
    dtypes: tuple[str, ...] = tuple(DTYPES)  # of the logits; empty for a kernel that reads none, and float32 only
    misaligned: bool = False  # whether the first variant is compiled for misaligned rows too


LONG_ROWS = {"vocab_size": 128256}  # several programs share a row
ROWS = {"plain": {}, "scale": {"logit_scale": 0.5}, "softcap": {"softcap": 30.0}}
STATS = {"stats": {"stats": True}}
OBJECTIVES = {name: {"objective": name} for name in ("pairwise", "contrastive", "listmle", "lambdarank", "listnet")}
OBJECTIVES |= {f"lambdarank-{w}": {"objective": "lambdarank", "weighting": w} for w in ("dcg", "dcg2")}
OBJECTIVES |= {f"{name}-mean": {"objective": name, "ties": "mean"} for name in ("pairwise", "contrastive")}
OBJECTIVES |= {"listmle-efron": {"objective": "listmle", "ties": "efron"}}
TILE_DTYPES = ("bf16", "fp32")  # linear/dtypes.py: compute_dtype knows no others

KERNELS = (
    Kernel(
        "token_logps_forward",
        forward,
        ROWS | STATS | {"split": LONG_ROWS, "split-stats": LONG_ROWS | {"stats": True}},
        misaligned=True,
    ),
    Kernel("merge_splits", forward, {"plain": LONG_ROWS, "stats": LONG_ROWS | {"stats": True}}),
    Kernel("token_logps_backward", backward, ROWS, misaligned=True),
    Kernel(
        "candidate_logps",
        candidate_logps,
        {"sum": {}, "mean": {"mean": True}, "padded": {"padded": True}, "padded-mean": {"padded": True, "mean": True}},
        dtypes=(),
    ),
    Kernel(
        "list_losses",
        list_losses,
        OBJECTIVES | {f"{name}-of-one-size": options | {"list_size": 8} for name, options in OBJECTIVES.items()},
        dtypes=(),
    ),
    Kernel(
        "exp_tile",
        tile,
        {
            "plain": {},
            "bias": {"bias": True},
            "softcap": {"softcap": 30.0},
            "stats": {"stats": True},
            "again": {"again": True},
            "again-softcap": {"again": True, "softcap": 30.0},
        },
        TILE_DTYPES,
        misaligned=True,
    ),
    Kernel("merge_spans", tile, {"plain": {}, "stats": {"stats": True}}, TILE_DTYPES),
    Kernel("level_spans", tile, {"plain": {}}, TILE_DTYPES, misaligned=True),
    Kernel("rescale", tile, {"plain": {"step": "rescale"}}, TILE_DTYPES),
    Kernel("put_target", tile, {"plain": {"step": "put_target"}}, TILE_DTYPES),
    Kernel("target_dots", target_dots, {"plain": {}, "bias": {"bias": True}}, TILE_DTYPES, misaligned=True),
    Kernel(
        "scale_rows",
        scale_rows,
        {"plain": {}, "d-hidden": {"widened": True, "targets": True}, "fused-hidden-grad": {"widened": True}},
        TILE_DTYPES,
        misaligned=True,
    ),
    Kernel("row_shares", tile, {"plain": {"step": "shares"}}, TILE_DTYPES, misaligned=True),
)


@dataclass(frozen=True)
class Case:
    kernel: str
    variant: str
    dtype: str
    aligned: bool
    itemsize: int | None  # bytes of a logit, None where the kernel reads none
    launch: Callable[[], None]


def choose(patterns: Sequence[str] | None = None, dtypes: Sequence[str] | None = None) -> Iterator[Case]:
    """The launches that are inspected: of kernels that fit a pattern, with logits of these dtypes or without logits."""
    known = {f"{kernel.name}/{variant}" for kernel in KERNELS for variant in kernel.variants}
    for pattern in patterns or ():
        if not any(_fits(name, pattern) for name in known):
            raise ValueError(f"kernels must fit some of {sorted(known)}, got {pattern!r}")
    for dtype in dtypes or ():
        if dtype not in DTYPES:
            raise ValueError(f"dtypes must be among {list(DTYPES)}, got {dtype!r}")
    for kernel in KERNELS:
        for i, (variant, options) in enumerate(kernel.variants.items()):
            if patterns is not None and not any(_fits(f"{kernel.name}/{variant}", pattern) for pattern in patterns):
                continue
            for aligned in (True, False) if i == 0 and kernel.misaligned else (True,):
                for dtype in kernel.dtypes or ("fp32",):
                    if dtypes is None or dtype in dtypes or not kernel.dtypes:
                        launch = partial(kernel.launch, DTYPES[dtype], aligned, **options)
                        itemsize = DTYPES[dtype].itemsize if kernel.dtypes else None
                        yield Case(kernel.name, variant, dtype, aligned, itemsize, launch)


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.split("/")[0], pattern)
