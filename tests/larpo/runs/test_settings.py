"""Settings of a command: a YAML file, and flags over it, as the fields of dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest

from larpo.runs.settings import flag_values, read_settings


class Order(Enum):
    UP = "up"
    DOWN = "down"


@dataclass
class Where:
    model: str
    peft: dict[str, Any] | str | None = None
    names: list[str] | None = None


@dataclass(kw_only=True)
class How:
    beta: float = 0.1
    steps: int | None = None
    shuffle: bool = True
    order: Order | str = "up"
    device: str = field(default="cpu", metadata={"choices": ["cpu", "cuda"]})
    reports: str | list[str] = "none"
    heats: list[float] = field(default_factory=list)
    subset: Any = "all"


def read(*flags, text=None, path=None):
    file = None
    if text is not None:
        file = path / "x.yaml"
        file.write_text(text)
    return read_settings((Where, How), file, flag_values(flags, (Where, How)))


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    where, how = read("--beta", "1", "--no-shuffle", text="model: m\nbeta: 0.5\nsteps: 3\npeft: {r: 8}", path=tmp_path)
    assert where == Where("m", {"r": 8})
    assert how == How(beta=1.0, steps=3, shuffle=False) and isinstance(how.beta, float)


def test_one_item_in_the_file_stands_for_a_list_of_it_as_in_a_flag(tmp_path):
    where, how = read(text="model: m\nnames: a\nheats: 1\nreports: b", path=tmp_path)
    assert (where.names, how.heats, how.reports) == (["a"], [1], "b")


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--model", "010"], {"model": "010"}),
        (["--model=a=b"], {"model": "a=b"}),
        (["--model", "'\\n'"], {"model": "\\n"}),
        (["--model", '"\\n"'], {"model": "\n"}),
        (["--steps", "None"], {"steps": None}),
        (["--steps", "-5"], {"steps": "-5"}),
        (["--shuffle", "no"], {"shuffle": False}),
        (["--shuffle", "1"], {"shuffle": True}),
        (["--shuffle"], {"shuffle": True}),
        (["--names", "a", "b"], {"names": ["a", "b"]}),
        (["--names", "1"], {"names": ["1"]}),
        (["--names", "[]"], {"names": []}),
        (["--reports", "a"], {"reports": "a"}),
        (["--heats", "1", "0.5"], {"heats": [1.0, 0.5]}),
        (["--heats", "[1, 0.5]"], {"heats": [1, 0.5]}),
        (["--peft", '{"a": "\\ud83d\\ude00"}'], {"peft": {"a": "😀"}}),
        (["--peft", "{r: 8}"], {"peft": {"r": 8}}),
        (["--peft.r", "8", "--peft.lr", "1e-3"], {"peft.r": 8, "peft.lr": 1e-3}),
        (["--subset", "[1, 3]"], {"subset": [1, 3]}),
        (["--subset", "a: b: c"], {"subset": "a: b: c"}),
    ],
)
def test_the_text_of_a_flag_is_read_by_the_type_of_its_setting(flags, found):
    assert flag_values(flags, (Where, How)) == found


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--betta", "1"], r"unknown setting 'betta'; did you mean 'beta'\?"),
        (["--peff.r", "1"], r"unknown setting 'peff.r'; did you mean 'peft'\?"),
        (["--beta", "1", "2"], "expected flags, got '2'"),
        (["more"], "expected flags, got 'more'"),
        (["--beta"], "--beta needs a value"),
        (["--steps", "0.5"], "steps must be a whole number, got '0.5'"),
        (["--shuffle", "perhaps"], "shuffle must be a boolean, got 'perhaps'"),
        (["--beta", "None"], "beta must be a number, got 'None'"),
        (["--order", "left"], "order must be one of 'up', 'down', got 'left'"),
        (["--device", "tpu"], "device must be one of 'cpu', 'cuda', got 'tpu'"),
        (["--steps.x", "1"], "steps does not take {'x': 1}"),
        (["--steps=1", "--steps.x=1"], "'steps.x' is set, but steps holds '1'"),
    ],
)
def test_a_bad_flag_is_named(flags, said):
    with pytest.raises(ValueError, match=said):
        read("--model=m", *flags)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("beta: null", r"beta does not take None \(its type is float\)"),
        ("steps: 1.5", r"steps does not take 1.5 \(its type is int \| None\)"),
        ("reports: {password: x}", r"reports does not take {'password': '\*\*\*'}"),
        ("model: null", r"model must be given in .*x\.yaml or as --model"),
    ],
)
def test_a_value_of_another_type_in_the_file_is_refused(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read(text=text if "model" in text else f"model: m\n{text}", path=tmp_path)
