"""Neighbouring methods over the same kernels: one short file per method, each with a run that ends in minutes on a CPU.

    python -m larpo.recipes.selm --out results

>>> sorted(RECIPES)
['compound', 'copo', 'linvit', 'objectives', 'read', 'rlrf', 'selection', 'selm', 'twosome']
>>> RECIPES["twosome"].description
'TWOSOME (2401.14151): policy over valid actions, softmax of log-likelihood per token, word or action'

A recipe's module has `run(seeds, ...) -> dict` and `main(argv)`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple


class Recipe(NamedTuple):
    module: str
    description: str


RECIPES = {
    "objectives": Recipe(
        "larpo.recipes.objectives",
        "LiPO-lambda (2402.01878), SimPO (2405.14734), RRHF (2304.05302), PRO (2306.17492) beside LarPO's objectives",
    ),
    "selm": Recipe("larpo.recipes.selm", "SELM (2405.19332): optimistic exploration by the reference's own completions"),
    "copo": Recipe("larpo.recipes.copo", "COPO (2501.12735): exploration bonus from pseudo-counts of completions"),
    "rlrf": Recipe("larpo.recipes.rlrf", "RLRF (2403.14238): refinements by the policy itself as candidates"),
    "twosome": Recipe(
        "larpo.recipes.twosome",
        "TWOSOME (2401.14151): policy over valid actions, softmax of log-likelihood per token, word or action",
    ),
    "linvit": Recipe("larpo.recipes.linvit", "LINVIT (2402.16181): value iteration regularised by a language model's policy"),
    "read": Recipe("larpo.recipes.read", "ReAd (2405.14314): advantage-weighted plans of two cooperating agents"),
    "selection": Recipe("larpo.recipes.selection", "Self-Selection RAG (2502.06148): answers with and without passages"),
    "compound": Recipe("larpo.recipes.compound", "a compound system (2410.16392): choice of passage and of answer, two lists"),
}


def load(name: str) -> ModuleType:
    """The module of a recipe; ValueError for a name that is none."""
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}; got {name!r}")
    return importlib.import_module(RECIPES[name].module)
