"""The examples in the docstrings print what they say."""

import doctest
import importlib
import importlib.util
import pkgutil

import pytest
import torch

import larpo
import larpo_kernels

PACKAGES = (larpo_kernels, larpo)
MODULES = sorted(m.name for package in PACKAGES for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
OPTIONAL = ("triton", "transformers", "accelerate", "peft", "datasets", "pandas", "typer", "rich", "yaml", "tqdm", "gymnasium")
PUBLIC = ["fused_listwise_loss", "logps", "objectives"]  # what a user calls shows an example


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_show_examples(name):
    module = importlib.import_module(f"larpo_kernels.{name}")
    assert sum(len(test.examples) for test in doctest.DocTestFinder().find(module)) > 0
