"""Neighbouring methods over the same kernels: one short file per method, each with a run that ends in minutes on a CPU.

    python -m larpo.recipes.selm --out results

A recipe's module has `run(seeds, ...) -> dict` and `main(argv)`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

# name -> what it is
RECIPES = {
    "objectives": "LiPO-lambda (2402.01878), SimPO (2405.14734), RRHF (2304.05302), PRO (2306.17492) beside LarPO's objectives",
    "selm": "SELM (2405.19332): optimistic exploration by the reference's own completions",
    "copo": "COPO (2501.12735): exploration bonus from pseudo-counts of completions",
    "rlrf": "RLRF (2403.14238): refinements by the policy itself as candidates",
    "twosome": "TWOSOME (2401.14151): policy over valid actions, softmax of log-likelihood per token, word or action",
    "linvit": "LINVIT (2402.16181): value iteration regularised by a language model's policy",
    "read": "ReAd (2405.14314): advantage-weighted plans of two cooperating agents",
    "selection": "Self-Selection RAG (2502.06148): answers with and without passages",
    "compound": "a compound system (2410.16392): choice of passage and of answer, two lists",
}


def load(name: str) -> ModuleType:
    """The module of a recipe; ValueError for a name that is none."""
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}; got {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
