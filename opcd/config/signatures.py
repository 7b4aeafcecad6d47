"""The options of `opcd fit`, read from the source text of the classes that have them, without importing torch.

A signature is the one place that defines an option. Lightning's parser reads it from the imported class. This module
reads it from the file, to report a mistake before the imports, which take seconds.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

CLASSES = {
    "trainer": "lightning.pytorch.trainer.trainer.Trainer",
    "model": "opcd.modules.distiller.Distiller",
    "data": "opcd.data.datamodule.ContextQueryDataModule",
}
"""The class of each part of a config."""
DEFAULTS = {
    "model.teacher": "opcd.modules.teachers.model_teachers.FrozenTeacher",
    "model.rollout": "opcd.modules.rollouts.student_rollout.StudentRollout",
}
"""The class of a key that names none."""
LINKED = ("data.student", "data.teacher")
"""Keys that the command fills in from others."""
OPTIMIZER = "model.optimizer"
NOT_OPTIONS = ("self", "model", "datamodule")
"""Arguments of a Trainer's method that the command gives."""
Found = tuple[Path, Any]
"""A file, and the node of a class or function in it."""


@cache
def options(command: str = "fit") -> dict[str, bool]:
    """All dotted keys of one of Lightning's commands -> whether they are groups, whose members are keys too."""
    found = {"seed_everything": False}
    for name, path in CLASSES.items():
        found |= {name: True, **_of_class(_find(path), name)}
    names = [arg.arg for arg in _arguments(_method(_find(CLASSES["trainer"]), command))]
    found |= {name: False for name in names if name not in NOT_OPTIONS and not name.endswith("dataloaders")}
    return {key: group for key, group in found.items() if not key.startswith(LINKED)}


@cache
def inner_keys() -> list[str]:
    """Keys within the default classes of a config, such as model.optimizer.lr."""
    found = [inner for key, path in DEFAULTS.items() for inner in _of_class(_find(path), key)]
    return [*found, *(f"{OPTIMIZER}.{name}" for name in default_optimizer()["init_args"])]


@cache
def default_optimizer() -> dict[str, Any]:
    """The class_path and init_args of the call in `opcd.modules.distiller.default_optimizer`.

    The parser has no such default: jsonargparse would carry the arguments over to an optimizer of another class.
    """
    _, function = _find("opcd.modules.distiller.default_optimizer")
    call: Any = next(node.value for node in function.body if isinstance(node, ast.Return))
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return {"class_path": ast.unparse(call.func), "init_args": arguments}


def _of_class(found: Found, above: str) -> dict[str, bool]:
    """The keys of a class: the fields of a dataclass, or else the arguments of `__init__`."""
    file, node = found
    if _is_dataclass(node):
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        arguments = [(ast.unparse(field.target), field.annotation) for field in fields]
    else:
        given = _arguments(_method(found, "__init__"))
        arguments = [(arg.arg, arg.annotation) for arg in given if arg.arg != "self" and arg.annotation]
    keys = {}
    for name, annotation in arguments:
        key = f"{above}.{name}"
        types = [_look_up(part, file) for part in ast.unparse(annotation).removesuffix(" | None").split(" | ")]
        inner = [each for each in types if each is not None and _is_dataclass(each[1])]
        keys[key] = len(inner) == len(types)
        for each in inner if keys[key] else []:
            keys |= _of_class(each, key)
    return keys


def _method(found: Found, name: str) -> ast.FunctionDef:
    return next(node for node in found[1].body if isinstance(node, ast.FunctionDef) and node.name == name)


def _arguments(method: ast.FunctionDef) -> list[ast.arg]:
    return [*method.args.args, *method.args.kwonlyargs]


def _is_dataclass(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(each) for each in node.decorator_list)


def _look_up(name: str, file: Path) -> Found | None:
    """The definition of a name, in the file or in the file that it is imported from; None if it is in neither."""
    for node in _statements(file):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return file, node
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            inside = _file(str(node.module))
            return _look_up(name, inside) if inside is not None and inside != file else None
    return None


def _find(path: str) -> Found:
    module, _, name = path.rpartition(".")
    file = _file(module)
    if file is None or (found := _look_up(name, file)) is None:
        raise LookupError(f"{path} is not where it was")
    return found


@cache
def _file(module: str) -> Path | None:
    """The file of a module of opcd or lightning, whose packages are not imported; None for any other."""
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first) if first in ("opcd", "lightning") else None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _statements(file: Path) -> list[ast.stmt]:
    """The statements of a file, and the imports of a lazy package (`opcd.runtime.lazy`)."""
    found = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        found += node.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" else [node]
    return found
