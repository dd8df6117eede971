"""Rows of every known form, and the list that each is. All of them are written for these tests; none is of a data set."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


class Example(NamedTuple):
    rows: list[dict[str, Any]]  # one, or those that are one list
    prompt: Any
    completions: list[Any]
    scores: list[float]
    source: list[str] | None = None


ASK = "Which bird can't fly?"
TURN = [user(ASK)]
PENGUIN, KIWI, EAGLE = "A penguin.", "A kiwi, I think.", "An eagle."
SYSTEM = {"role": "system", "content": "Be brief."}


def rated(text, model, fine, overall, aspects):
    annotations = {aspect: {"Rating": rating, "Rationale": "..."} for aspect, rating in aspects.items()}
    return {"model": model, "response": text, "fine-grained_score": fine, "overall_score": overall, "annotations": annotations}


def aspects(*ratings):
    return dict(zip(("instruction_following", "honesty", "truthfulness", "helpfulness"), ratings, strict=True))


def battle(text):
    return [*TURN, assistant(text), user("Sure?"), assistant("Yes.")]


EXAMPLES: dict[str, Example] = {
    "lists": Example(
        [{"prompt": ASK, "completions": [PENGUIN, EAGLE], "scores": [1, -0.5]}], ASK, [PENGUIN, EAGLE], [1.0, -0.5]
    ),
    "UltraFeedback": Example(
        [
            {
                "source": "birds",
                "instruction": ASK,
                "models": ["m-1", "m-2", "m-3"],
                "completions": [
                    rated(PENGUIN, "m-1", 4.5, 9.0, aspects("5", "4", "5", "4")),
                    rated(KIWI, "m-2", 3.25, 7.5, aspects("3", "4", "3", "3")),
                    rated(EAGLE, "m-3", 1.0, 10.0, aspects("1", "1", "1", "1")),
                ],
            }
        ],
        TURN,
        [PENGUIN, KIWI, EAGLE],
        [4.5, 3.25, 1.0],
        ["m-1", "m-2", "m-3"],
    ),
    "Nectar": Example(
        [
            {
                "prompt": f"\n\nHuman: Hi \n\nAssistant: Hello! \n\nHuman: {ASK} \n\nAssistant: ",
                "answers": [
                    {"answer": EAGLE, "model": "m-3", "rank": 3.0},
                    {"answer": PENGUIN, "model": "m-1", "rank": 1.0},
                    {"answer": KIWI, "model": "m-2", "rank": 2.0},
                ],
                "turns": 2,
            }
        ],
        [user("Hi"), assistant("Hello!"), *TURN],
        [EAGLE, PENGUIN, KIWI],
        [0.0, 2.0, 1.0],
        ["m-3", "m-1", "m-2"],
    ),
    "NeMo-RL": Example(
        [
            {
                "context": TURN,
                "completions": [
                    {"rank": 0, "completion": [assistant(PENGUIN)]},
                    {"rank": 2, "completion": [assistant(EAGLE)]},
                    {"rank": 1, "completion": [assistant(KIWI)]},
                ],
            }
        ],
        TURN,
        [[assistant(PENGUIN)], [assistant(EAGLE)], [assistant(KIWI)]],
        [2.0, 0.0, 1.0],
    ),
    "distilabel": Example(
        [{"instruction": ASK, "generations": [PENGUIN, EAGLE], "ratings": [5, 1], "model_names": ["m-1", "m-2"]}],
        TURN,
        [PENGUIN, EAGLE],
        [5.0, 1.0],
        ["m-1", "m-2"],
    ),
    "distilabel, older": Example(
        [{"system": "Be brief.", "input": ASK, "generations": [PENGUIN, EAGLE], "rating": [9.0, 3.5]}],
        [SYSTEM, *TURN],
        [PENGUIN, EAGLE],
        [9.0, 3.5],
    ),
    "rated candidates": Example(
        [{"prompt": ASK, "all_generated_responses": [PENGUIN, KIWI, EAGLE], "all_rm_scores": [0.5, 0.25, -1.0]}],
        ASK,
        [PENGUIN, KIWI, EAGLE],
        [0.5, 0.25, -1.0],
    ),
    "rewarded responses": Example(
        [{"prompt": ASK, "responses": [PENGUIN, EAGLE], "rewards": [0.5, -1.0]}], ASK, [PENGUIN, EAGLE], [0.5, -1.0]
    ),
    "scored responses": Example(
        [{"prompt": ASK, "responses": [PENGUIN, EAGLE], "scores": [0.5, -1.0]}], ASK, [PENGUIN, EAGLE], [0.5, -1.0]
    ),
    "RRHF": Example([{"query": ASK, "responses": [PENGUIN, EAGLE], "scores": [0.5, -1.0]}], ASK, [PENGUIN, EAGLE], [0.5, -1.0]),
    "HelpSteer2": Example(
        [
            {
                "prompt": f"Hi\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\n{ASK}",
                "response": text,
                "helpfulness": helpfulness,
                "correctness": helpfulness,
                "coherence": 4,
                "complexity": 1,
                "verbosity": verbosity,
            }
            for text, helpfulness, verbosity in ((PENGUIN, 4, 1), (EAGLE, 1, 3))
        ],
        [user("Hi"), assistant("Hello!"), *TURN],
        [PENGUIN, EAGLE],
        [4.0, 1.0],
    ),
    "HelpSteer3": Example(
        [{"domain": "general", "context": TURN, "response1": PENGUIN, "response2": EAGLE, "overall_preference": -2}],
        TURN,
        [PENGUIN, EAGLE],
        [2.0, 0.0],
    ),
    "HelpSteer2-Preference": Example(
        [{"prompt": ASK, "response_1": EAGLE, "response_2": PENGUIN, "preference_strength": 3}],
        TURN,
        [EAGLE, PENGUIN],
        [0.0, 3.0],
    ),
    "PKU-SafeRLHF": Example(
        [
            {
                "prompt": ASK,
                "response_0": EAGLE,
                "response_1": PENGUIN,
                "response_0_source": "m-0",
                "response_1_source": "m-1",
                "is_response_0_safe": True,
                "is_response_1_safe": True,
                "better_response_id": 1,
                "safer_response_id": 0,
            }
        ],
        TURN,
        [EAGLE, PENGUIN],
        [0.0, 1.0],
        ["m-0", "m-1"],
    ),
    "SHP": Example(
        [
            {
                "post_id": "x1",
                "history": ASK,
                "human_ref_A": PENGUIN,
                "human_ref_B": EAGLE,
                "score_A": 42,
                "score_B": 7,
                "labels": 1,
            }
        ],
        TURN,
        [PENGUIN, EAGLE],
        [42.0, 7.0],
    ),
    "arena": Example(
        [
            {
                "model_a": "m-1",
                "model_b": "m-2",
                "winner": "model_b",
                "conversation_a": battle(EAGLE),
                "conversation_b": battle(PENGUIN),
            }
        ],
        TURN,
        [battle(EAGLE)[1:], battle(PENGUIN)[1:]],
        [0.0, 1.0],
        ["m-1", "m-2"],
    ),
    "arena-55k": Example(
        [
            {
                "id": 7,
                "model_a": "m-1",
                "model_b": "m-2",
                "prompt": json.dumps([ASK, "Sure?"]),
                "response_a": json.dumps([PENGUIN, "Yes."]),
                "response_b": json.dumps([EAGLE, "Yes."]),
                "winner_model_a": 1,
                "winner_model_b": 0,
                "winner_tie": 0,
            }
        ],
        TURN,
        [battle(PENGUIN)[1:], battle(EAGLE)[1:]],
        [1.0, 0.0],
        ["m-1", "m-2"],
    ),
    "ms-swift": Example(
        [{"messages": [SYSTEM, *TURN, assistant(PENGUIN)], "rejected_response": EAGLE}],
        [SYSTEM, *TURN],
        [[assistant(PENGUIN)], [assistant(EAGLE)]],
        [1.0, 0.0],
    ),
    "ms-swift, messages": Example(
        [{"messages": [*TURN, assistant(PENGUIN)], "rejected_messages": [*TURN, assistant(EAGLE)]}],
        TURN,
        [[assistant(PENGUIN)], [assistant(EAGLE)]],
        [1.0, 0.0],
    ),
    "ms-swift, query": Example(
        [{"system": "Be brief.", "history": [], "query": ASK, "response": PENGUIN, "rejected_response": EAGLE}],
        [SYSTEM, *TURN],
        [PENGUIN, EAGLE],
        [1.0, 0.0],
    ),
    "LLaMA-Factory, sharegpt": Example(
        [
            {
                "conversations": [{"from": "human", "value": ASK}],
                "chosen": {"from": "gpt", "value": PENGUIN},
                "rejected": {"from": "gpt", "value": EAGLE},
            }
        ],
        TURN,
        [[assistant(PENGUIN)], [assistant(EAGLE)]],
        [1.0, 0.0],
    ),
    "LLaMA-Factory, alpaca": Example(
        [
            {
                "system": "Be brief.",
                "instruction": "Answer.",
                "input": ASK,
                "history": [["Hi", "Hello!"]],
                "chosen": PENGUIN,
                "rejected": EAGLE,
            }
        ],
        [SYSTEM, user("Hi"), assistant("Hello!"), user(f"Answer.\n{ASK}")],
        [PENGUIN, EAGLE],
        [1.0, 0.0],
    ),
    "LLaMA-Factory, ranked": Example(
        [{"instruction": ASK, "input": "", "output": [PENGUIN, KIWI, EAGLE]}], TURN, [PENGUIN, KIWI, EAGLE], [2.0, 1.0, 0.0]
    ),
    "Orca-DPO": Example(
        [{"system": "Be brief.", "question": ASK, "chosen": PENGUIN, "rejected": EAGLE}],
        [SYSTEM, *TURN],
        [PENGUIN, EAGLE],
        [1.0, 0.0],
    ),
    "pairs": Example(
        [{"prompt": ASK, "chosen": PENGUIN, "rejected": EAGLE, "chosen_rating": 4.5, "rejected_rating": 2}],
        ASK,
        [PENGUIN, EAGLE],
        [4.5, 2.0],
    ),
    "unpaired": Example(
        [
            {"prompt": ASK, "completion": text, "label": label}
            for text, label in ((PENGUIN, True), (EAGLE, False), (KIWI, True))
        ],
        ASK,
        [PENGUIN, EAGLE, KIWI],
        [1.0, 0.0, 1.0],
    ),
}
