"""Two agents in a corridor with one bay: Ann starts at one and wants to five, Ben starts at five and wants to one.

           bay
    one two three four five

They cannot pass but through the bay, so one of them has to let the other by.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from transformers import PreTrainedTokenizerFast

from . import toy_lm

CELLS = ("one", "two", "three", "four", "five", "bay")
BAY, DOOR = 5, 2
ACTIONS = ("west", "east", "north", "south", "wait")
START, GOAL = (0, 4), (4, 0)
STATES = [(ann, ben) for ann in range(len(CELLS)) for ben in range(len(CELLS)) if ann != ben]
PLACE = {state: i for i, state in enumerate(STATES)}


def move(cell: int, action: int, other: int) -> int:
    """The cell after the action; a wall or the other agent keeps one where one is.

    >>> CELLS[move(2, ACTIONS.index("north"), 0)], CELLS[move(2, ACTIONS.index("east"), 3)]
    ('bay', 'three')
    """
    name = ACTIONS[action]
    after = cell
    if cell == BAY:
        after = DOOR if name == "south" else cell
    elif name == "north" and cell == DOOR:
        after = BAY
    elif name in ("west", "east"):
        after = cell + (1 if name == "east" else -1)
        after = after if 0 <= after < BAY else cell
    return cell if after == other else after


def fewest_steps() -> int:
    """Steps of the shortest way to have both agents on their goals, Ann moving first in each.

    >>> fewest_steps()
    7
    """
    reached, steps = {START}, 0
    while GOAL not in reached:
        pairs = {(move(ann, a, ben), ben) for ann, ben in reached for a in range(len(ACTIONS))}
        reached |= {(ann, move(ben, b, ann)) for ann, ben in pairs for b in range(len(ACTIONS))}
        steps += 1
    return steps


def prompt(state: tuple[int, int], ann_does: int | None = None) -> str:
    """What the planner reads for Ann's action, or for Ben's once Ann's is known.

    >>> prompt((0, 4), 1)
    'ann at one ben at five : ann east ben'
    """
    told = f"ann at {CELLS[state[0]]} ben at {CELLS[state[1]]} : ann"
    return told if ann_does is None else f"{told} {ACTIONS[ann_does]} ben"


# The planner's prompts: Ann's in each state, then Ben's in each state for each action of hers.
PROMPTS = [prompt(state, ann_does) for ann_does in (None, *range(len(ACTIONS))) for state in STATES]


def place_of(state: int, ann_does: int | None = None) -> int:
    """The place of a prompt among PROMPTS; state: its place among STATES.

    >>> PROMPTS[place_of(PLACE[0, 4], ann_does=1)]
    'ann at one ben at five : ann east ben'
    """
    return state if ann_does is None else len(STATES) * (1 + ann_does) + state


def episode(act: Callable[[int], int], most_steps: int) -> tuple[int, list[tuple[int, int]]]:
    """Steps taken (most_steps + 1 where there is no success), and (place of the prompt, action) of Ann and of Ben at each.

    act: the place of a prompt -> the action.
    """
    ann, ben = START
    taken = []
    for step in range(1, most_steps + 1):
        state = PLACE[ann, ben]
        hers = act(place_of(state))
        his = act(place_of(state, hers))
        taken += [(place_of(state), hers), (place_of(state, hers), his)]
        ann = move(ann, hers, ben)
        ben = move(ben, his, ann)
        if (ann, ben) == GOAL:
            return step, taken
    return most_steps + 1, taken


def selfish(draw: random.Random) -> tuple[str, str]:
    """A line to learn from: an agent that heads for its own goal two times out of three and never thinks of the other."""
    state, ann_does = draw.choice(STATES), draw.choice([None, *range(len(ACTIONS))])
    cell, ahead = (state[0], "east") if ann_does is None else (state[1], "west")
    ahead = "south" if cell == BAY else ahead
    return prompt(state, ann_does), ahead if draw.random() < 2 / 3 else ACTIONS[draw.randrange(len(ACTIONS))]


def tokenizer() -> PreTrainedTokenizerFast:
    return toy_lm.tokenizer(["ann", "ben", "at", ":", *CELLS, *ACTIONS])
