"""`ref_logps: path`: log-likelihoods that `larpo score` wrote, found by the tokens of candidates, or refused."""

import json

import pytest
from datasets import Dataset

from larpo.config import LarPOConfig
from larpo.data.stored_logps import read_logps, reference_of
from larpo.scoring import score_lists
from tests.helpers import tiny
from tests.helpers.trainers import eager_logps, moved, trainer

ROWS = tiny.lists(6, m=None, seed=3)
DATA = Dataset.from_list(ROWS)


def scored(rows=ROWS, model=None, **options):
    reference = moved(tiny.causal_lm()) if model is None else model
    return score_lists(reference, Dataset.from_list(rows), tiny.tokenizer(), progress=False, **options)


@pytest.fixture
def reference(tmp_path):
    """The lists, scored under another model than is trained: in another order, and more of them."""
    path = tmp_path / "scored" / "reference.parquet"
    scored([*tiny.lists(2, seed=9), *ROWS[::-1]]).to_parquet(path)
    return path


def check(found, rows=ROWS):
    expected = [eager_logps(moved(tiny.causal_lm()), row).tolist() for row in rows]
    for got, want in zip(found, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-4)


def test_they_are_found_by_tokens_whatever_the_order_of_rows(tmp_path, reference):
    found = trainer(tmp_path, DATA, ref_logps=reference, eval_dataset=DATA.select([1, 4]))
    check(found.train_dataset["ref_logps"])
    check(found.eval_dataset["ref_logps"], [ROWS[1], ROWS[4]])
    assert found.ref_model is None
    check(trainer(tmp_path, DATA.select([5, 2]), ref_logps=reference).train_dataset["ref_logps"], [ROWS[5], ROWS[2]])


def test_a_subset_of_each_list_finds_its_own(tmp_path, reference):
    rows = [row for row in ROWS if len(row["scores"]) > 2]
    found = trainer(tmp_path, Dataset.from_list(rows), ref_logps=reference, list_top=1, list_bottom=1)
    for logps, row in zip(found.train_dataset["ref_logps"], rows, strict=True):
        by_score = sorted(range(len(row["scores"])), key=row["scores"].__getitem__)
        all_of_them = eager_logps(moved(tiny.causal_lm()), row).tolist()
        assert sorted(logps) == pytest.approx(sorted(all_of_them[i] for i in (by_score[0], by_score[-1])), rel=1e-4)


def test_a_folder_may_hold_files_of_several_data_sets(tmp_path, reference):
    new = tiny.lists(2, seed=20)
    scored(new).to_json(reference.parent / "more.jsonl")
    check(
        trainer(tmp_path, Dataset.from_list([*ROWS, *new]), ref_logps=reference.parent).train_dataset["ref_logps"],
        [*ROWS, *new],
    )


def test_a_stream_finds_them_too(tmp_path, reference):
    found = trainer(tmp_path, DATA.to_iterable_dataset(), ref_logps=reference, max_steps=2)
    rows = iter(found.train_dataset)
    check([next(rows)["ref_logps"] for _ in ROWS])
    other = Dataset.from_list(
        [*ROWS * 20, *tiny.lists(1, seed=30)]
    ).to_iterable_dataset()  # not among the first, which are tried
    with pytest.raises(ValueError, match=r"list 120 of the train data: .* has no log-likelihood of completions\[0\]"):
        list(trainer(tmp_path, other, ref_logps=reference, max_steps=2).train_dataset)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(append_eos=False), r"row 0 of .* \(6 of 6 lists have .*\) \(append_eos was True and is False\)"),
        (dict(max_length=8), r"\(max_length was 1024 and is 8.*\): score this data with `larpo score`"),
    ],
)
def test_other_limits_are_refused_and_named(tmp_path, reference, options, said):
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, DATA, ref_logps=reference, **options)


def test_data_that_was_not_scored_is_refused_with_its_row(tmp_path, reference):
    one = ROWS[1] | {"completions": [*ROWS[1]["completions"][:-1], " a red house"]}
    last = len(one["completions"]) - 1
    said = rf"row 1 of the train data: ref_logps='.*' has no log-likelihood of completions\[{last}\] with the tokens"
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, Dataset.from_list([ROWS[0], one]), ref_logps=reference)
    with pytest.raises(ValueError, match=r"row 0 of the eval data: .* has no log-likelihood of completions\[0\]"):
        trainer(tmp_path, DATA, ref_logps=reference, eval_dataset=Dataset.from_list(tiny.lists(1, seed=30)))


def test_two_sources_of_one_number_are_refused(tmp_path, reference):
    with pytest.raises(ValueError, match="is given, and the train data has ref_logps: leave one of them out"):
        trainer(tmp_path, DATA.map(lambda row: {"ref_logps": row["scores"]}), ref_logps=reference)
    with pytest.raises(ValueError, match="ref_model is given, but the train data has ref_logps"):
        trainer(tmp_path, DATA, ref_logps=reference, ref_model=tiny.causal_lm())
    for name in ("reference_free", "precompute_ref_log_probs", "sync_ref_model"):
        with pytest.raises(ValueError, match=f"ref_logps brings .*, so {name} must be left out"):
            LarPOConfig(output_dir=str(tmp_path), ref_logps=str(reference), use_cpu=True, **{name: True})


def test_files_of_different_references_are_refused(reference):
    scored(model=tiny.causal_lm()).to_parquet(reference.parent / "z.parquet")
    with pytest.raises(
        ValueError, match=r"must be of one reference: .*reference\.parquet, row 0 is of .*, .*z\.parquet, row 0 of "
    ):
        read_logps(str(reference.parent))


def lines(folder, *rows):
    path = folder / "bad.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_what_larpo_score_did_not_write_is_refused(tmp_path, reference):
    row = scored(ROWS[:1])[0]
    n = len(row["completions"])
    for change, said in (
        ({"token_hashes": None}, r"bad\.jsonl, line 2 was not written by `larpo score`: it must have token_hashes"),
        ({"scored_with": None}, "line 2 was not written by `larpo score`"),
        ({"scored_with": {"model": "x"}}, "line 2 was not written by `larpo score`"),
        ({"scored_with": "by hand"}, "line 2 was not written by `larpo score`"),
        ({"logps": [float("nan")] * n}, "line 2 must have one finite number for each of its token_hashes"),
        ({"logps": [-1.0] * (n + 1)}, "line 2 must have one finite number for each of its token_hashes"),
        ({"token_hashes": ["x"] * n}, "line 2 has token_hashes or log-likelihoods of another kind"),
    ):
        with pytest.raises(ValueError, match=said):
            read_logps(str(lines(tmp_path, row, row | change)))
    with pytest.raises(ValueError, match="line 1 was not written by `larpo score`"):
        reference_of(str(lines(tmp_path, ROWS[0])))
    with pytest.raises(FileNotFoundError, match="ref_logps: no such file or folder"):
        read_logps(str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match=r"ref_logps must be a \.parquet or \.jsonl file"):
        read_logps(__file__)
    reference.write_bytes(reference.read_bytes()[:-9])
    with pytest.raises(ValueError, match="can't be read, it is cut or damaged"):
        read_logps(str(reference))
    (tmp_path / "scored" / "new.parquet.parts").mkdir()
    with pytest.raises(ValueError, match=r"new\.parquet\.parts' is unfinished: start its `larpo score` again"):
        read_logps(str(tmp_path / "scored"))
