"""benchmarks/tail.py and tail_learning.py: what docs/numerics.md says of gradients over the rows that matter."""

import json

import pytest
import torch

for package in ("transformers", "datasets", "typer"):
    pytest.importorskip(package)

from benchmarks import tail, tail_learning
from larpo.config import LarPOConfig

FOUND = json.loads((tail.DOCS / "tail.json").read_text())
LEARNED = json.loads((tail.DOCS / "tail_learning.json").read_text())
MEASURED = [row for row in FOUND if row["threshold"] is not None]
VOCAB = 49152


def test_the_page_holds_what_was_recorded():
    page = (tail.DOCS / "numerics.md").read_text(encoding="utf-8")
    assert tail.written(page, FOUND, LEARNED) == page


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['text']}-{row['tokens']}-{row['threshold']}")
def test_the_bounds_that_are_stated_hold(row):
    rounding = 1e-5
    assert row["largest mass"] <= (1 - row["kept"]) * VOCAB * tail.THRESHOLDS[row["threshold"]] + rounding
    assert row["merged into 1"] <= row["bound of d hidden"] + rounding
    assert row["d weight"] <= row["bound of d weight"] + rounding


def block() -> tail.Block:
    """1024 words, of which each token likes some and a block many: a share is left out at 1e-3."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(48, 16, generator=generator), torch.randn(1024, 16, generator=generator)
    weight += 2 * torch.randn(16, generator=generator)  # what all rows share
    labels = (1.5 * hidden @ weight.T).softmax(1).multinomial(1, generator=generator)[:, 0]
    return tail.Block(1.5 * hidden, weight, labels, torch.randn(48, generator=generator))


def test_leaving_nothing_out_costs_nothing():
    one = block()
    row = tail.in_theory(one, tail.exact(one), 1e-12, {1: tail.groups_of(one.weight, 1)})
    assert row["kept"] == 1
    assert row["dropped"] == row["merged into 1"] == row["d weight"] == row["largest mass"] == 0


def test_a_group_for_every_row_costs_d_hidden_nothing():
    one = block()
    row = tail.in_theory(one, tail.exact(one), 1e-2, {1: torch.zeros(1024, dtype=torch.int64), 1024: torch.arange(1024)})
    assert row["kept"] < 0.9
    assert row["merged into 1024"] < 1e-6 < 1e-3 < row["merged into 1"] < row["dropped"]


@pytest.mark.parametrize("settings", tail_learning.ARMS.values(), ids=list(tail_learning.ARMS))
def test_every_arm_is_a_setting(settings, tmp_path):
    args = LarPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert all(getattr(args, name) == value for name, value in settings.items())
