"""Write docs/keys.md: every key of a recipe, with its values, its default and its help, from the parser of `opcd fit`.

python docs/make_keys.py
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import opcd  # before torch: it sets how threads wait

# isort: split
from docstring_parser import parse_from_object
from jsonargparse import Namespace

import opcd.callbacks
import opcd.data
import opcd.games
import opcd.losses
import opcd.modules
from opcd.cli.fit import DEFAULT_OPTIMIZER, fit_parser
from opcd.losses import Divergence, Loss
from opcd.modules import Cartridge, Lora, Rollout, Sampling, Teacher

LINKED = ("data.student", "data.teacher")
"""The command line sets them from those of `model`."""
PAGE = Path(__file__).with_name("keys.md")
INTRO = """# Config keys

Every key of `model` and `data` in a recipe, from the parser of `opcd fit`. Keys of `trainer` are those of
[Lightning's Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html). A class is named by its
`class_path` (the last name is enough for classes of opcd); its arguments stand under `init_args`. This page is written
by `python docs/make_keys.py`.
"""
CLASSES = {
    "model.loss": (opcd.losses, Loss),
    "model.teacher": (opcd.modules, Teacher),
    "model.rollout": (opcd.modules, Rollout),
}
OTHERS = {
    "model.adapter": (Lora, Cartridge),
    "sampling of a rollout, model.eval_sampling": (Sampling,),
    "model.rollout, for games": (opcd.games.GameRollout,),
    "data.train, data.val, data.test, data.predict": (opcd.data.DataSets, opcd.games.GameSeeds),
    "data.anchors": (opcd.data.Anchors,),
}
HOW = "`--trainer.callbacks+ NAME --trainer.callbacks.KEY VALUE`, or a list in the recipe."
CALLBACKS = ("Alarms", "AnswerSamples", "ExportStudent", "LMEval", "RecoveryAndDrift", "SaveCheckpoints")


def cell(text: object) -> str:
    """A text as a cell of a table."""
    return re.sub(r"\s+", " ", str(text)).strip().replace("|", "\\|")


def table(rows: list[tuple[str, str, str]]) -> str:
    """A table of keys."""
    return "\n".join(["| key | default | |", "|---|---|---|", *(f"| `{a}` | {b} | {c} |" for a, b, c in rows), ""])


def default_of(value: Any) -> str:
    """A default as a recipe has it."""
    if isinstance(value, Namespace):
        value = str(value.class_path).rpartition(".")[2]
    if str(value) == DEFAULT_OPTIMIZER:
        return "AdamW"
    if value is inspect.Parameter.empty or value is dataclasses.MISSING:
        return "required"
    if callable(value) and hasattr(value, "__name__"):
        return f"`{value.__name__}`"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    if isinstance(value, float | int | str | list | dict | tuple):
        return f"`{cell(list(value) if isinstance(value, tuple) else value)}`" if value != "" else "`''`"
    return f"`{type(value).__name__}`"


def plain(text: str | None) -> str:
    """Help without the marks of restructured text."""
    return cell((text or "").replace("``", "`"))


def keys(section: str) -> list[tuple[str, str, str]]:
    """The keys of a section, in the parser's order."""
    found = []
    for action in fit_parser(described=True)._actions:
        name = action.dest
        hidden = name.endswith(".help") or name in LINKED or str(action.default) == "==SUPPRESS=="
        if hidden or not name.startswith(f"{section}."):
            continue
        choices = re.findall(r"Literal\[(.*?)\]", str(getattr(action, "_typehint", "")))
        values = f" One of {choices[0].replace(chr(39), '`')}." if choices else ""
        found.append((name, default_of(action.default), plain(action.help) + values))
    return found


def arguments(kind: type) -> list[tuple[str, str, str]]:
    """The arguments of a class."""
    known = {}
    for base in reversed(kind.__mro__[:-1]):
        known |= {param.arg_name: param.description for param in parse_from_object(base).params}
    signature = inspect.signature(kind)
    rows = []
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = parameter.default
        for item in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            if item.name == name and item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
        rows.append((name, default_of(default), plain(known.get(name))))
    return rows


def described(kind: type) -> str:
    """A class: its first sentence and its arguments."""
    first = plain((inspect.getdoc(kind) or "").split("\n\n")[0])
    rows = arguments(kind)
    return f"### {kind.__name__}\n\n{first}\n" + (f"\n{table(rows)}" if rows else "")


def offered(package: Any, base: type) -> Iterator[type]:
    """The classes of a package that can be used as they are."""
    for kind in (getattr(package, name) for name in package.__all__):
        usable = isinstance(kind, type) and issubclass(kind, base) and not inspect.isabstract(kind)
        if usable and kind not in (base, Divergence):
            yield kind


def page() -> str:
    """The whole page."""
    parts = [INTRO, *(f"## {section}\n\n{table(keys(section))}" for section in ("model", "data"))]
    classes = {key: tuple(offered(package, base)) for key, (package, base) in CLASSES.items()} | OTHERS
    for key, kinds in classes.items():
        parts += [f"## Classes for {key}\n", *map(described, kinds)]
    parts.append(f"## Callbacks\n\n{HOW}\n")
    parts += [described(getattr(opcd.callbacks, name)) for name in CALLBACKS]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
