"""The options of `opcd fit`, read from the source text of the classes that have them: nothing of torch is imported.

A signature is the one place where an option stands. Lightning's parser reads it from the imported class, this module
from its file, to tell a mistake before the imports, which take seconds.
"""

import ast
import builtins
import importlib.util
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CLASSES = {
    "trainer": "lightning.pytorch.trainer.trainer.Trainer",
    "model": "opcd.modules.distiller.Distiller",
    "data": "opcd.data.datamodule.ContextQueryDataModule",
}
"""What `opcd fit` makes of each part of a config."""
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


@dataclass(frozen=True)
class Option:
    """A key of a config.

    Attributes:
        key: dotted.
        type: what a value must be; Any where a class or something that is not read here may stand.
        group: its value is a dataclass, whose fields are options of their own.
    """

    key: str
    type: Any
    group: bool = False


@cache
def options(command: str = "fit") -> dict[str, Option]:
    """All keys of a command of Lightning's, in the order of the signatures."""
    found = [Option("seed_everything", bool | int)]
    for name, path in CLASSES.items():
        found += [Option(name, Any, group=True), *_of_class(_find(path), name)]
    method = _method(_find(CLASSES["trainer"]), command)
    found += [Option(arg.arg, Any) for arg, _ in _arguments(method) if _is_option(arg.arg)]
    return {option.key: option for option in found if not option.key.startswith(LINKED)}


@cache
def inner_keys() -> list[str]:
    """Keys inside of classes that stand where a config names none, such as model.optimizer.lr."""
    found = []
    for key, path in DEFAULTS.items():
        found += [option.key for option in _of_class(_find(path), key)]
    return [*found, *(f"{OPTIMIZER}.{name}" for name in default_optimizer()["init_args"])]


@cache
def default_optimizer() -> dict[str, Any]:
    """What a config would say for the function that is the default of model.optimizer: class_path and init_args.

    It is no default of the parser's: jsonargparse would carry the arguments over to an optimizer of another class.
    """
    distiller = _find(CLASSES["model"])
    defaults = {arg.arg: default for arg, default in _arguments(_method(distiller, "__init__"))}
    found = _look_up(ast.unparse(defaults["optimizer"] or ast.Constant(None)), distiller.file)
    if found is None or not isinstance(found[1], ast.FunctionDef):
        raise LookupError(f"the default of {OPTIMIZER} is no function")
    (made,) = (node.value for node in found[1].body if isinstance(node, ast.Return))
    if not isinstance(made, ast.Call):
        raise LookupError(f"the default of {OPTIMIZER} returns no call")
    arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in made.keywords}
    return {"class_path": ast.unparse(made.func), "init_args": arguments}


@dataclass(frozen=True)
class _Source:
    """A class in a file."""

    file: Path
    node: ast.ClassDef


def _is_option(name: str) -> bool:
    return name not in NOT_OPTIONS and not name.endswith("dataloaders")


def _of_class(source: _Source, above: str) -> Iterator[Option]:
    """The options of a class: the arguments of `__init__`, of a dataclass its fields."""
    if _is_dataclass(source.node):
        fields = [node for node in source.node.body if isinstance(node, ast.AnnAssign)]
        arguments = [(node.target.id, node.annotation) for node in fields if isinstance(node.target, ast.Name)]
    else:
        given = [arg for arg, _ in _arguments(_method(source, "__init__"))]
        arguments = [(arg.arg, arg.annotation) for arg in given if arg.arg != "self" and arg.annotation]
    for name, annotation in arguments:
        key = f"{above}.{name}"
        inner = _dataclass_of(annotation, source.file)
        yield Option(key, _simple(annotation, source.file), group=inner is not None)
        if inner is not None:
            yield from _of_class(inner, key)


def _method(source: _Source, name: str) -> ast.FunctionDef:
    return next(node for node in source.node.body if isinstance(node, ast.FunctionDef) and node.name == name)


def _arguments(method: ast.FunctionDef) -> list[tuple[ast.arg, ast.expr | None]]:
    """Each argument with its default."""
    args = method.args
    without: list[None] = [None] * (len(args.args) - len(args.defaults))
    return [
        *zip(args.args, [*without, *args.defaults], strict=True),
        *zip(args.kwonlyargs, args.kw_defaults, strict=True),
    ]


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _dataclass_of(annotation: ast.expr, file: Path) -> _Source | None:
    """The dataclass that an annotation names, alone or with None."""
    if isinstance(annotation, ast.BinOp) and ast.unparse(annotation.right) == "None":
        annotation = annotation.left
    if not isinstance(annotation, ast.Name):
        return None
    found = _look_up(annotation.id, file)
    return _Source(*found) if found and isinstance(found[1], ast.ClassDef) and _is_dataclass(found[1]) else None  # type: ignore[arg-type]


def _simple(annotation: ast.expr, file: Path) -> Any:
    """The type, where it is made of int, str, bool, float, None and literals alone; else Any."""
    names: dict[str, Any] = {"Literal": typing.Literal, "Optional": typing.Optional, "Union": typing.Union}
    names |= {name: getattr(builtins, name) for name in ("int", "str", "bool", "float")}
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name) and node.id not in names:
            found = _look_up(node.id, file)
            if found is None or not isinstance(found[1], ast.Assign):
                return Any
            names[node.id] = _simple(found[1].value, found[0])
            if names[node.id] is Any:
                return Any
    if any(isinstance(node, ast.Attribute | ast.Call) for node in ast.walk(annotation)):
        return Any
    return eval(compile(ast.Expression(annotation), str(file), "eval"), {"__builtins__": {}}, names)


def _look_up(name: str, file: Path) -> tuple[Path, ast.stmt] | None:
    """Where a name of a file is defined, there or in the file that it is imported from; None where that is nowhere."""
    for node in _statements(_parsed(file)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return file, node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return file, node
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            inside = _file(str(node.module))
            return _look_up(name, inside) if inside is not None and inside != file else None
    return None


def _statements(module: ast.Module) -> Iterator[ast.stmt]:
    """Those of a file, and the imports of a lazy package (`opcd.runtime.lazy`)."""
    for node in module.body:
        yield from node.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" else [node]


def _find(path: str) -> _Source:
    module, _, name = path.rpartition(".")
    file = _file(module)
    found = _look_up(name, file) if file else None
    if found is None or not isinstance(found[1], ast.ClassDef):
        raise LookupError(f"{path} is not where it was")
    return _Source(found[0], found[1])


def _file(module: str) -> Path | None:
    """The file of a module of opcd or lightning; None for any other. Packages above it are not imported."""
    first, *rest = module.split(".")
    spec = importlib.util.find_spec(first) if first in ("opcd", "lightning") else None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
