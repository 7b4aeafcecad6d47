"""`opcd init`: write a folder with a commented recipe, a context and questions, which trains as it is.

opcd init my_first
opcd init my_manual --context manual.pdf
"""

import argparse
import math
import re
import shlex
from pathlib import Path

from opcd.config.parsing import Parser
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import write_atomic

STARTER = Path(__file__).parent / "starter"
FIT = "opcd fit --config recipe.yaml"
LOOK = (
    "opcd chat smollm2-135m --context context.txt    # does the model follow the context? else choose another teacher"
)
CHAT_ALONE = "opcd chat runs/version_0"
RECIPE, CONTEXT, JOURNAL = "recipe.yaml", "context.txt", "asked.jsonl"
CHAT = "opcd chat runs/version_0 --context context.txt"
STEPS, BATCH_SIZE = 36, 8
"""Of the recipe for facts."""
PASSES = 6


def main(args: list[str]) -> int:
    """Write the files. Returns 0.

    Raises:
        UserError: the folder is not empty, or cannot be made.
    """
    if "--context" in args:  # the other words are those of `opcd queries`
        options, rest = make_parser().parse_known_args(args)
    else:
        options, rest = make_parser().parse_args(args), []
    folder: Path = options.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"FOLDER: cannot make {folder.resolve()}: {error.strerror}; name a new folder") from error
    going_on = options.context and (folder / JOURNAL).exists() and not (folder / RECIPE).exists()
    there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))  # such as .git
    if there and not going_on:
        names = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
        raise UserError(f"FOLDER: {folder.resolve()} is not empty (it holds {names}); name a new or empty folder")
    if options.context:
        _write_with_questions(folder, options, rest)
    else:
        for file in sorted((STARTER / (options.kind or "facts")).iterdir()):
            write_atomic(folder / file.name, file.read_text(encoding="utf-8"))
            print(f"wrote {folder / file.name}")
    one = (folder / CONTEXT).is_file()
    steps = [f"cd {shlex.quote(str(folder))}"] * (folder != Path()) + [LOOK] * one + [FIT, CHAT if one else CHAT_ALONE]
    print("next:", *steps, sep="\n    ")
    return 0


def _write_with_questions(folder: Path, options: argparse.Namespace, rest: list[str]) -> None:
    """Write questions about a context of the user's, and the recipe of its kind."""
    from opcd.cli import queries  # with torch, which the other kinds of folder do without

    words = ["--context", *options.context, "--out", str(folder), "--kind", options.kind or "auto", *rest]
    made = queries.make(queries.make_parser().parse_args(words))
    queries.print_counts(made)
    recipe = (STARTER / made.report["kind"] / RECIPE).read_text(encoding="utf-8")
    if not (folder / CONTEXT).is_file():
        recipe = _without(recipe, "context", "every row has its own part of the context")
    if not made.val:
        recipe = _without(recipe, "val", "no questions were held out")
    if made.report["kind"] == "facts":
        recipe = re.sub(rf"(?<=: ){STEPS}\b", str(steps_for(len(made.train), BATCH_SIZE)), recipe)
    write_atomic(folder / RECIPE, recipe)
    for file in sorted(folder.iterdir()):
        if not file.name.startswith("."):
            print(f"wrote {file}")


def steps_for(rows: int, batch_size: int) -> int:
    """Optimizer steps of a recipe for facts: six passes over the rows, as in the quickstart; its 36 steps at least."""
    return max(STEPS, math.ceil(PASSES * rows / batch_size))


def _without(recipe: str, key: str, why: str) -> str:
    """The recipe with `data.KEY: null`, and the reason."""
    return re.sub(rf"(?m)^  {key}: .*$", f"  {key}: null".ljust(36) + f"# {why}", recipe)


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        prog="opcd init",
        description="Write a recipe that explains its keys, a context, and questions about it. "
        f"`{FIT}` runs there as it is. Then replace them by your own.",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(), metavar="FOLDER", help="new or empty; default: ."
    )
    parser.add_argument(
        "--context",
        nargs="+",
        metavar="FILE",
        help="your own documents or system prompt: questions are written about them, as `opcd queries` does",
    )
    kinds = "kind of the context: facts, or a manner of answering, as a system prompt; default: found from --context"
    parser.add_argument("--kind", choices=["facts", "manner"], help=kinds)
    return parser
