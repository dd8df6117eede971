"""Candidate lists as a dataset: one row for each prompt, with all its completions and their scores.

    prompt: str, or a list of messages {"role", "content"}
    completions: a list of strings, or of lists of messages        scores: a number for each, higher is better
    optional: source (a string for each), ref_logps (nats, for each), prompt_ids and completion_ids (exact tokens),
        completion_mask (which of them count)

Lists may differ in size. Other columns are kept. Tool calls, `tools` and `chat_template_kwargs` are carried as JSON text (see
`larpo.data.json_text`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .converting import Read
from .one_source import read_lists, read_rows
from .reading import Reading
from .sources import Source, mixed, sources_of
from .streaming import stream_rows
from .validation import check_row

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ..offline import CandidateList

__all__ = ["Reading", "as_lists", "check_row", "from_candidate_lists", "load_lists", "read_lists"]


def load_lists(
    source: Any,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    seed: int = 0,
    scored: bool = True,
    **how: Any,
) -> Dataset | IterableDataset:
    """Reads candidate lists, in any form that `as_lists` knows, and checks every row.

    Args:
        source: a .jsonl, .json (an array of objects, or lines), .csv or .parquet file, all but the last also as .gz or .zst; a
            folder of such files, or one written by `save_to_disk`; the name of a dataset on the hub; a Dataset, an
            IterableDataset, a DatasetDict or a list of dicts. Several are mixed: a list of `larpo.data.sources.Source` or of
            dicts with `path`, `weight` and, if they differ from those below, settings of their own.
        split: which split of a DatasetDict, saved or not, or of a dataset on the hub. A file, a Dataset and a list have none.
        config: which configuration of a dataset on the hub.
        revision: which commit, branch or tag of a dataset on the hub.
        streaming: returns an IterableDataset, which reads and checks a row when it comes to it.
        seed: decides the order in which several sources are mixed.
        scored: False also takes lists without scores.
        how: settings of `larpo.data.reading.Reading`, such as `columns`, `form`, `score` or `bad_rows`.

    Returns:
        A Dataset of `prompt`, `completions` and `scores` (higher is better), or with streaming an IterableDataset.

    Raises:
        TypeError: a setting that is none of these.
        FileNotFoundError: no such file.
        ValueError: the file, its line (from 1) or row (from 0, as `dataset[0]`), the field, what it holds and what is
            expected; columns of no known form; a split that is not there.
    """
    sources = _sources(source, split, config, revision, how)
    if streaming:
        return mixed(sources, [one.stream(scored) for one in sources], seed=seed)
    return mixed(sources, [one.read(scored).logged() for one in sources], seed=seed)


def read_sources(
    source: Any, *, split: str = "train", config: str | None = None, revision: str | None = None, seed: int = 0, **how: Any
) -> tuple[Dataset, list[Read]]:
    """What `load_lists` loads at once, and how each of its sources was read."""
    sources = _sources(source, split, config, revision, how)
    reads = [one.read(scored=True) for one in sources]
    return mixed(sources, [one.logged() for one in reads], seed=seed), reads


def _sources(source: Any, split: str, config: str | None, revision: str | None, how: dict[str, Any]) -> list[Source]:
    Reading.of(how, "load_lists", also=("split", "config", "revision", "streaming", "seed", "scored"))
    settings = {"split": split, "config": config, "revision": revision} | how
    return sources_of(source, settings) or [Source(path=source, **settings)]


def as_lists(
    dataset: Dataset | IterableDataset | Sequence[Mapping[str, Any]], *, scored: bool = True, **how: Any
) -> Dataset | IterableDataset:
    """Candidate lists, from a Dataset or a list of dicts in any known form; every row is checked.

    The columns decide which form it is: docs/data.md has a table of those that are known. Other columns are kept. An
    IterableDataset stays one, and its rows are checked when they are read.

    Args:
        dataset: rows in one of the known forms, or in any form with `columns`.
        scored: False also takes lists without scores, and leaves them so.
        how: settings of `larpo.data.reading.Reading`: `columns` says where prompt, answers and scores are in data of no known
            form; `score` which of several scores is meant, or their weights; `group_by` which rows are one list;
            `as_messages` whether prompts are turns or text; `bad_rows="drop"` leaves out rows that make no list; `form`.

    Rows and answers that are left out are counted by reason, and the counts logged as a warning.

    Raises:
        ValueError: columns of no known form; a bad row, naming it (from 0), the field, what it holds and what is expected.

    >>> rows = as_lists([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "level": "easy"}])
    >>> rows[0]
    {'prompt': '2 + 2 =', 'completions': [' 4', ' 5'], 'scores': [1.0, 0.0], 'level': 'easy'}
    >>> posts = [{"question": "2 + 2", "answers": [{"text": "4", "votes": 7}, {"text": "5", "votes": -1}]}]
    >>> as_lists(posts, columns={"prompt": "question", "completions": "answers[].text", "scores": "answers[].votes"})[0]
    {'prompt': '2 + 2', 'completions': ['4', '5'], 'scores': [7.0, -1.0]}
    """
    import datasets

    reading = Reading.of(how, "as_lists", also=("scored",))
    if isinstance(dataset, datasets.IterableDataset):
        return stream_rows(dataset, "dataset", reading, scored)
    return read_rows(dataset, reading, scored=scored).logged()


def from_candidate_lists(lists: Iterable[CandidateList]) -> Dataset:
    """Rows from `larpo.offline.CandidateList` objects.

    >>> from larpo.offline import CandidateList
    >>> from_candidate_lists([CandidateList("Cows eat", (" grass", " lions"), (1.0, 0.0))])[0]
    {'prompt': 'Cows eat', 'completions': [' grass', ' lions'], 'scores': [1.0, 0.0]}
    """
    return as_lists([{"prompt": one.prompt, "completions": list(one.completions), "scores": list(one.scores)} for one in lists])
