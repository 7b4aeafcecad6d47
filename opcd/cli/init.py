"""`opcd init`: write a folder with a commented recipe, a context and questions, which trains as it is."""

import argparse
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
CHAT = "opcd chat runs/version_0 --context context.txt"


def main(args: list[str]) -> int:
    """Write the files. Returns 0.

    Raises:
        UserError: the folder is not empty, or cannot be made.
    """
    options = make_parser().parse_args(args)
    folder: Path = options.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"FOLDER: cannot make {folder.resolve()}: {error.strerror}; name a new folder") from error
    there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))  # such as .git
    if there:
        names = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
        raise UserError(f"FOLDER: {folder.resolve()} is not empty (it holds {names}); name a new or empty folder")
    for file in sorted((STARTER / options.kind).iterdir()):
        write_atomic(folder / file.name, file.read_text(encoding="utf-8"))
        print(f"wrote {folder / file.name}")
    steps = [f"cd {shlex.quote(str(folder))}"] * (folder != Path()) + [LOOK, FIT, CHAT]
    print("next:", *steps, sep="\n    ")
    return 0


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
    kinds = "kind of the context: facts, or a manner of answering, as a system prompt; default: %(default)s"
    parser.add_argument("--kind", choices=["facts", "manner"], default="facts", help=kinds)
    return parser
