"""The examples in the docstrings print what they say."""

import doctest
import importlib
import importlib.util
import pkgutil

import pytest
import torch

import larpo_kernels

MODULES = sorted(module.name for module in pkgutil.walk_packages(larpo_kernels.__path__, "larpo_kernels."))
PUBLIC = ["fused_listwise_loss", "logps", "objectives"]  # what a user calls shows an example


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        pytest.skip("triton is not installed")
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_modules_show_examples(name):
    module = importlib.import_module(f"larpo_kernels.{name}")
    assert sum(len(test.examples) for test in doctest.DocTestFinder().find(module)) > 0
