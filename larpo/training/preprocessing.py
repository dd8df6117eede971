"""From lists as a user has them to what training reads: converted, cut to list_top and list_bottom, tokenised."""

from __future__ import annotations

import logging
import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from ..candidates import top_bottom_indices
from ..data.converting import Read
from ..data.loading import load_lists, read_sources
from ..data.one_source import read_rows
from ..data.reader import IMPLICIT, PER_ANSWER
from ..data.reading import Reading
from ..data.scored_tokens import TOKEN_HASHES
from ..data.stored_logps import read_logps
from ..data.summary import DataSummary, summarise
from ..data.summary.words import sentences
from ..data.text_tokenizer import text_tokenizer
from ..data.tokenization import TokenizationReport, tokenize_lists, tokens_of_lists
from ..runs.checks import check_count
from .losses import is_settled

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from ..config import LarPOConfig

logger = logging.getLogger(__name__)

STREAMED = 1000  # lists of a stream that are described where no limit is given
SUBSET = ("list_top", "list_bottom")
PER_CANDIDATE = (*PER_ANSWER, "num_tokens", TOKEN_HASHES)


def is_tokenised(dataset: Any) -> bool:
    """Whether these are rows that `training_lists` made."""
    columns = getattr(dataset, "column_names", None) or ()
    return "completion_ids" in columns and "completions" not in columns


def training_lists(dataset: Any, tokenizer: PreTrainedTokenizerBase, args: LarPOConfig, name: str = "train") -> Dataset:
    """Tokenised rows of anything that `as_lists` converts, by the settings of `args`; `name` is for messages.

    Logs (INFO) what the data consists of, with one candidate in which the tokens that count are marked.

    Raises ValueError where no list has anything to learn from, and as `as_lists` and `tokenize_lists` do.
    """
    return prepare(dataset, tokenizer, args, name).lists


class Prepared(NamedTuple):
    """Tokenised rows, and the facts of them."""

    lists: Dataset
    summary: DataSummary


def prepare(dataset: Any, tokenizer: PreTrainedTokenizerBase, args: LarPOConfig, name: str = "train") -> Prepared:
    """`training_lists` with what it found."""
    tokenizer = text_tokenizer(tokenizer)
    read = read_rows(dataset, Reading())
    read.logged()
    if args.length_normalized:
        _refuse_implicit_prompts(read.lists, name)
    data = _tokenised(read, tokenizer, args)
    summary = data.summary(tokenizer, args)
    if args.should_log:
        logger.info("%s data: %s", name, sentences(summary))
        logger.info("%s data: %s What counts is in [[ ]]:\n%s", name, data.report, data.report.example)
    return Prepared(_for_training(data, tokenizer, args, name), summary)


def describe(
    data: Any,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    args: LarPOConfig | None = None,
    *,
    limit: int | None = None,
    **how: Any,
) -> DataSummary:
    """What a training run would see of data: its form, sizes, ties, repeats, scores, tokens, what is cut and left out.

    Args:
        data: anything that `larpo.load_lists` reads.
        processing_class: the tokenizer, or a processor that holds one.
        args: the run's settings; the defaults where there are none.
        limit: only the first so many lists are tokenised and described; of a stream 1000 if it is not given.
        how: as in `larpo.load_lists`.

    Raises ValueError for data that cannot be read or tokenised. What cannot be trained on for another reason is described,
    and the reason is in `refused`.
    """
    from ..config import LarPOConfig

    check_count("limit", limit, 1)
    args = LarPOConfig(report_to="none") if args is None else args
    tokenizer = text_tokenizer(processing_class)
    read, in_all, reads = _read(data, limit, how)
    refused = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the summary says what they say
        tokens = _tokenised(read, tokenizer, args)
        try:
            if args.length_normalized:
                _refuse_implicit_prompts(read.lists, "train")
            _for_training(tokens, tokenizer, args, "train")
        except ValueError as error:
            refused = str(error)
    summary = tokens.summary(tokenizer, args, lists_read=in_all, refused=refused)
    return summary.of_stream() if in_all is None else summary.of(reads)


def _read(data: Any, limit: int | None, how: dict[str, Any]) -> tuple[Read, int | None, list[Read]]:
    """At most `limit` lists of what `load_lists` loads, how many there are, and how each source was read; None and nothing of a
    stream."""
    if how.get("streaming") or _is_stream(data):
        lists = load_lists(data, **how)
        return read_rows(list(lists.take(limit or STREAMED)), Reading()), None, []
    lists, reads = read_sources(data, **{name: value for name, value in how.items() if name != "streaming"})
    read, in_all = reads[0] if len(reads) == 1 else read_rows(lists, Reading()), len(lists)
    return read._replace(lists=lists.select(range(min(in_all, limit or in_all)))), in_all, reads


def _is_stream(data: Any) -> bool:
    import datasets

    return isinstance(data, datasets.IterableDataset)


class Tokenised(NamedTuple):
    """Lists on their way to training."""

    read: Read
    lists: Dataset
    tokens: Dataset
    report: TokenizationReport

    def summary(self, tokenizer: PreTrainedTokenizerBase, args: LarPOConfig, **more: Any) -> DataSummary:
        limits = args.token_limits().as_dict() | {name: getattr(args, name) for name in SUBSET}
        return summarise(self.read, self.tokens, self.report, tokenizer, limits, **more)


def _tokenised(read: Read, tokenizer: PreTrainedTokenizerBase, args: LarPOConfig) -> Tokenised:
    lists = read.lists
    if args.list_top is not None:
        options = {"top": args.list_top, "bottom": args.list_bottom}
        lists = lists.map(subset, fn_kwargs=options, desc="choosing candidates")
    limits = args.token_limits().arguments()
    tokens, report = tokenize_lists(lists, tokenizer, num_proc=args.dataset_num_proc, **limits)
    return Tokenised(read, lists, tokens, report)


def _for_training(data: Tokenised, tokenizer: PreTrainedTokenizerBase, args: LarPOConfig, name: str) -> Dataset:
    """The tokens with the columns that training reads. Raises ValueError for data that cannot be trained on."""
    lists, tokenised, report = data.lists, data.tokens, data.report
    _refuse_equal(report, name, args)
    tokenised = tokenised.add_column("row_number", range(len(tokenised)))
    if "ref_logps" in tokenised.column_names and None in (values := tokenised["ref_logps"][:]):
        raise ValueError(f"ref_logps: row {values.index(None)} has none; give them for every row or leave the column out")
    if args.ref_logps is not None:
        if "ref_logps" in tokenised.column_names:
            raise ValueError(f"ref_logps={args.ref_logps!r} is given, and the {name} data has ref_logps: leave one of them out")
        tokenised = read_logps(args.ref_logps).added_to(tokenised, name, tokenizer, args.token_limits().as_dict())
    if "weight" in lists.column_names:
        tokenised = tokenised.add_column("weight", _mean_one(lists["weight"][:], name))
    if getattr(args.resolved_objective(), "ties", None) == "skip":
        _refuse_all_skipped(tokenised["scores"][:], name, args)
    elif report.lists_all_tied and report.lists_all_tied + report.lists_of_one == report.lists:
        _warn_all_tied(name, args)
    if getattr(args, "train_sampling_strategy", None) == "group_by_length":
        tokenised = tokenised.add_column(args.length_column_name, tokens_of_lists(tokenised))
    return tokenised


def _refuse_implicit_prompts(lists: Dataset, name: str) -> None:
    """Raises ValueError where words of the answers may have become the prompt's: a mean over tokens would leave them out."""
    if IMPLICIT in lists.column_names and True in (flags := lists[IMPLICIT][:]):
        raise no_prompt(f"row {flags.index(True)} of the {name} data")


def no_prompt(where: str) -> ValueError:
    return ValueError(
        f"length_normalized needs to know where prompts end, and {where} has none: what its texts share at their start may be "
        "words of the answers. Give the data a column 'prompt'"
    )


def _refuse_equal(report: TokenizationReport, name: str, args: LarPOConfig) -> None:
    """Raises ValueError where every list that has candidates to compare has only equal ones: its gradient is 0."""
    if args.sft_weight:
        return  # which learns from one candidate
    if report.lists_all_equal and report.lists_all_equal + report.lists_of_one == report.lists:
        raise ValueError(
            f"in every list of the {name} data all candidates are equal, so there is nothing to learn from: {report} If they "
            f"differ before they are cut, give them more room (max_length={args.max_length}, "
            f"max_prompt_length={args.max_prompt_length})"
        )


def _mean_one(weights: list[float | None], name: str) -> list[float]:
    """Weights of lists over their mean, so that their unit does not change the size of an update."""
    if None in weights:
        raise ValueError(f"weight: row {weights.index(None)} of the {name} data has none; give them for every row or for none")
    total = math.fsum(weights)
    if not 0 < total < math.inf:
        raise ValueError(f"weight: those of the {name} data add up to {total:g}; some must be above 0, and all finite")
    return [weight * len(weights) / total for weight in weights]


def _refuse_all_skipped(scores: list[list[float]], name: str, args: LarPOConfig) -> None:
    """Says how many lists ties="skip" leaves out; raises ValueError where none is left to train on."""
    skipped = [not is_settled(one, args.objective) for one in scores if len(one) > 1]
    if skipped and all(skipped) and name == "train" and not args.sft_weight:
        raise ValueError(
            f"ties='skip' leaves out every list of the {name} data: equal scores leave open what {args.objective} asks of the "
            "order, and there is nothing to train on"
        )
    if any(skipped) and args.should_log:
        logger.info("%s data: ties='skip' leaves out %d of %d lists", name, sum(skipped), len(scores))


def _warn_all_tied(name: str, args: LarPOConfig) -> None:
    teaches = "there is no preference to learn from them"
    if getattr(args.resolved_objective(), "ties", None) == "order":
        teaches = "candidates count in the order in which they stand, so that order is what is trained on"
    warnings.warn(f"no list of the {name} data has two scores that differ: {teaches}", stacklevel=6)


def subset(row: dict[str, Any], top: int, bottom: int) -> dict[str, Any]:
    """The columns that have a value for each candidate, with the best and the worst candidates only."""
    keep = top_bottom_indices(row["scores"], top, bottom)
    return {name: [row[name][i] for i in keep] for name in PER_CANDIDATE if row.get(name) is not None}
