"""LarPOConfig: defaults that follow each other, and settings of TrainingArguments that mean nothing here."""

from dataclasses import MISSING, fields
from types import SimpleNamespace

import pytest
import yaml

from larpo import commands
from larpo.align import AlignConfig
from larpo.align.training import arguments
from larpo.commands import ScoreJob, TrainJob
from larpo.config import LarPOConfig
from larpo.data.reading import Reading
from larpo.serving.settings import ServerSettings
from larpo.training.refused_settings import refuse_settings


def config(folder, **options):
    return LarPOConfig(**{"output_dir": str(folder), "report_to": "none", "use_cpu": True, **options})


# --- lengths


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        (dict(max_length=64), 32),
        (dict(max_length=2), 1),
        (dict(), 512),
        (dict(max_length=9000), 512),
        (dict(max_length=None), 512),
        (dict(max_length=64, max_prompt_length=48), 48),
        (dict(max_length=64, max_prompt_length=None), None),
    ],
    ids=str,
)
def test_the_limit_of_prompts_follows_from_max_length_where_it_is_not_given(tmp_path, given, limit):
    assert config(tmp_path, **given).max_prompt_length == limit


def test_a_limit_of_prompts_that_is_given_does_not_give_way(tmp_path):
    with pytest.raises(ValueError, match="max_prompt_length=512 must be below max_length=512"):
        config(tmp_path, max_length=512, max_prompt_length=512)


def test_the_limit_of_prompts_is_one_number_on_a_command_line_too(tmp_path):
    from transformers import HfArgumentParser

    parse = HfArgumentParser(LarPOConfig).parse_args_into_dataclasses
    flags = [f"--output_dir={tmp_path}", "--max_length=64"]
    assert parse(flags)[0].max_prompt_length == 32
    assert parse([*flags, "--max_prompt_length=40"])[0].max_prompt_length == 40


# --- words that YAML reads as booleans


def read(tmp_path, text):
    """The settings of `larpo train` with this file."""
    file = tmp_path / "train.yaml"
    file.write_text(f"model: m\ntrain_data: d\noutput_dir: {tmp_path}\n{text}\n")
    return commands.train_settings(file, [])[1]


@pytest.mark.parametrize("word", ["no", "off", "False"])
def test_no_and_off_are_words_where_a_choice_is_meant(tmp_path, word):
    text = "\n".join(f"{name}: {word}" for name in ("save_strategy", "eval_strategy", "logging_strategy", "report_to"))
    training = yaml.safe_load(f"save_strategy: {word}\nlogging_strategy: {word}\nreport_to: {word}")
    loop = AlignConfig(output_dir="run", model="m", prompts=["a"], reward="r", training=training)
    by_loop = arguments(loop, str(tmp_path), 0)
    for args in (read(tmp_path, text), by_loop, config(tmp_path, save_strategy=False, logging_strategy=False)):
        assert (args.save_strategy, args.eval_strategy, args.logging_strategy, args.report_to) == ("no", "no", "no", [])


def test_a_boolean_stays_one_where_the_setting_takes_it(tmp_path):
    args = read(tmp_path, "bf16: no\nappend_eos: off\nreference_free: on\nlr_scheduler_kwargs: {on: yes}\nddp_static_graph: no")
    assert (args.bf16, args.append_eos, args.reference_free, args.ddp_static_graph) == (False, False, True, False)
    assert args.lr_scheduler_kwargs == {True: True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("save_strategy: yes", r"save_strategy must be one of 'no', 'steps', .*got True; YAML reads no, off"),
        ("run_name: on", "run_name must be no boolean, got True"),
        ("beta: yes", "beta must be no boolean, got True"),
        ("warmup_steps: no", "warmup_steps must be no boolean, got False"),
        ("peft: no", "peft must be no boolean, got False"),
    ],
)
def test_a_boolean_that_stands_for_no_choice_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize("name", ["bf16", "append_eos", "disable_tqdm"])
def test_a_boolean_in_quotes_is_refused_where_it_would_count_as_true(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be a boolean, got 'no'"):
        config(tmp_path, **{name: "no"})


def test_a_number_in_quotes_is_a_number(tmp_path):
    args = config(tmp_path, learning_rate="1e-5", max_steps="7", beta="0.3")
    assert (args.learning_rate, args.max_steps, args.beta) == (1e-5, 7, 0.3)
    assert read(tmp_path, "max_length: None").max_length is None
    with pytest.raises(ValueError, match="max_steps must be a whole number, got 'many'"):
        config(tmp_path, max_steps="many")


# --- what is inherited


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor must be 0"),
        (dict(include_num_input_tokens_seen="all"), r"include_num_input_tokens_seen must be 'no'.*tokens_per_second"),
        (dict(include_num_input_tokens_seen=True), "include_num_input_tokens_seen must be 'no'"),
        (dict(train_sampling_strategy="batch_rebalance"), "train_sampling_strategy"),
        (dict(accelerator_config={"even_batches": False}), "even_batches must be True"),
        (dict(accelerator_config={"dispatch_batches": True}), "accelerator_config: dispatch_batches must be left out"),
        (dict(accelerator_config={"split_batches": True}), "accelerator_config: split_batches must be left out"),
        (dict(auto_find_batch_size=True), r"auto_find_batch_size must be False.*candidate_micro_batch_size"),
        (dict(bf16_full_eval=True), r"bf16_full_eval must be False.*the reference"),
        (dict(use_liger_kernel=True), "use_liger_kernel must be False"),
        (
            dict(train_sampling_strategy="group_by_length", max_tokens_per_batch=100),
            "train_sampling_strategy must be random or sequential with max_tokens_per_batch",
        ),
        (dict(neftune_noise_alpha=5.0, share_prefix=True), "neftune_noise_alpha needs share_prefix=False"),
        (dict(optim="adalomo", candidate_micro_batch_size=2), r"optim must not be 'adalomo' with candidate_micro_batch_size"),
        (dict(torch_empty_cache_steps=1, candidate_micro_batch_size=2), "torch_empty_cache_steps must be None"),
    ],
    ids=str,
)
def test_a_setting_that_would_do_nothing_or_something_else_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_sequence_on_several_devices_is_refused(tmp_path):
    args = config(tmp_path)
    args.parallelism_config = SimpleNamespace(tp_size=1, cp_size=2, sp_size=1)  # a real one starts process groups
    with pytest.raises(ValueError, match="parallelism_config: cp_size must be 1, got 2"):
        refuse_settings(args)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resume_from_checkpoint: x", "resume_from_checkpoint must be left out: a run goes on"),
        ("do_predict: true", "do_predict must be left out"),
        ("eval_strategy: steps", "need eval_data, which is not given"),
    ],
)
def test_what_is_there_for_scripts_is_not_ignored_by_the_command(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


# --- what is said of a setting


@pytest.mark.parametrize("settings", [LarPOConfig, AlignConfig, TrainJob, ScoreJob, Reading, ServerSettings])
def test_every_setting_is_described_where_help_and_the_command_line_show_it(settings):
    own = [one for one in fields(settings) if one.name in settings.__annotations__]
    assert len(own) > 5
    for one in own:
        (line,) = [line for line in settings.__doc__.splitlines() if line.strip().startswith(f"{one.name} (")]
        default = "" if one.default is MISSING else f", default {one.default!r}"
        assert f"{default}): {one.metadata['help'][:20]}" in line


# --- settings that are read back


def test_settings_are_the_same_when_they_are_read_back(tmp_path):
    from dataclasses import replace

    from transformers import HfArgumentParser

    args = config(tmp_path / "run", max_length=64, save_strategy="no", objective="listmle", learning_rate=1e-5)
    (tmp_path / "args.json").write_text(args.to_json_string())
    for again in (
        replace(args),
        HfArgumentParser(LarPOConfig).parse_dict(args.to_dict())[0],
        HfArgumentParser(LarPOConfig).parse_json_file(str(tmp_path / "args.json"))[0],
    ):
        assert again.to_dict() == args.to_dict() and again.max_prompt_length == 32 and again.hub_token is None
    (tmp_path / "args.yaml").write_text(f"output_dir: {tmp_path}\nsave_strategy: no\nuse_cpu: true\nlearning_rate: 1e-5")
    read = HfArgumentParser(LarPOConfig).parse_yaml_file(str(tmp_path / "args.yaml"))[0]
    assert (read.save_strategy, read.learning_rate) == ("no", 1e-5)
