"""Early checks of the words and recipes of `opcd fit`, before the seconds that torch and Lightning take to import.

The checks compare names of options and keys with `opcd.config.signatures`, and look for files. The full parser checks
values, and the inside of classes.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from opcd.config.signatures import DEFAULTS, OPTIMIZER, default_optimizer, inner_keys, options
from opcd.data.contexts import read_contexts
from opcd.data.example import parse_row
from opcd.data.readers import STAGES, find_file, not_set, read_rows
from opcd.runtime.did_you_mean import beside, key_meant, nearest_key
from opcd.runtime.errors import UserError
from opcd.runtime.files.recipe_paths import paths_taken
from opcd.runtime.files.safe_yaml import load_yaml
from opcd.runtime.files.user_files import read_text

MAKES = "`opcd init FOLDER` makes a recipe, and `opcd fit --config FOLDER/recipe.yaml` trains with it"
SMALL = 2**20
"""Largest file, in bytes, whose rows are checked: a larger one would be read for seconds, twice."""
RECIPES = (".yaml", ".yml", ".json")


def checked(command: str, words: list[str], data: bool = True) -> list[str]:
    """Check the words of one of Lightning's commands, and return them with short forms written out.

    Args:
        command: fit, validate, test or predict.
        words: the words after the command.
        data: whether the command reads rows, which must exist.

    Raises:
        UserError: a mistake that is found without the classes that the words name.
    """
    if not words and data:
        raise UserError(f"opcd {command} needs a recipe; {MAKES}")
    try:
        options(command)
    except (LookupError, OSError, StopIteration, SyntaxError):  # another Lightning, or no sources: no early checks
        return words
    words = _in_full(words, r"--model\.student(?=$|=)()", "--model.student")
    if any(word in ("-h", "--help") or word.partition("=")[0].endswith(".help") for word in words):
        return words
    if single := next((word for word in words if re.match(r"-[a-zA-Z]\w", word)), None):
        raise UserError(unknown_words([single], list(options(command))))
    config = _settings(command, words)
    _check_same_subject(words, config)
    if data and not any(word.startswith("--print_config") or word.partition("=")[0] == "--data" for word in words):
        _check_data(command, config, words)
    return _optimizer_in_full(_teacher_in_full(words, config), config)


def unknown_words(words: list[str], keys: list[str]) -> str:
    """The message about unknown words, with the option that was probably meant."""
    word = next((word for word in words if word.startswith("-")), words[0])
    name, equals, value = word.partition("=")
    if not word.startswith("-"):
        if Path(word).suffix in RECIPES:
            return f"{word}: a recipe comes after an option; did you mean --config {word}?"
        found = nearest_key(name, keys) if equals else None
        hint = f"; did you mean --{found}={value}?" if found else ""
        return f"{word} is a word too many: options begin with --{hint}"
    found = nearest_key(name.lstrip("-"), ["config", *keys])
    return f"no option {name}" + (f"; did you mean --{found}?" if found else "; --help shows all")


def _in_full(words: list[str], short: str, model: str) -> list[str]:
    """Write out short forms of the options of a model.

    Args:
        words: the words.
        short: a pattern for the beginning of a short form. Group 1 is the option's field; an empty one stands for the
            name, unless the value is a mapping, a file with one, or null.
        model: the beginning in full.
    """
    full = []
    for word, following in _pairs(words):
        _, equals, value = word.partition("=")
        value = value if equals else following
        is_name = not (value.lstrip().startswith("{") or Path(value).suffix in RECIPES or value in ("", "null"))
        if (found := re.match(short, word)) and (found[1] or is_name):
            word = f"{model}.{found[1] or 'name'}{word[found.end() :]}"
        full.append(word)
    return full


def _teacher_in_full(words: list[str], config: dict[str, Any]) -> list[str]:
    """Write out --model.teacher.name NAME and the like, if the teacher is the one that has a `model`."""
    teacher = config.get("model.teacher")
    chosen = str(teacher.get("class_path", "") if isinstance(teacher, dict) else teacher or "")
    if chosen.rpartition(".")[2] not in ("", DEFAULTS["model.teacher"].rpartition(".")[2]):
        return words
    fields = "|".join(key.rpartition(".")[2] for key in options() if key.startswith("model.student."))
    short = rf"--model\.teacher\.(?:init_args\.)?(?:model(?!\.)|({fields}))(?=$|[.=])"
    return _in_full(words, short, "--model.teacher.init_args.model")


def _optimizer_in_full(words: list[str], config: dict[str, Any]) -> list[str]:
    """Write out the default optimizer before --model.optimizer.lr X, so that its other arguments stay."""
    inside = [word for word in words if word.startswith(f"--{OPTIMIZER}.")]
    if not inside or config.get(OPTIMIZER) is not None or any("class_path" in word for word in inside):
        return words
    default = default_optimizer()
    arguments = [f"--{OPTIMIZER}.init_args.{name}={json.dumps(value)}" for name, value in default["init_args"].items()]
    return [f"--{OPTIMIZER}={default['class_path']}", *arguments, *words]


def _settings(command: str, words: list[str]) -> dict[str, Any]:
    """Dotted keys and values of recipes and options, in order, as far as they lie outside of classes."""
    known = options(command)
    settings: dict[str, Any] = {}
    pairs = _pairs(words)
    for word, following in pairs:
        name, equals, value = word.partition("=")
        if name == "--print_config":
            continue
        if not equals and following and not following.startswith("--"):
            value = following
            next(pairs)
        key = name.removeprefix("--")
        parts = key.removesuffix("+").split(".")
        above = next((k for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in known), None)
        if name in ("-c", "--config"):
            if not value:
                raise UserError("--config: expected one argument")
            settings |= _recipe(command, value)
        elif not name.startswith("--") or above is None or (known[above] and key != above):
            raise UserError(unknown_words([word], [*known, *inner_keys()]))
        elif key == above:
            loaded: Any = value
            with suppress(UserError):  # no YAML, such as a name of a file: the full parser has a message
                loaded = load_yaml(value, name)
            settings[key] = loaded if loaded is None or isinstance(loaded, dict | list) else value
    return settings


def _recipe(command: str, file: str) -> dict[str, Any]:
    """Dotted keys and values of a recipe. UserError if it does not exist, is no YAML, or has unknown keys."""
    path = Path(file).expanduser()
    if file.lstrip().startswith("{") or "\n" in file:  # a mapping in place of a file
        config, file = load_yaml(file, "--config"), "--config"
    elif path.is_file():
        config = paths_taken(load_yaml(read_text(path, "--config"), file), path.absolute().parent, Path.cwd())
    else:
        what = "is a folder; name a file in it" if path.is_dir() else f"does not exist{beside(path)}"
        raise UserError(f"--config: {path.absolute()} {what}")
    if not isinstance(config, dict):
        raise UserError(f"{file}: needs keys with values, such as model: and data:; {MAKES}")
    return _flat(command, file, config)


def _flat(command: str, file: str, config: dict[str, Any], above: str = "") -> dict[str, Any]:
    known = options(command)
    settings: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{above}{name}"
        if key not in known:
            while isinstance(value, dict) and value:
                inner, value = next(iter(value.items()))
                key += f".{inner}"
            raise UserError(f"{file}: no key {key}{key_meant(key, [*known, *inner_keys()])}")
        if known[key] and isinstance(value, str):
            raise UserError(f"{file}: {key} needs keys with values; did you mean {key}: {{name: {value}}}?")
        if known[key] and isinstance(value, dict) and "class_path" not in value:
            settings |= _flat(command, file, value, f"{key}.")
        else:
            settings[key] = value
    return settings


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    """Each word with the next one; "" after the last."""
    return zip(words, [*words, ""][1:], strict=True)


def _check_same_subject(words: list[str], config: dict[str, Any]) -> None:
    """Raise UserError if a word replaces the context of a recipe, whose rows ask about its own.

    Rows ask about a context where their files are called alike: quickstart_train.jsonl and quickstart_context.txt.
    """
    given = {word.partition("=")[0] for word, _ in _pairs(words)}
    if "--data.context" not in given or "--data.train" in given:
        return
    rows = Path(str(config.get("data.train")))
    own = rows.with_name(rows.name.replace("_train", "_context")).with_suffix(".txt")
    if "_train" in rows.name and own.is_file() and not _is_same(own, config.get("data.context")):
        raise UserError(
            f"--data.context: data.train, {rows.name}, asks about {own.name}, and not about yours; `opcd queries "
            f"--context {config['data.context']} --out FOLDER` writes questions about it, for --data.train "
            "FOLDER/train.jsonl and --data.val FOLDER/val.jsonl"
        )


def _is_same(own: Path, context: Any) -> bool:
    return not isinstance(context, str) or Path(context).expanduser().resolve() == own.resolve()


def _check_data(command: str, config: dict[str, Any], words: list[str]) -> None:
    """Raise UserError for missing files of rows and contexts, and for wrong rows in small files."""
    for split in [*STAGES[command], *(["anchors.source"] if command == "fit" else [])]:
        key = f"data.{split}"
        source = config.get(key)
        if source is None and split == STAGES[command][0] and not any(word.startswith(f"--{key}.") for word in words):
            raise UserError(not_set(command))
        if not isinstance(source, str):
            continue
        file = find_file(source, key)
        if file is not None and file.stat().st_size < SMALL and config.get("data.on_bad_row") != "skip":
            for where, row in read_rows(source, key):
                parse_row(row, where, 0)
    if isinstance(config.get("data.context"), str):
        read_contexts(config["data.context"])
