"""The rules of CONTRIBUTING.md that a program can check: imports that run one way, sizes, public names, the map."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import opcd
from tests.helpers.paths import ROOT

FILES = sorted((ROOT / "opcd").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

LAYERS = [
    {"__main__"},
    {"distilling"},
    {"cli"},
    {"experience", "planning", "queries"},
    {"callbacks", "chat", "sweep", "writing"},
    {"results"},
    {"evaluation"},
    {"export", "games"},
    {"config", "modules", "tasks"},
    {"data", "serving"},
    {"checkpoints", "models"},
    {"accel", "losses", "runtime"},
]
"""The folders of opcd, from the command down: each imports from layers below its own only. What the command runs by its
name (`COMMANDS` of opcd/cli/__init__.py) stands below it like everything else."""

MOST_FILES = 15
"""Of a folder: one subject, which a reader can keep in mind."""

PUBLIC = {
    "callbacks": [
        *("Alarms", "AnswerSamples", "ExactResume", "ExportStudent", "KeepHistory", "LMEval", "LeaveOnSignal"),
        *("PredictionWriter", "RecoveryAndDrift", "SaveCheckpoints", "StepProgress", "WriteEnvironment"),
        "default_callbacks",
    ],
    "data": [
        *("Anchors", "Batch", "ContextQueryDataModule", "ContextSource", "DataSet", "DataSets", "Example"),
        *("ExampleSource", "OnBadRow", "Placement", "TeacherModels", "Views", "check_same_vocabulary", "context_hash"),
        *("nearest", "parse_row", "parse_rows", "read_contexts", "read_examples", "read_rows", "teacher_key"),
    ],
    "losses": [
        *("JSD", "Divergence", "ForwardKL", "Head", "Loss", "Mixture", "RecordedTokens", "RecordedTopK", "ReverseKL"),
        *("SampledReverseKL", "SkewKL", "SkewReverseKL", "TopK", "as_head", "chunked", "chunked_divergence"),
        *("clip_nats", "entropy", "functional", "retained_mass", "sampled_reverse_kl", "top1_agreement"),
    ],
    "modules": [
        *(
            "BaseTeacher",
            "Cartridge",
            "ColocatedVLLM",
            "Distiller",
            "FSDP2Strategy",
            "FrozenTeacher",
            "Lora",
            "MixedRollout",
            "ModelTeacher",
        ),
        "MovingAverageTeacher",
        *("RecordedRollout", "RecordedTeacher", "Rollout", "RoutedTeachers", "Sampling", "SelfTeacher"),
        *("ServedTeacher", "Student", "StudentRollout", "Teacher", "TeacherRollout", "Trajectories", "VLLMRollout"),
        "VLLMServer",
    ],
}
"""What others may import, and name in their configs: a name that goes breaks them."""


def test_no_two_test_files_have_one_name():
    """pytest would import one for the other."""
    names = [file.name for file in TESTS if file.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def unit(module: str) -> str:
    """The part of opcd that a module belongs to: opcd.runtime.files.user_files -> data."""
    return module.split(".")[1]


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """(module of opcd, line) of every import of a file, those inside of functions too."""
    for node in ast.walk(parsed(file)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            whole = node.module == "opcd"
            names = [f"opcd.{alias.name}" for alias in node.names] if whole else [str(node.module)]
        yield from ((name, node.lineno) for name in names if name.startswith("opcd."))


def units() -> set[str]:
    """The modules and packages directly in opcd/."""
    inside = {file.relative_to(ROOT / "opcd") for file in FILES} - {Path("__init__.py")}
    return {path.parts[0].removesuffix(".py") for path in inside}


def test_every_part_of_opcd_has_its_layer():
    listed = [name for layer in LAYERS for name in layer]
    assert sorted(listed) == sorted(units())


def test_imports_run_one_way():
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = []
    for file in FILES:
        own = unit(".".join(file.relative_to(ROOT).with_suffix("").parts))
        for module, line in imported(file):
            if unit(module) != own and layer[unit(module)] <= layer.get(own, 0):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {module}, which is not below {own}")
    assert wrong == []


def test_a_folder_has_one_subject():
    folders = {file.parent: len(list(file.parent.glob("*.py"))) for file in FILES}
    assert {str(folder.relative_to(ROOT)): n for folder, n in folders.items() if n > MOST_FILES} == {}


def test_no_two_files_have_one_name():
    names = [file.name for file in FILES if file.name not in ("__init__.py", "base.py")]
    assert [name for name, n in Counter(names).items() if n > 1] == []


def test_one_place_installs_the_code_of_a_device():
    users = {
        f"{file.relative_to(ROOT)}:{line}"
        for file in FILES
        for module, line in imported(file)
        if module.startswith("opcd.accel.cpu") and "accel/cpu" not in file.as_posix()
    }
    assert {user.rpartition(":")[0] for user in users} == {"opcd/accel/__init__.py"}


def test_data_knows_nothing_of_what_is_trained():
    names = {
        f"{file.name}: {alias.name}"
        for file in (ROOT / "opcd" / "data").glob("*.py")
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if alias.name in ("LightningModule", "Trainer", "PreTrainedModel")
    }
    assert names == set()


def test_no_function_is_over_80_lines():
    long = {
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for file in FILES
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 80
    }
    assert long == {}


def exported(package: str) -> list[str]:
    """`__all__` of a package."""
    for node in parsed(ROOT / "opcd" / package / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"opcd.{package} has no __all__")


def docstring(package: str, name: str) -> str | None:
    """That of a public name, where it is defined; of a name for a type, the text below it."""
    for node in ast.walk(parsed(ROOT / "opcd" / package / "__init__.py")):  # some are imported when they are asked for
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            inside = ROOT / "/".join(node.module.split("."))
            if inside.is_dir():  # from opcd.losses import functional
                return ast.get_docstring(parsed(inside / f"{name}.py"))
            return defined(parsed(inside.with_suffix(".py")).body, name)
    raise AssertionError(f"opcd.{package} exports {name} and does not import it")


def defined(body: list[ast.stmt], name: str) -> str | None:
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            text = after.value if isinstance(after, ast.Expr) else None
            return text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else None
    raise AssertionError(f"no definition of {name}")


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names(package):
    assert exported(package) == PUBLIC[package]
    assert [name for name in exported(package) if not docstring(package, name)] == []


def test_tests_share_helpers_alone():
    """A test file or a conftest that others import is run by pytest under a second name, its fixtures with it."""
    wrong = []
    for file in TESTS:
        for node in ast.walk(parsed(file)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            parts = {part for name in names for part in name.split(".")}
            if any(part == "conftest" or part.startswith("test_") for part in parts):
                wrong.append(
                    f"{file.relative_to(ROOT)}:{node.lineno} imports {' '.join(names)}: tests/helpers is for that"
                )
    assert wrong == []


def test_conftests_hold_fixtures_alone():
    other = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for file in TESTS
        if file.name == "conftest.py"
        for node in parsed(file).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        if not any(ast.unparse(decorator).startswith("pytest.fixture") for decorator in node.decorator_list)
    ]
    assert other == []


def test_helpers_say_where_the_repository_is():
    root = re.compile(r"Path\(__file__\)\S*\.parent")
    found = {file.relative_to(ROOT).as_posix() for file in TESTS if root.search(file.read_text(encoding="utf-8"))}
    assert found == {"tests/helpers/paths.py"}


def test_the_folder_of_a_test_is_the_folder_of_what_it_tests():
    folders = {file.parent.relative_to(ROOT / "tests") for file in TESTS if file.name.startswith("test_")}
    others = {Path("benchmarks"), Path("drills")}  # of benchmarks/
    assert [str(folder) for folder in folders - others if not (ROOT / "opcd" / folder).is_dir()] == []


def test_the_names_of_the_package_itself():
    names = ["ContextQueryDataModule", "Distiller", "ModelConfig", "Result", "UserError", "__version__", "distill"]
    assert opcd.__all__ == names
    assert [name for name in names if not hasattr(opcd, name)] == []
    code = "import sys, opcd; assert opcd.UserError and opcd.__version__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_every_file_of_data_goes_into_the_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["opcd"]
    package = ROOT / "opcd"
    data = [
        file.relative_to(package) for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    ]
    data = [file for file in data if file.suffix != ".py"]
    assert Path("py.typed") in data
    assert [file for file in data if not any(file.match(pattern) for pattern in patterns)] == []


def test_the_map_shows_every_part():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    entries = re.findall(r"^ {4}(\w\S*)  +\S", text.partition("## The map")[2].partition("## ")[0], re.MULTILINE)
    assert [entry for entry in entries if not (ROOT / entry).exists()] == []
    shown = {entry.removeprefix("opcd/").rstrip("/").removesuffix(".py") for entry in entries if "opcd/" in entry}
    assert shown == units() - {"__main__"}


def test_every_case_is_listed_with_its_tests():
    listed = {}
    for line in (ROOT / "tests" / "cases.md").read_text(encoding="utf-8").splitlines():
        if row := re.match(r"\| ([A-Z]\d+) \|", line):
            listed[row[1]] = set(re.findall(r"`([\w/]+\.py)`", line))
    marked: dict[str, set[str]] = {}
    for file in TESTS:
        for names in re.findall(r"mark\.case\(([^)]*)\)", file.read_text(encoding="utf-8")):
            for name in re.findall(r'"([A-Z]\d+)"', names):
                marked.setdefault(name, set()).add(file.relative_to(ROOT / "tests").as_posix())
    assert listed == marked
