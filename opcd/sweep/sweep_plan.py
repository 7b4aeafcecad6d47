"""The file of a sweep, and its arms."""

import hashlib
import itertools
import json
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from opcd.runtime.did_you_mean import or_all
from opcd.runtime.errors import UserError
from opcd.runtime.files.recipe_paths import paths_taken
from opcd.runtime.files.safe_yaml import load_yaml
from opcd.runtime.files.user_files import read_text, require_file

LONGEST_NAME = 120


@dataclass
class Base:
    """Settings that all arms share."""

    config: list[str] = field(default_factory=list)
    """Files for --config of `opcd fit`, in this order."""
    set: dict[str, Any] = field(default_factory=dict)
    """Dotted config key -> value, over the files."""


@dataclass
class SweepFile:
    """A sweep. Each arm is the base, one of `arms` if given, and one value of each axis."""

    base: Base = field(default_factory=Base)
    """Settings that all arms share."""
    axes: dict[str, Any] = field(default_factory=dict)
    """Dotted config key -> list of values. The arms are their product."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> dotted config key -> value. Each is crossed with the axes."""
    slurm: list[str] = field(default_factory=list)
    """Options of srun, for --launcher slurm: --time=4:00:00, --gpus=1, ..."""


@dataclass(frozen=True)
class Arm:
    """One run of a sweep."""

    name: str
    """Unique in the sweep, and the name of its folder."""
    settings: dict[str, Any]
    """Dotted config key -> value, over the base."""


def read_sweep(path: Path) -> SweepFile:
    """Read the YAML file of a sweep.

    Raises:
        UserError: the file is missing, is no YAML, has a key twice, or has no valid sweep.
    """
    sweep: SweepFile = parse_yaml(path, SweepFile, "sweep")
    if not sweep.axes and not sweep.arms:
        raise UserError(f"{path}: neither axes nor arms, so there is nothing to sweep; `opcd fit` runs one config")
    return sweep


def parse_yaml(path: Path, schema: type[Any], what: str) -> Any:
    """Read a dataclass from a YAML file.

    Args:
        path: the file.
        schema: the dataclass.
        what: the argument that names the file, for messages.

    Raises:
        UserError: the file is missing, is no YAML, has a key twice, or does not fit the dataclass.
    """
    text = read_text(require_file(str(path), what), what)
    value = load_yaml(text, str(path), _UniqueKeys)
    value = paths_taken(value, path.absolute().parent, Path.cwd())
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a mapping, not {type(value).__name__}")
    if "search" in value:
        raise UserError(f"{path}: search: opcd no longer searches with Optuna; list the values to try under axes")
    if isinstance(value.get("slurm"), dict):
        raise UserError(
            f"{path}: slurm: opcd runs srun, not submitit; list options of srun: [--time=4:00:00, --gpus=1]"
        )
    known = [own.name for own in fields(schema)]
    for key in value:
        if key not in known:
            raise UserError(f"{path}: no such key {key!r}{or_all(str(key), known)}")
    free = list(_mappings(schema, value, path))
    for holder, key, _ in free:
        holder.pop(key)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(schema, "file")
    try:
        made = parser.instantiate(parser.parse_object({"file": value})).file
    except (ArgumentError, TypeError) as error:
        raise UserError(f"{path}: {str(error).replace('file.', '')}") from error
    for holder, key, mapping in free:
        owner = made if holder is value else getattr(made, next(name for name in value if value[name] is holder))
        setattr(owner, key, mapping)
    return made


def _mappings(schema: type[Any], value: dict[str, Any], path: Path) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yield (holder, key, mapping) for mappings with free keys. jsonargparse would build the classes that they name."""
    for own in fields(schema):
        inner = value.get(own.name)
        if get_origin(own.type) is dict and inner is not None:
            nested = get_origin(get_args(own.type)[1]) is dict
            for part in (inner, *(inner.values() if nested and isinstance(inner, dict) else ())):
                if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
                    raise UserError(f"{path}: {own.name} must be a mapping with texts as keys, not {part!r}")
            yield value, own.name, inner
        elif isinstance(own.type, type) and is_dataclass(own.type) and isinstance(inner, dict):
            yield from _mappings(own.type, inner, path)


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that raises for a repeated key. YAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raise for a key that the mapping already has."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen: set[Any] = set()
        for place, key in enumerate(keys):
            if not isinstance(key, Hashable):
                break  # the loader raises
            if key in seen:
                line = node.value[place][0].start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice, again in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def grid(sweep: SweepFile) -> list[Arm]:
    """Make the arms of a sweep: `arms` x the product of the axes.

    Raises:
        UserError: an axis is no list or is empty, an arm sets an axis, or two arms have one name.
    """
    for key, values in sweep.axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"axes.{key} must be a list of values, not {json.dumps(values)}")
    for name, settings in sweep.arms.items():
        if both := sorted(settings.keys() & sweep.axes.keys()):
            raise UserError(f"arms.{name} sets {both[0]}, which is an axis: remove it from one of the two")
    arms = [
        make_arm(dict(zip(sweep.axes, values, strict=True)), settings, str(name))
        for name, settings in (sweep.arms or {"": {}}).items()
        for values in itertools.product(*sweep.axes.values())
    ]
    seen: dict[str, Arm] = {}
    for arm in arms:
        if other := seen.get(arm.name):
            first, second = json.dumps(other.settings), json.dumps(arm.settings)
            same = "the same value is there twice" if first == second else f"{first} and {second}"
            raise UserError(f"two arms are called {arm.name}: {same}; give them names under `arms`")
        seen[arm.name] = arm
    return arms


def make_arm(values: dict[str, Any], settings: dict[str, Any] | None = None, name: str = "") -> Arm:
    """Make an arm of `settings` and one value of each axis, named by them."""
    titles = short_names(list(values))
    parts = [file_name(name)] if name else []
    parts += [f"{titles[key]}={label(value)}" for key, value in values.items()]
    whole = ",".join(parts)
    if len(whole) > LONGEST_NAME:
        whole = whole[: LONGEST_NAME - 9] + "-" + hashlib.sha256(whole.encode()).hexdigest()[:8]
    return Arm(whole, {**(settings or {}), **values})


def short_names(keys: list[str]) -> dict[str, str]:
    """Dotted keys -> their shortest distinct endings."""
    parts = {key: [part for part in key.split(".") if part != "init_args"] for key in keys}
    names = {}
    for key in keys:
        depth = 1
        while any(parts[other][-depth:] == parts[key][-depth:] for other in keys if other != key):
            depth += 1
        names[key] = file_name(".".join(parts[key][-depth:]))
    return names


def label(value: Any) -> str:
    """A value as a short part of a file name; a class as its name and arguments."""
    if isinstance(value, dict) and "class_path" in value:
        name = str(value["class_path"]).rsplit(".", 1)[-1]
        return "-".join([name, *(f"{key}={label(v)}" for key, v in (value.get("init_args") or {}).items())])
    if isinstance(value, str):
        return file_name(value.rsplit(".", 1)[-1] if re.fullmatch(r"[\w.]+\.[A-Z]\w*", value) else value)
    return file_name(json.dumps(value, separators=("-", "=")))


def file_name(text: str) -> str:
    """A text as a file name: other characters than letters, digits and . _ + = - become _; never empty or hidden."""
    name = re.sub(r"[^\w.+=-]", "_", text).strip("_")
    return re.sub(r"^\.+", "_", name) or "_"


def overrides(settings: dict[str, Any]) -> list[str]:
    """Dotted keys and values as words of the command line."""
    words = []
    for key, value in settings.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words
