"""Mistakes in the words and recipes of `opcd fit` that can be told before torch and Lightning are imported, which takes
seconds.

The words are parsed by jsonargparse, as later, with the options of `opcd.config.signatures`: names, simple values,
files. What stands for a class is not looked into.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from opcd.config import parsing  # noqa: F401  its settings
from opcd.config.signatures import DEFAULTS, OPTIMIZER, default_optimizer, inner_keys, options
from opcd.data.contexts import read_contexts
from opcd.data.example import parse_row
from opcd.data.readers import STAGES, find_file, not_set, read_rows
from opcd.runtime.did_you_mean import beside, key_meant, nearest_key
from opcd.runtime.errors import UserError
from opcd.runtime.files.recipe_paths import ReadRecipe

MAKES = "`opcd init FOLDER` makes a recipe, and `opcd fit --config FOLDER/recipe.yaml` trains with it"
UNKNOWN = re.compile(r"unrecognized arguments: (?P<words>.+)", re.DOTALL)
UNKNOWN_KEY = re.compile(r"^Option '(?P<key>[\w.]+)' is not accepted")
NOT_YAML = "Problems parsing config: "
SMALL = 2**20
"""Bytes of a file whose rows are looked at: a larger one would be read for seconds, twice."""
RECIPES = (".yaml", ".yml", ".json")


def checked(command: str, words: list[str], data: bool = True) -> list[str]:
    """The words of a command of Lightning's in full: short forms of a model's name are written out.

    Args:
        command: fit, validate, test or predict.
        words: what stands after it.
        data: it reads rows, which must be there.

    Raises:
        UserError: a mistake that can be told without the classes that the words name.
    """
    if not words and data:
        raise UserError(f"opcd {command} wants a recipe; {MAKES}")
    try:
        options(command)
    except (LookupError, OSError, StopIteration, SyntaxError):  # another Lightning, or no sources: told later then
        return words
    words = [_student_in_full(word, following) for word, following in _pairs(words)]
    if any(word in ("-h", "--help") or word.partition("=")[0].endswith(".help") for word in words):
        return words
    if single := next((word for word in words if re.match(r"-[a-zA-Z]\w", word)), None):  # else -config is -c onfig
        raise UserError(unknown_words([single], list(options(command))))
    known = [word for word in _outside_of_classes(command, words) if not word.startswith("--print_config")]
    try:
        for file in _recipes(known):
            _check_recipe(command, file)
    except _Unclear:
        return words
    try:
        config = _parser(command).parse_args(known)
    except ArgumentError as error:
        if found := UNKNOWN.search(str(error)):
            raise UserError(unknown_words(found["words"].split(), [*options(command), *inner_keys()])) from error
        raise
    if data and not any(word.startswith("--print_config") or word.partition("=")[0] == "--data" for word in words):
        _check_data(command, config, words)
    return _optimizer_in_full(_teacher_in_full(words, config), config)


def unknown_words(words: list[str], keys: list[str]) -> str:
    """What is wrong with words that no parser knows, and the option that was probably meant."""
    word = next((word for word in words if word.startswith("-")), words[0])
    name, equals, value = word.partition("=")
    if not word.startswith("-"):
        if Path(word).suffix in RECIPES:
            return f"{word}: a recipe is named by an option; did you mean --config {word}?"
        found = nearest_key(name, keys) if equals else None
        hint = f"; did you mean --{found}={value}?" if found else ""
        return f"{word} is a word too many: options begin with --{hint}"
    found = nearest_key(name.lstrip("-"), ["config", *keys])
    return f"no option {name}" + (f"; did you mean --{found}?" if found else "; --help shows all")


@cache
def _parser(command: str) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, print_config=None)
    parser.add_argument("-c", "--config", action=ReadRecipe)
    for option in options(command).values():
        if not option.group:
            # Of Any, jsonargparse would import the class that a value names.
            parser.add_argument(f"--{option.key}", type=None if option.type is Any else option.type)
    return parser


def _student_in_full(word: str, following: str) -> str:
    """--model.student NAME as --model.student.name NAME; a mapping, and a file with one, stay what they are."""
    name, equals, value = word.partition("=")
    value = value if equals else following
    if name != "--model.student" or not _is_name(value):
        return word
    return f"{name}.name{equals}{value}" if equals else f"{name}.name"


def _teacher_in_full(words: list[str], config: Namespace) -> list[str]:
    """--model.teacher.name NAME as the name of the model of the only teacher that has one in `model`."""
    teacher = config["model.teacher"]
    chosen = str(teacher.get("class_path", "") if isinstance(teacher, dict) else teacher or "")
    if chosen.rpartition(".")[2] not in ("", DEFAULTS["model.teacher"].rpartition(".")[2]):
        return words
    fields = [key.rpartition(".")[2] for key in options() if key.startswith("model.student.")]
    short = rf"--model\.teacher\.(init_args\.)?(model(?!\.)|{'|'.join(fields)})(?=$|[.=])"
    return [_in_full(word, following, short) for word, following in _pairs(words)]


def _optimizer_in_full(words: list[str], config: Namespace) -> list[str]:
    """--model.optimizer.lr X where no optimizer is named: the default's other arguments stay."""
    inside = [word for word in words if word.startswith(f"--{OPTIMIZER}.")]
    if not inside or config[OPTIMIZER] is not None or any("class_path" in word for word in inside):
        return words
    default = default_optimizer()
    arguments = [f"--{OPTIMIZER}.init_args.{name}={json.dumps(value)}" for name, value in default["init_args"].items()]
    return [f"--{OPTIMIZER}={default['class_path']}", *arguments, *words]


def _in_full(word: str, following: str, short: str) -> str:
    found = re.match(short, word)
    _, equals, value = word.partition("=")
    if found is None or (found[2] == "model" and not _is_name(value if equals else following)):
        return word
    field = "name" if found[2] == "model" else found[2]
    return f"--model.teacher.init_args.model.{field}{word[found.end() :]}"


def _is_name(value: str) -> bool:
    """Whether a value is a model's name, and no mapping, file of one, or null."""
    return not (value.lstrip().startswith("{") or Path(value).suffix in RECIPES or value in ("", "null"))


def _outside_of_classes(command: str, words: list[str]) -> Iterator[str]:
    """The words less the options inside of what stands for a class, and their values."""
    known, skip = options(command), False
    for place, word in enumerate(words):
        if skip:
            skip = False
            continue
        name, equals, _ = word.partition("=")
        key = name.removeprefix("--")
        above = next((key[:end] for end in _ends(key.removesuffix("+")) if key[:end] in known), None)
        inside = above is not None and known[above].type is Any and (key != above or known[above].group)
        if name.startswith("--") and inside and (key == above or not known[str(above)].group):
            skip = not equals and place + 1 < len(words) and not words[place + 1].startswith("--")
            continue
        yield word


def _ends(key: str) -> list[int]:
    """Where a dotted key may be cut, the longest first."""
    return [len(key), *(place for place in range(len(key) - 1, 0, -1) if key[place] == ".")]


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    """Each word with the next one; "" after the last."""
    return zip(words, [*words, ""][1:], strict=True)


class _Unclear(Exception):
    """A recipe names a class where its own signature would do: nothing is known of its arguments."""


def _recipes(words: list[str]) -> Iterator[str]:
    """The files after --config; not a mapping that stands there itself."""
    for word, following in _pairs(words):
        name, equals, value = word.partition("=")
        if name in ("-c", "--config"):
            value = value if equals else following
            if value and not value.lstrip().startswith("{") and "\n" not in value:
                yield value


def _check_recipe(command: str, file: str) -> None:
    """Refuse a recipe that is not there, is no YAML, or has keys that there are not."""
    path = Path(file).expanduser()
    if not path.is_file():
        what = "is a folder; name a file in it" if path.is_dir() else f"is not there{beside(path)}"
        raise UserError(f"--config: {path.absolute()} {what}")
    try:
        config = _parser(command).parse_args([f"--config={file}"])
    except ArgumentError as error:
        message = str(error)
        if message.startswith(NOT_YAML):
            raise UserError(f"{file}: not valid YAML: {message.removeprefix(NOT_YAML)}") from error
        if message.startswith("Unexpected config"):
            raise UserError(f"{file}: wants keys with values, such as model: and data:; {MAKES}") from error
        if found := UNKNOWN_KEY.match(message):
            above = re.split(r"\.(?:class_path|init_args|dict_kwargs)(?:\.|$)", found["key"])[0]
            if above != found["key"] and above in options(command):
                raise _Unclear from error
            meant = key_meant(found["key"], [*options(command), *inner_keys()])
            raise UserError(f"{file}: no key {found['key']}{meant}") from error
        raise UserError(f"{file}: {message}") from error
    for option in options(command).values():
        if option.group and isinstance(value := config.get(option.key), str):
            raise UserError(
                f"{file}: {option.key} wants keys with values; did you mean {option.key}: {{name: {value}}}?"
            )


def _check_data(command: str, config: Namespace, words: list[str]) -> None:
    """Refuse files of rows and contexts that are not set or not there; of small ones, rows that are wrong."""
    for split in STAGES[command]:
        key = f"data.{split}"
        source = config[key]
        if source is None and split == STAGES[command][0] and not any(word.startswith(f"--{key}.") for word in words):
            raise UserError(not_set(command))
        file = find_file(source, key) if isinstance(source, str) else None
        if file is not None and file.stat().st_size < SMALL and config["data.on_bad_row"] != "skip":
            for where, row in read_rows(source, key):
                parse_row(row, where, 0)
    if config["data.context"] is not None:
        read_contexts(config["data.context"])
