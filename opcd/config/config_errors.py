"""One line for jsonargparse's messages: the key, the mistake, and the name that was probably meant.

For a value of several possible types jsonargparse lists a reason for each. The first one that says more than "another
type" is kept, an option of another class last. `--debug` shows the complete message. An unknown wording stays as it is.
"""

import importlib
import inspect
import re
from collections.abc import Iterator

from opcd.runtime.did_you_mean import GONE, or_all

KEY = re.compile(r'Parser key "([^"]+)":')
OWNER = re.compile(r"class_path[ =]'([\w.]+)'")
FRAME = re.compile(
    r"Expected a path but |Does not validate |Errors:|Given value type"
    r"|Subclass types expect|a class path|a dict with"
)
"""Beginnings of lines that only introduce the next ones."""
ANY_OF = "Does not validate against any of the Union subtypes"
OTHER_TYPE = re.compile(r"Expected a (?!dot import )(?!.*Got value)|Import path .*does not|Not a valid subclass")
NO_CLASS, GIVEN, SUBTYPES = "Expected a dot import path string: ", "Given value: ", "Subtypes: "
OTHER_CLASS = re.compile(r"Option '[\w.]+' is not accepted|.* got an unexpected keyword argument")
OPTION = re.compile(r"Option '([\w.]+)' is not accepted")
BASE = re.compile(r"\b((?:opcd|lightning|torch\.optim)[\w.]*)\.(\w+)")
"""A class whose subclasses are listed; those of torch.Tensor are no help."""
OPTIMIZERS = "torch.optim.Optimizer"


def in_plain_words(message: str) -> str:
    """The message, in one line if it is about a key of a config."""
    before, about_a_key, _ = message.partition('Parser key "')
    if not about_a_key and ANY_OF in message:  # an argument of a class, when that is made
        before, about_a_key, _ = message.partition(ANY_OF)
    keys: list[str] = []
    others: list[str] = []
    unknown = ""
    owner = subtypes = given = ""
    for line in message.splitlines() if about_a_key else ():
        line = re.sub(r"^Type typing\.Callable.* callable class: ", "", line.strip(" -"))
        if FRAME.match(line):
            continue
        keys += KEY.findall(line)
        owner = found[1] if (found := OWNER.search(line)) else owner
        if line.startswith(SUBTYPES):
            subtypes = line
        elif line.startswith(GIVEN):
            given = line.removeprefix(GIVEN).partition(". Got value: ")[0]
        elif OTHER_TYPE.match(line) or (line.startswith(NO_CLASS) and subtypes and not BASE.search(subtypes)):
            others.append(line)
        elif OTHER_CLASS.match(line):
            unknown = unknown or before + _where(keys) + _reason(line, owner, subtypes or OPTIMIZERS)
        elif line and not KEY.search(line) and not line.startswith("Problem with given"):
            return before + _where(keys) + _reason(line, owner, subtypes or OPTIMIZERS)
    if unknown:
        return unknown
    return f"{before}{_where(keys)}{'; '.join(dict.fromkeys(others))}. Got value: {given}" if others else message


def _where(keys: list[str]) -> str:
    return f"{'.'.join(keys)}: " if keys else ""


def _reason(line: str, owner: str, bases: str) -> str:
    """A line of jsonargparse, with the known names."""
    if found := OPTION.search(line):
        known = [name for name in inspect.signature(_imported(*owner.rsplit(".", 1))).parameters if name != "self"]
        return f"{owner} has no option {found[1]}{or_all(found[1], known)}"
    if line.startswith(NO_CLASS):
        name = line.removeprefix(NO_CLASS)
        known = sorted({cls.__name__ for base in BASE.findall(bases) for cls in concrete(_imported(*base))})
        return f"no class {name}{or_all(name, known)}; a class of your own needs its module: my_file.{name}"
    value = line.rpartition("Got value: ")[2]
    return f"{line} ({GONE[value]})" if value in GONE else line


def _imported(module: str, name: str) -> type:
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def concrete(cls: type) -> Iterator[type]:
    """A class and its subclasses, without abstract and private ones."""
    if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
        yield cls
    below: list[type] = type.__subclasses__(cls)
    for subclass in below:
        yield from concrete(subclass)
