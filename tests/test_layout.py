"""How the packages are put together: which module imports which, and what editors and type checkers see of lazy names."""

import ast
import importlib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements_at_import(body):
    """The statements that run when a module is imported: not those in functions, nor those for type checkers only."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements_at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            for part in ("body", "orelse", "finalbody", "handlers"):
                yield from statements_at_import(getattr(node, part, []))


def imported_modules(node, package, known):
    """What an import statement loads of the known modules; of `from a import b` a.b if that is one, and else a."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names if alias.name in known}
    if not isinstance(node, ast.ImportFrom):
        return set()
    base = package.rsplit(".", node.level - 1)[0] if node.level else ""
    origin = ".".join(filter(None, (base, node.module)))
    found = {name if (name := f"{origin}.{alias.name}") in known else origin for alias in node.names}
    return found & known


@pytest.mark.parametrize("package", ["larpo", "larpo_kernels"])
def test_no_module_imports_itself_by_way_of_others(package):
    paths = {module_name(path): path for path in (ROOT / package).rglob("*.py")}
    imports = {}
    for name, path in paths.items():
        home = name if path.name == "__init__.py" else name.rpartition(".")[0]
        statements = statements_at_import(ast.parse(path.read_text()).body)
        imports[name] = set().union(*(imported_modules(node, home, paths.keys()) for node in statements))
    assert sum(map(len, imports.values())) > 50, "imports are found"
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", ["larpo", "larpo.data"])
def test_type_checkers_see_the_names_that_are_loaded_when_they_are_used(package):
    path = ROOT / package.replace(".", "/") / "__init__.py"
    (block,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
    shown = {alias.name: one.module for one in block.body if isinstance(one, ast.ImportFrom) for alias in one.names}
    annotated = {one.target.id for one in block.body if isinstance(one, ast.AnnAssign)}
    whole = importlib.import_module(package)
    assert set(whole.__all__) == (shown.keys() | annotated) - {"CallableModule"}  # which annotates one of them
    for name in shown.keys() & set(whole.__all__):
        assert getattr(whole, name) is getattr(importlib.import_module(f".{shown[name]}", package), name), name
