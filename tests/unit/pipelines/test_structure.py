"""The structure of the code, read from its imports: directions, circles, sizes, and the names that are kept apart."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MOST_MODULES = 9  # in a package of pipelines/
RAY_INTERNALS = "pipelines.cluster.ray_internals"
# What other packages may import from a driver: its entry point, and the types of its arguments and results.
LENT = {
    "pipelines.training.train": {"train", "RunResult", "TrialContext"},
    "pipelines.tuning.tune": {"tune", "StudyResult"},
    "pipelines.folds.cross_validate": {"cross_validate", "FoldsResult"},
    "pipelines.inference.evaluate": {"evaluate", "Evaluation", "ClassResult"},
}


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        module: the module that is imported, or from which a name is.
        name: the name in it; None for ``import module``.
        line: where it stands.
        typing: whether it stands below ``if TYPE_CHECKING``, so that it does not run.
    """

    module: str
    name: str | None
    line: int
    typing: bool

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


def modules_of(package: str) -> dict[str, Path]:
    """The modules of a top-level package by their dotted names; a package is its ``__init__``."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = {package: modules_of(package) for package in ("posmlp", "pipelines")}
ALL = {name: path for modules in MODULES.values() for name, path in modules.items()}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in ALL.items()}


def imports_of(module: str) -> Iterator[Import]:
    """All imports of a module, also those inside functions, and ``import_module("name")``."""
    typing = {
        id(inner)
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, node.lineno, id(node) in typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: a relative import"
            yield from (Import(node.module or "", a.name, node.lineno, id(node) in typing) for a in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, None, node.lineno, False)


def target(found: Import) -> str | None:
    """The module of this project that an import loads, or None."""
    return next((name for name in (found.path, found.module) if name in ALL), None)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle in the graph of who imports whom, each before what it imports; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]  # graphlib names what is imported first
    return []


def test_posmlp_imports_neither_ray_nor_mlflow_nor_pipelines():
    """Also not inside functions: it is plain PyTorch and NumPy."""
    forbidden = {"ray", "mlflow", "pipelines", "tune_spaces", "benchmarks", "tests"}
    found = [
        f"{module}:{each.line} imports {each.path}"
        for module in MODULES["posmlp"]
        for each in imports_of(module)
        if each.path.partition(".")[0] in forbidden
    ]
    assert not found, "\n".join(found)


def test_modules_of_posmlp_import_each_other_in_one_direction():
    """Imports for type checkers alone are not counted: they do not run."""
    graph = {
        module: {
            found
            for each in imports_of(module)
            if not each.typing and (found := target(each)) in MODULES["posmlp"] and found != module
        }
        for module in MODULES["posmlp"]
    }
    assert not circle(graph), " -> ".join(circle(graph))


def package_of(module: str) -> str:
    """The sub-package of pipelines in which a module lies; a module directly in pipelines is one by itself."""
    return ".".join(module.split(".")[:2])


def test_packages_of_pipelines_import_each_other_in_one_direction():
    """Also inside functions and for type checkers. The message has the imports that make the circle."""
    where = defaultdict(list)
    for module in MODULES["pipelines"]:
        for each in imports_of(module):
            found = target(each)
            if found in MODULES["pipelines"] and package_of(found) != package_of(module):
                where[package_of(module), package_of(found)].append(f"{module}:{each.line} imports {each.path}")
    graph = defaultdict(set)
    for start, end in where:
        graph[start].add(end)
    found = circle(graph)
    steps = [line for pair in pairwise(found) for line in where[pair]]
    assert not found, "\n".join([" -> ".join(found), *steps])


def test_a_package_of_pipelines_has_few_modules():
    counts = defaultdict(list)
    for path in MODULES["pipelines"].values():
        if path.name != "__init__.py":
            counts[str(path.parent.relative_to(ROOT))].append(path.name)
    too_large = {folder: names for folder, names in counts.items() if len(names) > MOST_MODULES}
    assert not too_large


def aliases(module: str) -> dict[str, str]:
    """The local names that stand for something of Ray, with what they stand for."""
    found = {}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "ray":
                    found[alias.asname or "ray"] = alias.name if alias.asname else "ray"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ray":
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_private(path: str) -> bool:
    """Whether a dotted name is one of Ray with a private part."""
    return path.startswith("ray.") and bool(re.search(r"\._(?!_)", path))


def private_names(module: str) -> Iterator[tuple[int, str]]:
    """Lines and private names of Ray in a module: imported, used as attributes, or in a string that is one name."""
    for each in imports_of(module):
        if is_private(each.path):
            yield each.line, each.path
    known = aliases(module)
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in known and is_private(f"{known[root]}.{rest}") and not is_private(known[root]):
                yield node.lineno, f"{known[root]}.{rest}"
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"ray(\.\w+)+", node.value)
            and is_private(node.value)
        ):
            yield node.lineno, node.value


def test_private_names_of_ray_are_in_one_module():
    found = [
        f"{module}:{line}: {name}" for module in ALL if module != RAY_INTERNALS for line, name in private_names(module)
    ]
    assert not found, "\n".join(found)
    assert [*private_names(RAY_INTERNALS)]  # the test sees them where they are


@pytest.mark.parametrize("driver", LENT)
def test_a_driver_lends_only_its_entry_point(driver):
    """What else several packages need has a module of its own."""
    assert driver in ALL
    found = [
        f"{module}:{each.line} imports {each.path}"
        for module in ALL
        if package_of(module) != package_of(driver)
        for each in imports_of(module)
        if each.path == driver or (each.module == driver and each.name not in LENT[driver])
    ]
    assert not found, "\n".join(found)
