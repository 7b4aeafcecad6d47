"""The package as a whole: what it imports, and the examples it shows."""

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import opcd.losses

ONLY_TORCH = """
import sys
import torch, torch.utils.checkpoint

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | {"torch", "opcd"} or name in {"opcd.modules", "opcd.data"}:
            raise ImportError(f"opcd.losses must not import {name}")

before = set(sys.modules)
sys.meta_path.insert(0, Refuse())
import opcd.losses
house = {name for name in set(sys.modules) - before if name.startswith("opcd.")}
own = {"opcd.runtime", "opcd.runtime.lazy", "opcd.runtime.versions"}  # what `import opcd` takes
assert all(name.startswith("opcd.losses") for name in house - own), house
"""


def test_it_imports_with_torch_and_the_standard_library_alone() -> None:
    result = subprocess.run([sys.executable, "-c", ONLY_TORCH], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_file_names_another_package() -> None:
    """What torch itself has imported by then (numpy) would pass the test above unseen."""
    for file in Path(opcd.losses.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith("opcd.losses") or name.partition(".")[0] in sys.stdlib_module_names | {"torch"}


def test_the_examples_of_the_docstring_run() -> None:
    assert doctest.testmod(opcd.losses) == (0, 8)
