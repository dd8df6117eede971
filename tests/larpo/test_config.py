"""LarPOConfig: defaults that follow each other, and settings of TrainingArguments that mean nothing here."""

import pytest

for package in ("transformers", "accelerate", "datasets"):
    pytest.importorskip(package)

from larpo.config import LarPOConfig


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
    with pytest.raises(ValueError, match=r"max_prompt_length must be below max_length.*got 512 and 512"):
        config(tmp_path, max_length=512, max_prompt_length=512)


def test_the_limit_of_prompts_is_one_number_on_a_command_line_too(tmp_path):
    from transformers import HfArgumentParser

    parse = HfArgumentParser(LarPOConfig).parse_args_into_dataclasses
    flags = [f"--output_dir={tmp_path}", "--max_length=64"]
    assert parse(flags)[0].max_prompt_length == 32
    assert parse([*flags, "--max_prompt_length=40"])[0].max_prompt_length == 40
