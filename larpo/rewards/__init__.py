"""Rerankers: what scores a completion. A reward is any callable with TRL's reward-function signature.

    reward(prompts=[...], completions=[...], **columns) -> list[float | None]      one value per completion, higher is better

`Reward` says what it is given and what it returns.

    judge.py       Judge: how a reward is asked (batches, whole lists, how many calls at a time, again after an error)
    asked.py       what it is asked about; answers.py: what counts as an answer
    combining.py   `score`, the weighted sum of several, as they are or normalised within a list
    finding.py     a reward by its name or settings
    classifier.py  `sequence_classifier`, a reward model of Hugging Face in this process
    endpoint.py    Endpoint, a reward behind an address
    identity.py    what makes a judge this one and no other
    memory.py      what judges have said, kept on disk
"""

from .classifier import SequenceClassifier, sequence_classifier
from .combining import combined, judged, score
from .endpoint import Endpoint
from .finding import BUILT_IN, from_name, from_settings
from .judge import Judge, Reward, RewardError, name_of
from .memory import Memory
from .text import Text, text_of

__all__ = [
    "BUILT_IN",
    "Endpoint",
    "Judge",
    "Memory",
    "Reward",
    "RewardError",
    "SequenceClassifier",
    "Text",
    "combined",
    "from_name",
    "from_settings",
    "judged",
    "name_of",
    "score",
    "sequence_classifier",
    "text_of",
]
