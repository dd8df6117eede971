"""Packages that some recipes need and others do not."""

import importlib
from types import ModuleType


def need(module: str, extra: str) -> ModuleType:
    """The module, or an ImportError that names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"this recipe needs {package}: pip install 'larpo_kernels[{extra}]'") from error
