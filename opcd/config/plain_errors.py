"""What jsonargparse refuses, in the words of somebody who writes a config.

Of a value that may be text or one of several classes, jsonargparse tells for each why it is not, and names no choices.
Here that becomes one line: the key, what is wrong, and what there is instead.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from itertools import chain

from opcd.runtime.did_you_mean import did_you_mean
from opcd.runtime.extras import install_hint

KEY = re.compile(r'^(?P<before>.*?)Parser key "(?P<key>[^"]+)":')
OPTION = re.compile(r"given class_path '(?P<path>[\w.]+)':\s+Option '(?P<option>[\w.]+)' is not accepted")
NO_CLASS = re.compile(r"Expected a dot import path string: (?P<name>\w+)")
NO_MODULE = re.compile(r"given class_path '(?P<path>[\w.]+)':\s+No module named '(?P<module>[\w.]+)'")
NO_MODULE_OF_A_FUNCTION = re.compile(r"No module named '(?P<module>[\w.]+)'. Got value: (?P<path>[\w.]+)")
NO_ATTRIBUTE = re.compile(r"given class_path '[\w.]+':\s+module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'")
NO_SUBCLASS = re.compile(r"Import path (\S+ )?does not correspond to a subclass of (?P<base>\w+)")
GIVEN = re.compile(r"Given value: (?P<path>[\w.]+)$")
SUBTYPES = re.compile(r"Subtypes: \[(?P<types>.*)\]")
ALTERNATIVES = re.compile(
    r"Does not validate against any of the Union subtypes\n\s*Subtypes: .*\n\s*Errors:\n(?P<errors>(.*\n)*?)"
    r"\s*Given value type: .*\n\s*Given value: .*"
)
OTHER_KIND = re.compile(r"\s*- Expected a .*\n")
OTHER_CLASS = re.compile(
    r"\n\s*- (Import path \S+ does not correspond to a subclass of \w+"
    r"|Not a valid subclass of \w+.*\n\s*Subclass types expect one of:(\n\s*- a .*){4})"
)
LIBRARIES = ("torch.optim", "torch.optim.lr_scheduler", "opcd.callbacks", "lightning.pytorch.callbacks")
"""Where a class may lie whose key does not name what it must be."""
EXTRAS = {"bitsandbytes": "bitsandbytes"}
"""Modules that configs name, and the extra that brings them."""


def in_plain_words(message: str) -> str:
    """The message; in one line where it is about a class, an option of one, or a module that is not found."""
    key = KEY.match(message)
    where = f"{key['before']}{key['key']}: " if key else ""
    if found := OPTION.search(message):
        return f"{where}{found['path']} has no option {found['option']}{_options(found['path'], found['option'])}"
    if found := NO_MODULE.search(message) or NO_MODULE_OF_A_FUNCTION.search(message):
        return f"{where}{found['path']}: no module {found['module']}; {_source(found['module'])}"
    if found := NO_ATTRIBUTE.search(message):
        known = vars(importlib.import_module(found["module"]))
        return f"{where}{found['module']} has no {found['name']}{did_you_mean(found['name'], known)}"
    if (found := GIVEN.search(message)) and (bases := [part["base"] for part in NO_SUBCLASS.finditer(message)]):
        return f"{where}{found['path']} is no {' or '.join(bases)}"
    if found := NO_CLASS.search(message):
        return f"{where}no class {found['name']}{_classes(found['name'], message)}"
    message = ALTERNATIVES.sub(lambda union: OTHER_KIND.sub("", union["errors"]).strip(" -\n") or union[0], message)
    return OTHER_CLASS.sub("", message)


def _source(module: str) -> str:
    """Where a module would come from."""
    if module in EXTRAS:
        return install_hint(EXTRAS[module])
    return "a file of yours is found in the folder that opcd is started in, and in those of PYTHONPATH"


def _options(path: str, wrong: str) -> str:
    module, name = path.rsplit(".", 1)
    taken = [p for p in inspect.signature(getattr(importlib.import_module(module), name)).parameters if p != "self"]
    return f"{did_you_mean(wrong, taken)}; it has {', '.join(taken)}" if taken else "; it has none"


def _classes(wrong: str, message: str) -> str:
    """What may stand there, where the message tells the base class; else the name that is nearest."""
    union = SUBTYPES.search(message)
    bases = [_imported(path) for path in re.findall(r"<class '(\w+\.[\w.]+)'>", union["types"])] if union else []
    names = sorted({cls.__name__ for cls in chain.from_iterable(map(concrete, bases))})
    known = names or list(chain.from_iterable(vars(importlib.import_module(library)) for library in LIBRARIES))
    choices = f"; there are {', '.join(names)}" if names else ""
    return f"{did_you_mean(wrong, known)}{choices}; one of your own is named with its module, such as my_file.{wrong}"


def _imported(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def concrete(cls: type) -> Iterator[type]:
    """The class and all below it that can be made and have a name for others."""
    if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
        yield cls
    below: list[type] = type.__subclasses__(cls)
    for subclass in below:
        yield from concrete(subclass)
