"""Streams of lists: the same lists, tokens and steps as of data that is loaded whole, without the data being in memory."""

import itertools
import json

import datasets
import pytest
import torch

from larpo import commands
from larpo.data.loading import as_lists, load_lists
from larpo.scoring import score_lists
from larpo.training.list_stream import training_stream
from tests.helpers import tiny, trainers
from tests.helpers.jsonl import write_jsonl
from tests.helpers.trainers import losses

USER = {"role": "user", "content": "1 + 1"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
RATED = [
    {
        "instruction": f"say {i}",
        "completions": [{"response": text, "fine-grained_score": x} for text, x in (("a", i), ("b", 0.5))],
    }
    for i in range(7)
]


ORDERED = dict(learning_rate=1e-2, max_steps=4, train_sampling_strategy="sequential")


def trainer(folder, data, **others):
    return trainers.trainer(folder, data, **ORDERED | others)


# --- what comes


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "saved", "folder"])
@pytest.mark.parametrize("rows", [tiny.lists(250, None), RATED], ids=["lists", "UltraFeedback"])
def test_a_stream_has_the_lists_of_the_data_read_whole(name, rows, tmp_path):
    path = tmp_path / name
    if name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif name == "folder":
        path.mkdir()
        write_jsonl(path / "1.jsonl", rows[:5])
        write_jsonl(path / "2.jsonl", rows[5:])
    elif name == "a.parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        write_jsonl(path, rows)
    expected = as_lists(rows).to_list()
    assert load_lists(path).to_list() == expected
    assert list(load_lists(path, streaming=True)) == expected


def test_tool_calls_of_a_stream_are_those_of_the_data_read_whole(tmp_path):
    rows = [{"prompt": [USER], "completions": [[CALL], [CALL | {"content": "2"}]], "scores": [1, 0], "tools": [{"a": 1}]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert list(load_lists(path, streaming=True)) == load_lists(path).to_list()
    datasets.Dataset.from_list([{**rows[0], "tools": "[]"}]).to_parquet(tmp_path / "a.parquet")
    calls = [
        [row["completions"][0][0]["tool_calls"] for row in load_lists(tmp_path / "a.parquet", streaming=x)] for x in (0, 1)
    ]
    assert calls[0] == calls[1] and "add" in calls[0][0]


def test_cells_of_a_csv_file_are_text_and_lists_in_them_json(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        'prompt,completions,scores,weight\n"Is it\nNA?","[""None"", ""yes""]","[0, 1]",2\nNA,"[""a"", ""b""]","[1, 0]",1\n'
    )
    expected = [
        {"prompt": "Is it\nNA?", "completions": ["None", "yes"], "scores": [0.0, 1.0], "weight": 2.0},
        {"prompt": "NA", "completions": ["a", "b"], "scores": [1.0, 0.0], "weight": 1.0},
    ]
    assert load_lists(path).to_list() == expected == list(load_lists(path, streaming=True))
    path.write_text('prompt,chosen,rejected,margin\nwhy,None,"a, b",0.5\nwhat,x\n')
    with pytest.raises(ValueError, match=r"a\.csv, line 3: has not one cell for each of the 4 columns"):
        load_lists(path)


def test_rows_of_one_list_that_follow_each_other_are_one_in_a_stream(tmp_path):
    rows = [{"prompt": p, "response": r, "helpfulness": i} for i, (p, r) in enumerate(("ax", "ay", "bz", "bw", "bv"))]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert list(load_lists(path, streaming=True)) == load_lists(path).to_list()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: rows with the same 'prompt' are one list, which a stream of \.jsonl"):
        load_lists(tmp_path / "a.parquet", streaming=True)


# --- what is said of bad ones


def test_a_bad_row_of_a_stream_is_named_when_it_comes(tmp_path):
    rows = [*tiny.lists(150), {"prompt": "a", "completions": [], "scores": []}, *tiny.lists(2)]
    stream = load_lists(write_jsonl(tmp_path / "a.jsonl", rows), streaming=True)
    assert list(stream.take(149)) == rows[:149]  # it looks one ahead
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 151: field 'completions' holds \[\]; expected a list of at least one"
    ):
        list(stream)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"row 150 of the stream: field 'completions' holds \[\]"):
        list(load_lists(tmp_path / "a.parquet", streaming=True))


def test_rows_that_a_stream_leaves_out_are_counted(tmp_path, caplog):
    rows = [*tiny.lists(3), *[{"prompt": "a", "completions": [], "scores": []}] * 12, *tiny.lists(2)]
    for path in (write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"):
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        caplog.clear()
        assert list(load_lists(path, streaming=True, bad_rows="drop")) == rows[:3] + rows[-2:]
        said = [record.message for record in caplog.records]
        assert "of the stream so far 1 row was left out" in said[0] and "of the stream so far 10 rows were left out" in said[1]
        if path.suffix == ".jsonl":
            assert said[-1].startswith("12 rows were left out: 12 because 'completions' is not a list of at least one")


def test_sources_that_can_not_be_streamed_say_why(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps(tiny.lists(2)))
    with pytest.raises(ValueError, match=r"a\.json: an array of JSON can't be streamed; write a line for each object"):
        load_lists(tmp_path / "a.json", streaming=True)
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"a\.jsonl\.zst: \.zst files need the package zstandard"):
        load_lists(tmp_path / "a.jsonl.zst")
    write_jsonl(tmp_path / "cut.jsonl.gz", tiny.lists(50))
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "cut.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: behind line \d+: cut or damaged"):
        load_lists(tmp_path / "cut.jsonl.gz")
    with pytest.raises(ValueError, match=r"revision='main' is for a dataset on the hub"):
        load_lists(tmp_path / "a.json", revision="main")


def test_config_and_revision_go_to_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        found = datasets.Dataset.from_list(tiny.lists(2))
        return found.to_iterable_dataset() if kwargs["streaming"] else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for streaming in (False, True):
        assert list(load_lists("a/b", config="c", revision="d", split="e", streaming=streaming)) == tiny.lists(2)
        assert asked.pop() == (("a/b", "c"), {"split": "e", "revision": "d", "streaming": streaming})


# --- several sources


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_are_mixed_by_weight_and_seed_and_every_list_comes(streaming, tmp_path):
    rows, pairs = tiny.lists(300), [{"prompt": f"p{i}", "chosen": "x", "rejected": "y", "extra": i} for i in range(40)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", pairs)
    sources = [{"path": str(tmp_path / "a.jsonl"), "weight": 3}, {"path": str(tmp_path / "b.jsonl"), "form": "pairs"}]
    mixed, again, other = (list(load_lists(sources, streaming=streaming, seed=seed)) for seed in (1, 1, 2))
    assert mixed == again != other
    paths = [source["path"] for source in sources]
    by_path, by_name = (list(load_lists(x, streaming=streaming, seed=1)) for x in (paths, [{"path": path} for path in paths]))
    assert by_path == by_name != mixed
    of_b = [row["prompt"] for row in mixed if row["prompt"].startswith("p")]
    assert {row["prompt"] for row in mixed} == {row["prompt"] for row in (*rows, *pairs)}
    assert 0.2 < len(of_b) / len(mixed) < 0.3  # a quarter; b is repeated
    assert of_b[:40] == [f"p{i}" for i in range(40)]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_only_some_rows_of_one_source_have_is_in_the_mixture(streaming, tmp_path):
    """A stream's columns are not those of its first rows, and messages of two sources need not have the same keys."""
    said, thought = ({"role": "assistant", "content": "x"} | more for more in ({}, {"reasoning_content": "so"}))
    plain = {"prompt": [{"role": "user", "content": "q"}], "completions": [[said], [said]], "scores": [1, 0], "note": None}
    tools = [{"type": "function", "function": {"name": "f"}}]
    late = plain | {"completions": [[thought], [said]], "tools": tools, "ref_logps": [-0.5, -1.5], "note": "late"}
    write_jsonl(tmp_path / "a.jsonl", [plain] * 120 + [late])
    write_jsonl(tmp_path / "b.jsonl", [plain | {"note": 1}] * 9)
    mixed = list(load_lists([str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")], streaming=streaming))
    (found,) = [row for row in mixed if row.get("tools")]
    assert found["completions"][0][0]["reasoning_content"] == "so" and found["ref_logps"] == [-0.5, -1.5]
    assert json.loads(found["tools"]) == tools


def test_sources_that_do_not_fit_are_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", tiny.lists(2))
    write_jsonl(tmp_path / "b.jsonl", RATED)
    a, b = ({"path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(ValueError, match=r"prompt is text in .*a\.jsonl and messages in .*b\.jsonl.*as_messages=True"):
        load_lists([a, b])
    with pytest.raises(ValueError, match=r"prompt is text in .*a\.jsonl and messages in .*b\.jsonl.*as_messages=True"):
        load_lists([a, b], streaming=True)
    assert len(load_lists([a, b | {"as_messages": False}])) >= 9
    with pytest.raises(ValueError, match=r"weight of .*a\.jsonl must be a finite number above 0, got 0"):
        load_lists([a | {"weight": 0}, b])
    with pytest.raises(ValueError, match=r"source .*a\.jsonl has no setting 'wieght'; did you mean 'weight'"):
        load_lists([a | {"wieght": 1}, b])


# --- training


def test_training_on_a_stream_is_training_on_the_same_rows_in_their_order(tmp_path):
    rows = tiny.lists(5, None, seed=3)  # the end of a pass lies within a batch
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    stream = trainer(tmp_path, load_lists(path, streaming=True), max_steps=5)
    whole = trainer(tmp_path, rows * 2, max_steps=5)
    batches = [[], []]
    for t, seen in zip((stream, whole), batches, strict=True):
        collate = t.data_collator.__call__
        t.data_collator = lambda rows, collate=collate, seen=seen: seen.append(collate(rows)) or seen[-1]
        t.train()
    for a, b in zip(*(seen[:5] for seen in batches), strict=True):
        assert a["relevance"].tolist() == b["relevance"].tolist()
        assert all(torch.equal(a["rows"][0][name], b["rows"][0][name]) for name in a["rows"][0])
    found = [losses(t) for t in (stream, whole)]
    assert found[0] == found[1] and len(found[0]) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_a_stream_goes_on_with_the_batches_that_would_have_come(workers, tmp_path):
    """From a checkpoint in the second pass over a shuffled stream."""
    path = write_jsonl(tmp_path / "a.jsonl", tiny.lists(7, None, seed=3))
    stream = load_lists(path, streaming=True).shuffle(seed=5, buffer_size=4)
    settings = dict(
        max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2, dataloader_num_workers=workers
    )
    whole = trainer(tmp_path, stream, **settings)
    whole.train()
    resumed = trainer(tmp_path, stream, **settings)
    tokenised = []
    resumed.train_dataset._tokenised = _counting(resumed.train_dataset._tokenised, tokenised)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = [losses(t) for t in (whole, resumed)]
    assert found[0] == found[1]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert workers or len(tokenised) < 16  # of 24 lists: those that are skipped are not tokenised


def _counting(function, calls):
    return lambda *args: calls.append(args) or function(*args)


@pytest.mark.parametrize(
    ("others", "row", "message"),
    [
        (dict(max_steps=-1), {}, "max_steps must be given where train_dataset is a stream"),
        (dict(precompute_ref_log_probs=True), {}, "precompute_ref_log_probs does not work with a stream: .*larpo score"),
        (
            dict(max_tokens_per_batch=64),
            {},
            "max_tokens_per_batch does not work with a stream: it puts lists of similar length",
        ),
        (dict(train_sampling_strategy="group_by_length"), {}, "'group_by_length' does not work with a stream"),
        ({}, {"weight": 2.0}, "weight: list 0 of the train data has one, and weights are divided by their mean over all"),
        (dict(length_normalized=True), {"implicit_prompt": True}, "list 0 of the train data has none"),
    ],
)
def test_what_needs_all_lists_is_refused_of_a_stream(others, row, message, tmp_path):
    data = datasets.Dataset.from_list([one | row for one in tiny.lists(3)]).to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        training_stream(data, tiny.tokenizer(), trainers.config(tmp_path, **ORDERED | others))


def test_what_reads_all_lists_takes_no_stream(tmp_path):
    stream = datasets.Dataset.from_list(tiny.lists(3)).to_iterable_dataset()
    with pytest.raises(TypeError, match="got IterableDataset; rows that come one after the other become a list"):
        trainer(tmp_path, tiny.lists(3)).evaluate(stream)
    with pytest.raises(TypeError, match=r"lists must be a datasets\.Dataset, as larpo\.as_lists makes it, got IterableDataset"):
        score_lists(tiny.causal_lm(), stream, tiny.tokenizer())


def test_what_a_later_list_has_is_checked_when_it_comes(tmp_path):
    given = {"prompt": "a", "completions": ["b", "c"], "scores": [1, 0], "prompt_ids": [1], "completion_ids": [[3], [4]]}
    for late, message in (
        ({"completion_ids": [[3], [99]]}, "list 120 of the train data holds the token 99, the model's vocabulary has 96"),
        ({"ref_logps": [-1.0, -2.0]}, "ref_logps: list 120 of the train data and the first list differ"),
        ({"weight": 1.0}, "weight: list 120 of the train data has one"),
    ):
        data = load_lists(write_jsonl(tmp_path / "a.jsonl", [given] * 120 + [given | late]), streaming=True)
        with pytest.raises(ValueError, match=message):
            list(itertools.islice(trainer(tmp_path, data).train_dataset, 121))


def test_a_subset_of_each_list_is_taken_in_a_stream(tmp_path):
    rows, args = tiny.lists(4, 4), trainers.config(tmp_path, **ORDERED, list_top=1, list_bottom=1)
    found = iter(training_stream(datasets.Dataset.from_list(rows).to_iterable_dataset(), tiny.tokenizer(), args))
    for row, tokens in zip(rows, found, strict=False):
        assert sorted(tokens["scores"]) == [min(row["scores"]), max(row["scores"])]


def test_larpo_train_streams_a_mixture_and_goes_on_in_its_folder(tmp_path):
    tiny.save(tmp_path / "model")
    for name, seed in (("a", 1), ("b", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", tiny.lists(6, None, seed=seed))
    yaml = f"""
model: {tmp_path}/model
train_data: [{{path: {tmp_path}/a.jsonl, weight: 2}}, {{path: {tmp_path}/b.jsonl}}]
streaming: true
shuffle_buffer: 3
output_dir: {tmp_path}/out
max_steps: 2
save_steps: 1
use_cpu: true
report_to: none
disable_tqdm: true
"""
    (tmp_path / "train.yaml").write_text(yaml)
    job, args = commands.train_settings(tmp_path / "train.yaml", [])
    assert commands.train(job, args).state.global_step == 2
    flags = ["--max_steps=3", "--train_data", json.dumps(job.train_data)]
    longer, args = commands.train_settings(tmp_path / "train.yaml", flags)
    assert longer == job
    t = commands.train(longer, args)
    assert t.state.global_step == 3 and t.train_dataset.skip == 16
    other, args = commands.train_settings(tmp_path / "train.yaml", [f"--train_data={tmp_path}/b.jsonl"])
    with pytest.raises(ValueError, match=r"has checkpoints of another run: train_data was 'a stream, at first .*lists, sha256"):
        commands.train(other, args)
