"""The loops of machine code, from its jumps alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


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
    follows = _followers(code)
    comes_from: list[list[int]] = [[] for _ in code]
    for i, followers in enumerate(follows):
        for j in followers:
            comes_from[j].append(i)
    dominators = _dominators(comes_from)
    bodies: dict[int, set[int]] = {}
    always: dict[int, int] = {}
    for i, followers in enumerate(follows):
        for head in followers:
            if dominators[i] is not None and dominators[i] >> head & 1:
                bodies.setdefault(head, set()).update(_body(head, i, comes_from))
                always[head] = always.get(head, -1) & dominators[i]
    found = []
    for head, body in sorted(bodies.items()):
        inside = [other for goal, other in bodies.items() if goal != head and goal in body]
        own = sorted(body.difference(*inside))
        found.append(Body([code[i] for i in own], [code[i] for i in own if always[head] >> i & 1]))
    return found


def _followers(code: list[Instruction]) -> list[list[int]]:
    at = {label: i for i, instruction in enumerate(code) for label in instruction.labels}
    follows = []
    for i, instruction in enumerate(code):
        after = [i + 1] if instruction.falls_through and i + 1 < len(code) else []
        if instruction.jump in at:
            after.append(at[instruction.jump])
        follows.append(after)
    return follows


def _dominators(comes_from: list[list[int]]) -> list[int | None]:
    """Of each instruction the set of those on every way to it, as bits; None if no way leads there."""
    bits: list[int | None] = [None] * len(comes_from)
    if not bits:
        return bits
    bits[0] = 1
    changed = True
    while changed:
        changed = False
        for i in range(1, len(bits)):
            known = [bits[j] for j in comes_from[i] if bits[j] is not None]
            if not known:
                continue
            common = known[0]
            for other in known[1:]:
                common &= other
            if bits[i] != common | 1 << i:
                bits[i], changed = common | 1 << i, True
    return bits


def _body(head: int, tail: int, comes_from: list[list[int]]) -> set[int]:
    """Everything from which `tail` is reached without passing `head`."""
    body, todo = {head}, [tail]
    while todo:
        i = todo.pop()
        if i not in body:
            body.add(i)
            todo += comes_from[i]
    return body
