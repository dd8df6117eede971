"""What happens to candidate lists between sampling and training: nothing is lost silently, nothing comes twice."""

import doctest
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from larpo import candidates as c
from larpo.candidates import Candidate, PromptList
from larpo.data.validation import check_row
from tests.helpers.optional_hypothesis import given, st


def made(prompt, *scores, **columns):
    """A list whose candidates are called a, b, c, ... with these scores."""
    values = [{name: column[i] for name, column in columns.items()} for i in range(len(scores))]
    return PromptList(
        prompt, tuple(Candidate("abcdefghij"[i], s, **v) for i, (s, v) in enumerate(zip(scores, values, strict=True)))
    )


def letters(one):
    return "".join(candidate.completion for candidate in one.candidates)


SCORES = st.none() | st.integers(-3, 3).map(float)  # few values, so that there are ties
CANDIDATES = st.builds(
    Candidate,
    completion=st.sampled_from("abcdefgh"),
    score=SCORES,
    source=st.sampled_from(["0", "1"]),
    completion_ids=st.none() | st.lists(st.integers(0, 2), max_size=2).map(tuple),
    ref_logp=st.none() | st.just(-1.0),
    logp=st.none() | st.just(-2.0),
)
LISTS = st.lists(
    st.builds(PromptList, prompt=st.sampled_from(["p", "q", "r"]), candidates=st.lists(CANDIDATES, max_size=8).map(tuple)),
    max_size=4,
)
SCORED = st.lists(st.integers(-3, 3).map(float), max_size=9)


def test_the_examples_print_what_they_say():
    assert doctest.testmod(c).failed == 0


# --- rows


MESSAGES = [{"role": "user", "content": "1 + 1"}]
FULL = PromptList(
    MESSAGES,
    (
        Candidate([{"role": "assistant", "content": "2"}], 1.5, "0", (7, 8), -3.0, -2.5),
        Candidate([{"role": "assistant", "content": "3"}], -0.5, "1", (), -1.0, -4.0),
    ),
    prompt_ids=(1, 2),
)


@pytest.mark.parametrize("one", [FULL, made("p", 1.0, 2.0), made("p", 1.0, None)])
def test_a_list_survives_its_row_and_parquet(one, tmp_path):
    assert PromptList.from_row(one.to_row()) == one
    import datasets

    datasets.Dataset.from_list(c.to_rows([one])).to_parquet(tmp_path / "lists.parquet")
    import pandas

    frame = pandas.read_parquet(tmp_path / "lists.parquet")  # arrays for lists, NaN for None
    assert c.from_rows(frame.to_dict("records")) == [one]
    if None not in [candidate.score for candidate in one.candidates]:
        check_row(datasets.Dataset.from_parquet(str(tmp_path / "lists.parquet"), cache_dir=str(tmp_path))[0])


def test_rows_of_different_lists_have_the_same_columns():
    rows = c.to_rows([made("p", 1.0), FULL])
    assert rows[0].keys() == rows[1].keys() >= {"prompt_ids", "completion_ids", "ref_logps", "logps"}
    assert rows[0]["completion_ids"] is None
    assert c.from_rows(rows) == [made("p", 1.0), FULL]


def test_log_likelihoods_that_only_some_candidates_have_are_not_written():
    row = made("p", 1.0, 2.0, ref_logp=[-1.0, None], logp=[-1.0, -2.0]).to_row()
    assert "ref_logps" not in row and row["logps"] == [-1.0, -2.0]


def test_half_the_tokens_are_an_error():
    with pytest.raises(ValueError, match="1 of 2 candidates of prompt 'p' have completion_ids; expected all or none"):
        made("p", 1.0, 2.0, completion_ids=[(1,), None]).to_row()
    with pytest.raises(ValueError, match="prompt 'p' have completion_ids, but it has no prompt_ids"):
        made("p", 1.0, completion_ids=[(1,)]).to_row()


def test_a_column_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="scores has 1 values; expected one for each of the 2 completions"):
        PromptList.from_row({"prompt": "p", "completions": ["a", "b"], "scores": [1.0]})


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_has_no_rank_is_an_error(score):
    with pytest.raises(ValueError, match="score must be finite"):
        Candidate("a", score)


# --- duplicates and ranks


def test_tokens_decide_what_is_a_duplicate_and_text_where_there_are_none():
    one = PromptList(
        "p",
        (
            Candidate("x", 1.0, completion_ids=(1, 2)),
            Candidate("x", 2.0, completion_ids=(3,)),  # the same text from other tokens stays
            Candidate("y", 3.0, completion_ids=(1, 2)),  # the same tokens go
            Candidate("x", 4.0),  # no tokens, the same text goes
            Candidate("z", 5.0),
            Candidate("z", 6.0, completion_ids=(4,)),
        ),
    )
    (kept,), removed = c.deduplicate([one])
    assert [candidate.score for candidate in kept.candidates] == [1.0, 2.0, 5.0]
    assert removed == 3


@given(LISTS)
def test_deduplicating_keeps_firsts_in_order_counts_the_rest_and_is_done_after_once(lists):
    kept, removed = c.deduplicate(lists)
    assert removed == sum(len(one.candidates) for one in lists) - sum(len(one.candidates) for one in kept)
    for before, after in zip(lists, kept, strict=True):
        remaining = iter(before.candidates)
        assert all(candidate in remaining for candidate in after.candidates)  # a subsequence
        ids = [candidate.completion_ids for candidate in after.candidates if candidate.completion_ids is not None]
        assert len(ids) == len(set(ids))
        assert after.candidates[:1] == before.candidates[:1]
    assert c.deduplicate(kept) == (kept, 0)


def test_a_string_and_messages_are_not_the_same():
    text = '[{"content": "a", "role": "assistant"}]'
    one = PromptList("p", (Candidate(text), Candidate([{"role": "assistant", "content": "a"}])))
    assert c.deduplicate([one]) == ([one], 0)


def test_ranking_is_stable_and_unscored_candidates_go_or_come_last():
    one = made("p", 1.0, None, 2.0, 1.0)
    (dropped,), count = c.rank([one])
    assert (letters(dropped), count) == ("cad", 1)
    (last,), count = c.rank([one], unscored="last")
    assert (letters(last), count) == ("cadb", 1)
    tied = PromptList("p", (Candidate("z", 1.0), Candidate("y", 1.0), Candidate("x", 1.0)))
    assert c.rank([tied]) == ([tied], 0)
    with pytest.raises(ValueError, match="unscored must be 'drop' or 'last'"):
        c.rank([one], unscored="first")


@given(LISTS)
def test_ranking_loses_nothing_but_what_it_counts(lists):
    ranked, without = c.rank(lists)
    assert without == sum(candidate.score is None for one in lists for candidate in one.candidates)
    for before, after in zip(lists, ranked, strict=True):
        scores = [candidate.score for candidate in after.candidates]
        assert scores == sorted(scores, reverse=True)
        assert len(after.candidates) == sum(candidate.score is not None for candidate in before.candidates)
    kept, _ = c.rank(lists, unscored="last")
    assert [len(one.candidates) for one in kept] == [len(one.candidates) for one in lists]


# --- subsets


def test_the_papers_subsets():
    one = made("p", 0.0, 9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0)
    subset = {name: letters(c.top_bottom([one], *sizes)[0]) for name, sizes in c.PAPER_SUBSETS.items()}
    assert subset == {"pairwise": "ba", "contrastive": "beca", "lambdarank": "bdca", "listmle": "bdca"}
    assert letters(c.top_bottom([one], 1, None)[0]) == "bdfhjigeca"
    assert letters(c.top_bottom([one], 3, 0)[0]) == "bdf"
    assert letters(c.top_bottom([one], 0, 2)[0]) == "ca"


@given(SCORED, st.integers(0, 4), st.integers(0, 4) | st.none())
def test_a_subset_has_the_best_and_the_worst_ranked_and_none_twice(scores, top, bottom):
    if top == 0 and bottom == 0:
        return
    chosen = c.top_bottom_indices(scores, top, bottom)
    m = len(scores)
    wanted = m if bottom is None else min(m, top + bottom)
    assert len(chosen) == len(set(chosen)) == wanted
    picked = [scores[i] for i in chosen]
    ordered = sorted(scores, reverse=True)
    assert picked == (ordered if wanted == m else ordered[:top] + ordered[m - bottom :])
    ties = [(i, j) for i, j in pairwise(chosen) if scores[i] == scores[j]]
    assert all(i < j for i, j in ties)


def test_subset_errors():
    with pytest.raises(ValueError, match="not both 0"):
        c.top_bottom_indices([1.0], 0, 0)
    with pytest.raises(ValueError, match="got top=-1"):
        c.top_bottom_indices([1.0], -1, 1)
    with pytest.raises(ValueError, match=r"scores must be numbers, got \[1.0, None\]"):
        c.top_bottom_indices([1.0, None], 1, 1)
    with pytest.raises(ValueError, match=r"candidate 1 of prompt 'p' has no score; rank\(...\) drops"):
        c.top_bottom([made("p", 1.0, None)], 1, 1)


@given(LISTS)
def test_lists_without_an_order_are_parted_not_lost(lists):
    parts = c.drop_uninformative(lists)
    assert Counter(map(repr, [*parts.kept, *parts.tied, *parts.short])) == Counter(map(repr, lists))
    kept, tied, short = ([[x.score for x in one.candidates if x.score is not None] for one in part] for part in parts)
    assert all(len(set(scores)) > 1 for scores in kept)
    assert all(len(scores) > 1 and len(set(scores)) == 1 for scores in tied)
    assert all(len(scores) < 2 for scores in short)


# --- negatives


def test_hard_negatives_are_low_in_reward_and_likely_per_token():
    one = made(
        "p",
        *(5.0, 4.0, 3.0, 2.0, 1.0, 0.0),
        logp=[-1.0, -1.0, -1.0, -9.0, -4.0, -6.0],
        completion_ids=[(1,), (2,), (3,), (4, 4, 4, 4, 4, 4), (5,), (6, 6)],  # per token: d -1.5, e -4, f -3
    )
    assert letters(c.hard_negatives([one], top=1, negatives=1)[0]) == "ad"
    assert letters(c.hard_negatives([one], top=2, negatives=2)[0]) == "abdf"
    assert letters(c.hard_negatives([one], top=1, negatives=9)[0]) == "adef"  # the better half is no negative
    assert letters(c.hard_negatives([one], top=1, negatives=2, low_reward=1.0)[0]) == "abc"
    assert letters(c.hard_negatives([one], top=5, negatives=3)[0]) == "abcdef"


def test_likely_is_per_token_that_counts(tmp_path):
    one = made("p", 2.0, 1.0, 0.0, logp=[-1.0, -4.0, -6.0], completion_ids=[(1,), (2, 2, 2, 2), (3, 3, 3)])
    assert letters(c.hard_negatives([one], negatives=1, low_reward=1.0)[0]) == "ab"  # -1 against -2
    masks = [(True,), (False, True, False, False), (True, True, True)]  # -4 against -2
    candidates = [replace(candidate, completion_mask=mask) for candidate, mask in zip(one.candidates, masks, strict=True)]
    one = replace(one, prompt_ids=(9,), candidates=tuple(candidates))
    assert letters(c.hard_negatives([one], negatives=1, low_reward=1.0)[0]) == "ac"
    assert PromptList.from_row(one.to_row()) == one
    assert one.to_row()["completion_mask"] == [list(mask) for mask in masks]


def test_an_empty_completion_is_the_least_likely_negative():
    one = made("p", 2.0, 1.0, 0.0, logp=[-1.0, -50.0, 0.0], completion_ids=[(1,), (2,), ()])
    assert letters(c.hard_negatives([one], negatives=1, low_reward=1.0)[0]) == "ab"


def test_hard_negatives_without_likelihoods_are_an_error():
    with pytest.raises(ValueError, match="prompt 'p' lacks logp or completion_ids"):
        c.hard_negatives([made("p", 1.0, 0.0)])
    with pytest.raises(ValueError, match="low_reward=0"):
        c.hard_negatives([], low_reward=0)


CAPITALS = [
    PromptList("the capital of France", (Candidate("Lyon", 0.0), Candidate("Paris", 1.0, "0", (5,), -1.0, -2.0))),
    PromptList("how to boil an egg", (Candidate("in water", 1.0), Candidate("no", 0.5))),
    PromptList("the capital of Peru", (Candidate("Cusco", -2.0), Candidate("Lima", 3.0))),
]


def test_a_related_prompts_best_candidate_becomes_the_worst_here():
    lists, added = c.negatives_of_related_prompt(CAPITALS)
    assert added == 2
    assert lists[0].candidates == (*CAPITALS[0].candidates, Candidate("Lima", -1.0, c.RELATED))
    assert lists[1] == CAPITALS[1]  # shares no word with another prompt
    assert lists[2].candidates[-1] == Candidate("Paris", -3.0, c.RELATED, (5,))  # its log-likelihoods are gone


def test_equal_prompts_are_no_relatives_and_roles_no_words():
    assert c.related_prompts(["an egg", "an egg", "an apple"]) == [2, 2, 0]
    chat = [[{"role": "user", "content": text}] for text in ("egg", "apple")]
    assert c.related_prompts(chat) == [None, None]
    assert c.related_prompts([]) == []


def test_a_rare_shared_word_weighs_more_than_a_common_one():
    prompts = ["what is a zebra", "what is a house", "what is a car", "what is a road", "zebra crossing"]
    assert c.related_prompts(prompts)[0] == 4


def test_random_negatives_come_from_other_prompts_below_all_others_and_by_seed():
    lists = [
        PromptList(f"p{i}", tuple(Candidate(f"{i}.{j}", float(j), "0", (i, j), -1.0) for j in range(3))) for i in range(20)
    ]
    first, added = c.random_negatives(lists, 2, seed=0)
    assert added == 40
    for i, (before, after) in enumerate(zip(lists, first, strict=True)):
        assert after.candidates[:3] == before.candidates
        for negative in after.candidates[3:]:
            assert not negative.completion.startswith(f"{i}.")
            assert (negative.score, negative.source, negative.ref_logp, negative.logp) == (-1.0, c.RANDOM, None, None)
    assert c.random_negatives(lists, 2, seed=0)[0] == first
    assert c.random_negatives(lists, 2, seed=1)[0] != first
    from_prompts = {negative.completion.split(".")[0] for after in first for negative in after.candidates[3:]}
    assert len(from_prompts) > 8


@given(LISTS, st.integers(0, 3), st.sampled_from(["random", "related"]))
def test_added_negatives_are_new_counted_and_never_of_the_same_prompt(lists, n, kind):
    lists, _ = c.rank(lists)
    result, added = c.random_negatives(lists, n, seed=0) if kind == "random" else c.negatives_of_related_prompt(lists, n)
    more = [after.candidates[len(before.candidates) :] for before, after in zip(lists, result, strict=True)]
    assert added == sum(map(len, more))
    for before, new in zip(lists, more, strict=True):
        own = {candidate.completion for candidate in before.candidates}
        others = {x.completion for other in lists if other.prompt != before.prompt for x in other.candidates}
        texts = [candidate.completion for candidate in new]
        assert len(texts) == len(set(texts)) <= n
        assert not own & set(texts) and set(texts) <= others
        assert all(candidate.score < min((x.score for x in before.candidates), default=0.0) for candidate in new)
        if kind == "random":
            assert len(texts) == n or n > len(others - own)


def test_few_different_texts_elsewhere_still_give_what_there_is():
    lists = [made("p", 1.0), PromptList("q", tuple(Candidate("x", 0.0) for _ in range(50)))]
    (first, _), added = c.random_negatives(lists, 3, seed=0)
    assert letters(first) == "ax" and added == 2


# --- memory


def test_memory_is_one_ranked_pool_per_prompt_without_stale_likelihoods():
    old = [
        PromptList("p", (Candidate("x", 2.0, "0", (1,), -1.0, -1.0), Candidate("y", 0.0, "0", (2,), -1.0, -1.0)), (9,)),
        PromptList("only old", (Candidate("z", 1.0, "0"),)),
    ]
    new = [
        PromptList("only new", (Candidate("w", 1.0, "1"),)),
        PromptList("p", (Candidate("x", 2.5, "1", (1,), -2.0, -2.0), Candidate("v", 1.0, "1", (3,), -2.0, -2.0)), (9,)),
    ]
    merged, duplicates = c.memorise(old, new)
    assert duplicates == 1
    assert [one.prompt for one in merged] == ["p", "only old", "only new"]
    assert merged[0].candidates == (
        Candidate("x", 2.0, "0", (1,)),
        Candidate("v", 1.0, "1", (3,)),
        Candidate("y", 0.0, "0", (2,)),
    )
    assert merged[0].prompt_ids == (9,)


@given(LISTS, LISTS)
def test_memory_forgets_only_duplicates(old, new):
    merged, duplicates = c.memorise(old, new)
    assert sum(len(one.candidates) for one in merged) + duplicates == sum(len(one.candidates) for one in [*old, *new])
    assert [one.prompt for one in merged] == list(dict.fromkeys(one.prompt for one in [*old, *new]))
    for one in merged:
        scores = [candidate.score for candidate in one.candidates if candidate.score is not None]
        assert scores == sorted(scores, reverse=True)
        assert all(candidate.score is None for candidate in one.candidates[len(scores) :])
        assert all(candidate.ref_logp is candidate.logp is None for candidate in one.candidates)
    assert c.memorise(merged, []) == (merged, 0)
