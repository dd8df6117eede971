"""`larpo data` on files, and what training says and keeps of its data."""

import json
from functools import partial

import pytest

import larpo
from larpo import LarPOConfig, LarPOTrainer, commands, offline
from larpo.data.summary import FILE, read_summaries, write_summaries
from larpo.runs.intact import Damaged
from tests.helpers import tiny
from tests.helpers.jsonl import write_jsonl
from tests.helpers.tokenizer_families import tiny_tokenizer
from tests.helpers.train_runs import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


@pytest.fixture
def larpo_data(larpo, monkeypatch):
    """Exit status, standard output and standard error of `larpo data`."""
    monkeypatch.setenv("COLUMNS", "120")
    return partial(larpo, "data")


def test_a_file_is_shown_as_tables_json_and_a_page(tmp_path, larpo_data):
    tokenizer = tiny_tokenizer("byte-level")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [row | {"completions": [f"\x1b[31m[b]{text}" for text in row["completions"]]} for row in tiny.lists(12, m=None)]
    file, page, facts = write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a.html", tmp_path / "a.json"
    flags = ["--model", tmp_path / "model", "--max_length", 24, "--html", page, "--json", facts]
    status, out, _ = larpo_data(file, *flags)
    assert status == 0
    assert "[b]" in out and "\\u001b[31m" in out and "\x1b[31m" not in out  # text of the data is neither markup nor control
    assert "[[\\u001b[31m[b] " in out  # what counts, where there are no colours
    found = json.loads(facts.read_text())["train"]
    assert found["limits"]["max_length"] == 24 and found["limits"]["max_prompt_length"] == 12
    expected = larpo.describe(rows, tokenizer, LarPOConfig(max_length=24, report_to=[], use_cpu=True))
    assert found == json.loads(json.dumps(expected.to_json()))
    for label, n in (("lists", expected.lists), ("answers", expected.candidates), ("tokens of an epoch", expected.tokens_run)):
        assert any(
            line.split() == [*label.split(), f"{n:,}", *line.split()[len(label.split()) + 1 :]] for line in out.split("\n")
        )
    assert "<html" in page.read_text()


def test_json_alone_is_on_standard_output(tmp_path, model, larpo_data):
    file = write_jsonl(tmp_path / "a.jsonl", tiny.lists(5))
    status, out, _ = larpo_data(file, "--model", model, "--json", "-", "--limit", 2)
    found = json.loads(out)["train"]
    assert status == 0 and (found["lists"], found["lists_read"]) == (2, 5)


def test_data_of_a_published_form_is_shown(tmp_path, model, larpo_data):
    """UltraFeedback's nested completions, with an answer that nobody rated."""
    answers = [
        {"model": "m", "response": text, "fine-grained_score": x} for text, x in ((" a", 4.5), (" b", None), (" c", 3.0))
    ]
    file = write_jsonl(tmp_path / "a.jsonl", [{"source": "s", "instruction": "the cat", "completions": answers}] * 3)
    status, out, _ = larpo_data(file, "--model", model, "--as_messages", "false", "--json", "-")
    found = json.loads(out)["train"]
    assert status == 0 and found["form"] == "UltraFeedback" and "fine-grained_score" in found["scored_by"]
    assert (found["candidates"], found["prompts_repeated"]) == (6, 2)
    assert [(one["what"], one["count"]) for one in found["left_out"]] == [("answer", 3)]


def test_a_run_for_a_gpu_can_be_looked_at_without_one(tmp_path, model):
    settings = tmp_path / "train.yaml"
    file = write_jsonl(tmp_path / "a.jsonl", tiny.lists(3))
    settings.write_text(f"model: {model}\ntrain_data: {file}\noutput_dir: out\nbf16: true\ntf32: true\nfsdp: full_shard\n")
    assert commands.describe(None, None, settings, [])["train"].lists == 3


@pytest.mark.parametrize("load", [offline.openbookqa, offline.siqa])
def test_lists_of_questions_are_shown(tmp_path, model, load):
    try:
        lists = load()
    except ImportError as error:
        pytest.skip(str(error))
    rows = [{"prompt": one.prompt, "completions": one.completions, "scores": one.scores} for one in lists]
    found = commands.describe(str(write_jsonl(tmp_path / "a.jsonl", rows)), str(model), None, ["--use_cpu"], limit=100)["train"]
    size = len(lists[0].scores)
    assert (found.lists, found.lists_read, found.candidates) == (100, len(lists), 100 * size)
    assert found.scores.bars == ((0, 0, 100 * (size - 1)), (1, 1, 100))
    assert found.pairs_tied == 100 * (size - 1) * (size - 2) // 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say which data: larpo data FILE_OR_NAME"),
        (("--max_length", "8", "a.jsonl"), "say which data: larpo data FILE_OR_NAME"),
        (("a.jsonl",), "model must be given"),
        (("a.jsonl", "--model", "m", "--max_lenght", "8"), "unknown setting 'max_lenght'; did you mean 'max_length'"),
    ],
)
def test_what_is_missing_or_unknown_ends_in_one_sentence(tmp_path, monkeypatch, larpo_data, arguments, said):
    monkeypatch.chdir(tmp_path)
    status, _, err = larpo_data(*arguments)
    assert status == 2 and said in err and "Traceback" not in err


# --- training


@pytest.mark.parametrize("mixed", [False, True])
def test_training_keeps_what_it_saw_and_the_command_shows_it(tmp_path, model, larpo_data, mixed):
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "the cat", "chosen": " sat", "rejected": " ran"}] * 4)
    lists = write_jsonl(tmp_path / "b.jsonl", tiny.lists(3))
    file = json.dumps([{"path": str(file)}, {"path": str(lists)}]) if mixed else file
    settings = tmp_path / "train.yaml"
    settings.write_text(
        f"model: {model}\ntrain_data: {file}\noutput_dir: {tmp_path / 'out'}\nmax_steps: 1\nuse_cpu: true\nreport_to: none\n"
        "save_strategy: 'no'\ndisable_tqdm: true\nas_messages: false\n"
    )
    train(settings)
    kept = read_summaries(tmp_path / "out" / FILE)
    assert kept == commands.describe(None, None, settings, [])
    assert kept["train"].form == ("Orca-DPO, lists" if mixed else "Orca-DPO")
    status, out, _ = larpo_data(tmp_path / "out" / FILE)
    assert status == 0 and "Orca-DPO" in out


def test_nothing_is_tokenised_again_for_the_summary(tmp_path, model, monkeypatch):
    from larpo.data import tokenization

    calls, tokenize = [], tokenization._tokenize
    monkeypatch.setattr(tokenization, "_tokenize", lambda *given: calls.append(1) or tokenize(*given))
    trainer = LarPOTrainer(
        tiny.causal_lm(),
        args=LarPOConfig(
            output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", reference_free=True
        ),
        train_dataset=tiny.lists(5),
        processing_class=tiny.tokenizer(),
    )
    assert not (tmp_path / FILE).exists()  # it is written when training starts
    trainer.train()
    assert len(calls) == 5
    assert read_summaries(tmp_path / FILE)["train"].lists == 5


def test_texts_stay_out_of_a_folder_that_is_uploaded(tmp_path):
    summary = larpo.describe(tiny.lists(3), tiny.tokenizer(), LarPOConfig(report_to=[], use_cpu=True))
    write_summaries(tmp_path, {"train": summary}, examples=False)
    assert summary.examples and read_summaries(tmp_path / FILE)["train"].examples == ()
    for text in ('{"train": {"lists": 3}}', "[1]", '{"train":', ""):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(Damaged):
            read_summaries(tmp_path / FILE)
