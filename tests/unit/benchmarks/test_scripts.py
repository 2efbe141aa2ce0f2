"""The scripts that measure: what they import from this project exists."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[3] / "benchmarks").glob("*.py"))


def exists(module, name):
    return hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_imported_names_exist(script):
    imports = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").partition(".")[0] in ("posmlp", "pipelines", "tune_spaces")]
    missing = [(node.module, each.name) for node in ours for each in node.names if not exists(node.module, each.name)]
    assert not missing
