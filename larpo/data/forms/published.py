"""The forms that are known, in the order in which they are tried: whole lists before the pairs that were made of them.

Each is what the cards of its data sets and the code that reads them say; a form of one's own is read with `columns=`.
"""

from __future__ import annotations

from .answers import arena, arena_turns, swift_messages, swift_response
from .form import Form
from .prompts import AfterHistory, Turns, extra_id, human_assistant
from .scores import Fixed, InOrder, Label, Margin, Numbers, OneHot, Preference, Ranks, Scores, Winner

FIRST_IS_BETTER = Fixed((1.0, 0.0))
MARGIN_OR_ORDER: dict[str, Scores] = {"margin": Margin(), "preference": FIRST_IS_BETTER}
# What pairs of chosen and rejected are scored by, under the names that TRL, argilla, distilabel and OpenRLHF give it.
PAIR_SCORES: dict[str, Scores] = {
    "score_chosen": Numbers(("score_chosen", "score_rejected")),
    "chosen_score": Numbers(("chosen_score", "rejected_score")),
    "chosen_rating": Numbers(("chosen_rating", "rejected_rating")),
    "chosen-rating": Numbers(("chosen-rating", "rejected-rating")),
    "rating_chosen": Numbers(("rating_chosen", "rating_rejected")),
    **MARGIN_OR_ORDER,
}
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ULTRAFEEDBACK = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def _lists(name: str, of: str, prompt: str, answers: str, scores: str) -> Form:
    """A column of prompts, one of lists of answers and one of lists of numbers."""
    return Form(
        name=name,
        of=of,
        columns=(prompt, answers, scores),
        prompt=prompt,
        answers=(f"{answers}[]",),
        scores={scores: Numbers((f"{scores}[]",))},
    )


FORMS: tuple[Form, ...] = (
    Form(
        name="lists",
        of="larpo itself",
        columns=("prompt", "completions", "scores"),
        prompt="prompt",
        answers=("completions[]",),
        scores={"scores": Numbers(("scores[]",))},
        native=True,
    ),
    Form(
        name="UltraFeedback",
        of="openbmb/UltraFeedback (MIT)",
        columns=("instruction", "completions"),
        prompt="instruction",
        answers=("completions[].response",),
        scores={
            # overall_score has known errors: a 10 where a 1 was meant
            "fine-grained_score": Numbers(("completions[].fine-grained_score",), gaps=True),
            "overall_score": Numbers(("completions[].overall_score",), gaps=True),
        }
        | {aspect: Numbers((f"completions[].annotations.{aspect}.Rating",), gaps=True) for aspect in ULTRAFEEDBACK},
        source=("completions[].model",),
        chat=True,
        gaps=True,
    ),
    Form(
        name="Nectar",
        of="berkeley-nest/Nectar (Apache 2.0)",
        columns=("prompt", "answers"),
        prompt=human_assistant,
        answers=("answers[].answer",),
        scores={"rank": Ranks(("answers[].rank",))},
        source=("answers[].model",),
        chat=True,
    ),
    Form(
        name="NeMo-RL",
        of="files for NVIDIA's NeMo-RL",
        columns=("context", "completions"),
        prompt=Turns("context"),
        answers=("completions[].completion",),
        scores={"rank": Ranks(("completions[].rank",)), "reward": Numbers(("completions[].reward",))},
    ),
    Form(
        name="distilabel",
        of="argilla's distilabel, task UltraFeedback",
        columns=("instruction", "generations", "ratings"),
        prompt="instruction",
        answers=("generations[]",),
        scores={"ratings": Numbers(("ratings[]",), gaps=True)},
        source=("model_names[]",),
        also=("prompt", "generation_models"),
        chat=True,
        gaps=True,
    ),
    Form(
        name="distilabel, older",
        of="argilla/distilabel-intel-orca-dpo-pairs (Apache 2.0)",
        columns=("input", "generations", "rating"),
        prompt="input",
        answers=("generations[]",),
        scores={"rating": Numbers(("rating[]",), gaps=True)},
        chat=True,
        gaps=True,
    ),
    _lists(
        "rated candidates",
        "princeton-nlp/llama3-ultrafeedback-armorm (MIT)",
        "prompt",
        "all_generated_responses",
        "all_rm_scores",
    ),
    _lists("rewarded responses", "reward models over samples", "prompt", "responses", "rewards"),
    _lists("scored responses", "reward models over samples", "prompt", "responses", "scores"),
    _lists("RRHF", "files for RRHF", "query", "responses", "scores"),
    Form(
        name="HelpSteer2",
        of="nvidia/HelpSteer2, nvidia/HelpSteer (CC BY 4.0)",
        columns=("prompt", "response", "helpfulness"),
        prompt=extra_id,
        answers=("response",),
        scores={attribute: Numbers((attribute,)) for attribute in HELPSTEER},
        group_by="prompt",
        chat=True,
    ),
    Form(
        name="HelpSteer3",
        of="nvidia/HelpSteer3, config preference (CC BY 4.0)",
        columns=("context", "response1", "response2", "overall_preference"),
        prompt=Turns("context"),
        answers=("response1", "response2"),
        scores={"overall_preference": Preference("overall_preference")},
    ),
    Form(
        name="HelpSteer2-Preference",
        of="the folder preference of NVIDIA's HelpSteer2 (CC BY 4.0)",
        columns=("prompt", "response_1", "response_2", "preference_strength"),
        prompt=extra_id,
        answers=("response_1", "response_2"),
        scores={"preference_strength": Preference("preference_strength")},
        chat=True,
    ),
    Form(
        name="PKU-SafeRLHF",
        of="PKU-Alignment/PKU-SafeRLHF (CC BY-NC 4.0)",
        columns=("prompt", "response_0", "response_1", "better_response_id"),
        prompt="prompt",
        answers=("response_0", "response_1"),
        scores={name: Winner(name, 0, 1) for name in ("better_response_id", "safer_response_id")},
        source=("response_0_source", "response_1_source"),
        chat=True,
    ),
    Form(
        name="SHP",
        of="stanfordnlp/SHP (of Reddit, on its terms for data)",
        columns=("history", "human_ref_A", "human_ref_B", "score_A", "score_B"),
        prompt="history",
        answers=("human_ref_A", "human_ref_B"),
        scores={"votes": Numbers(("score_A", "score_B")), "labels": Winner("labels", 1, 0)},
        chat=True,
    ),
    Form(
        name="arena",
        of="lmsys/chatbot_arena_conversations (answers CC BY-NC 4.0), lmarena-ai/arena-human-preference-100k, -140k",
        columns=("conversation_a", "conversation_b", "winner"),
        prompt=None,
        answers=arena,
        scores={"winner": Winner("winner", "model_a", "model_b", ("tie", "tie (bothbad)", "both_bad"))},
        source=("model_a", "model_b"),
    ),
    Form(
        name="arena-55k",
        of="lmarena-ai/arena-human-preference-55k (Apache 2.0)",
        columns=("response_a", "response_b", "prompt", "winner_model_a", "winner_model_b"),
        prompt=None,
        answers=arena_turns,
        scores={"winner": OneHot(("winner_model_a", "winner_model_b", "winner_tie"))},
        source=("model_a", "model_b"),
        also=("winner_tie",),
        gaps=True,
    ),
    Form(
        name="ms-swift",
        of="files for ModelScope's ms-swift",
        columns=("messages", "rejected_response"),
        prompt=None,
        answers=swift_response,
        scores=MARGIN_OR_ORDER,
    ),
    Form(
        name="ms-swift, messages",
        of="files for ModelScope's ms-swift",
        columns=("messages", "rejected_messages"),
        prompt=None,
        answers=swift_messages,
        scores=MARGIN_OR_ORDER,
    ),
    Form(
        name="ms-swift, query",
        of="files for older ms-swift",
        columns=("query", "response", "rejected_response"),
        prompt=AfterHistory("query"),
        answers=("response", "rejected_response"),
        scores=MARGIN_OR_ORDER,
        also=("input", "history"),
        chat=True,
    ),
    Form(
        name="LLaMA-Factory, sharegpt",
        of="files for LLaMA-Factory",
        columns=("conversations", "chosen", "rejected"),
        prompt=Turns("conversations"),
        answers=("chosen", "rejected"),
        scores={"preference": FIRST_IS_BETTER},
    ),
    Form(
        name="LLaMA-Factory, alpaca",
        of="files for LLaMA-Factory",
        columns=("instruction", "chosen", "rejected"),
        prompt=AfterHistory("instruction"),
        answers=("chosen", "rejected"),
        scores=PAIR_SCORES,
        also=("input", "history"),
        chat=True,
    ),
    Form(
        name="LLaMA-Factory, ranked",
        of="files for older LLaMA-Factory",
        columns=("instruction", "output"),
        prompt=AfterHistory("instruction"),
        answers=("output[]",),
        scores={"order": InOrder()},
        also=("input", "history"),
        chat=True,
    ),
    Form(
        name="Orca-DPO",
        of="Intel/orca_dpo_pairs (Apache 2.0)",
        columns=("question", "chosen", "rejected"),
        prompt="question",
        answers=("chosen", "rejected"),
        scores=PAIR_SCORES,
        chat=True,
    ),
    Form(
        name="pairs",
        of="Anthropic/hh-rlhf, HuggingFaceH4/ultrafeedback_binarized, argilla/dpo-mix-7k (MIT); files for TRL and OpenRLHF",
        columns=("chosen", "rejected"),
        prompt="prompt",
        answers=("chosen", "rejected"),
        scores=PAIR_SCORES,
        also=("prompt",),
    ),
    Form(
        name="unpaired",
        of="trl-lib/kto-mix-14k (of argilla's dpo-mix, MIT); files for KTO",
        columns=("prompt", "completion", "label"),
        prompt="prompt",
        answers=("completion",),
        scores={"label": Label("label")},
        group_by="prompt",
    ),
)
