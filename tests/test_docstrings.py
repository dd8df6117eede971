"""Docstrings that the reference of the documentation site shows: every argument has an entry of its own."""

import dataclasses
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHOWN = sorted(
    {name for page in (ROOT / "docs/reference").glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)}
)
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
FEW = 2  # arguments that a sentence can explain


def functions(shown):
    """Name and function, or class that is called, behind a line `::: name` of a page."""
    if not inspect.ismodule(shown):
        return [(shown.__qualname__, shown)]
    own = vars(shown).items()
    return [(name, x) for name, x in own if not name.startswith("_") and getattr(x, "__module__", "") == shown.__name__]


@pytest.mark.parametrize("name", SHOWN)
def test_every_argument_is_explained(name):
    for package in ("transformers", "accelerate", "datasets") if name.startswith("larpo.") else ():
        pytest.importorskip(package)
    for own, function in functions(pkgutil.resolve_name(name)):
        if not (inspect.isfunction(function) or "__init__" in vars(function)) or dataclasses.is_dataclass(function):
            continue  # the fields of a dataclass have their text beside them
        text = f"{inspect.getdoc(function)}\n{inspect.getdoc(getattr(function, '__init__', None)) or ''}"
        arguments = {one for one, kind in inspect.signature(function).parameters.items() if kind.kind not in VARIADIC}
        explained = set(re.findall(r"^    (\w+)(?: \(.*\))?: ", text, re.M))
        if (len(arguments) > FEW and name != "larpo_kernels.reference") or "Args:" in text:
            assert not arguments - explained, own


@pytest.mark.parametrize("name", SHOWN)
def test_no_entry_stands_for_several_arguments(name):
    for package in ("transformers", "accelerate", "datasets") if name.startswith("larpo.") else ():
        pytest.importorskip(package)
    for own, function in functions(pkgutil.resolve_name(name)):
        section = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
        assert not re.findall(r"^    (?:\w+, [\w, ]+|others): ", section, re.M), own
