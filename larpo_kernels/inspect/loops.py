"""The loops of machine code, from its jumps alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import networkx as nx  # which comes with torch


@dataclass(frozen=True)
class Instruction:
    opcode: str
    labels: tuple[str, ...] = ()  # that stand before it
    jump: str | None = None  # label it may go to
    falls_through: bool = True  # whether the next instruction may come after it


class Body(NamedTuple):
    """What a loop runs itself, without the loops inside it."""

    all: list[Instruction]
    always: list[Instruction]  # those that no turn leaves out: not what stands behind a branch


def loops(code: list[Instruction]) -> list[Body]:
    """Each natural loop, in program order of where they begin.

    A jump back alone is no loop: compilers put rare code at the end and jump back from there. It is one if its goal
    dominates it, that is, if no way from the first instruction leads to the jump around the goal.
    """
    labels = {label: i for i, instruction in enumerate(code) for label in instruction.labels}
    flow, tree = _flow(code, labels), nx.DiGraph()
    if code:
        tree.add_node(0)
        dominators = nx.immediate_dominators(flow, 0)  # of what can be reached
        tree.add_edges_from((above, i) for i, above in dominators.items() if i != 0)
    bodies, always = {}, {}
    for head in sorted({labels[x.jump] for x in code if x.jump in labels}.intersection(tree)):
        dominated = nx.descendants(tree, head)
        tails = [i for i in flow.predecessors(head) if i in dominated or i == head]
        if tails:
            around = flow.subgraph(dominated)
            bodies[head] = {head}.union(tails, *(nx.ancestors(around, tail) for tail in tails if tail != head))
            always[head] = set.intersection(*(nx.ancestors(tree, tail) | {tail} for tail in tails))
    found = []
    for head, body in bodies.items():
        inside = [other for goal, other in bodies.items() if goal != head and goal in body]
        own = sorted(body.difference(*inside))
        found.append(Body([code[i] for i in own], [code[i] for i in own if i in always[head]]))
    return found


def _flow(code: list[Instruction], labels: dict[str, int]) -> nx.DiGraph:
    """From the index of each instruction to those that may come next."""
    flow = nx.DiGraph()
    flow.add_nodes_from(range(len(code)))
    for i, instruction in enumerate(code):
        if instruction.falls_through and i + 1 < len(code):
            flow.add_edge(i, i + 1)
        if instruction.jump in labels:
            flow.add_edge(i, labels[instruction.jump])
    return flow
