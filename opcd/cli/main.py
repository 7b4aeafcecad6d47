"""The command `opcd`: it runs a subcommand, and reports mistakes of the user in one message."""

import errno
import importlib
import logging
import re
import signal
import sys
import traceback
import warnings
from pathlib import Path

from jsonargparse import ArgumentError

from opcd.cli import COMMANDS, TRAINER, WITHOUT_TORCH
from opcd.config.config_errors import in_plain_words
from opcd.config.parsing import allow_imports
from opcd.config.precheck import RECIPES, checked, unknown_words
from opcd.config.signatures import inner_keys, options
from opcd.runtime.did_you_mean import near, or_all
from opcd.runtime.errors import UserError
from opcd.runtime.interruption import Interrupted, leaving_at_once, reset
from opcd.runtime.output import clean_output, finish_output
from opcd.runtime.versions import VERSION

CHATTER = re.compile(
    r"litlogger|Seed set to|^Using .*(precision|AMP)|\b(GPU|TPU|HPU|IPU|NPU) available: |CUDA_VISIBLE_DEVICES: "
    r"|You are using a CUDA device|^`Trainer\.\w+` stopped: ",
    re.IGNORECASE,
)
"""Lightning's messages in every run. `chosen_precision` prints one line in their place."""
CHATTERING = (
    *("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"),
    *("lightning.fabric.utilities.seed", "lightning.pytorch.accelerators.cuda"),
)
"""The loggers of these messages: a filter works on its own logger alone."""
WARNINGS = (
    ".*does not have many workers.*",
    "You defined a `validation_step` but have no",  # data.val is optional
    "Using ModelCheckpoint with manual optimization",  # a callback of the user
    "The dirpath has changed from",  # a resumed run has a folder of its own
    ".*isinstance.treespec, LeafSpec.*",
    ".*The .lr_scheduler.step... call.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
)
"""Warnings of Lightning and torch that a user can do nothing about."""
DESCRIPTIONS = TRAINER | {name: text for name, (_, text) in COMMANDS.items()}
UNKNOWN = re.compile(r"unrecognized arguments: (?P<words>.+)", re.DOTALL)
PRINTED = ("--help", "-h", "--version", "chat", "completion", "doctor")
"""First words of commands whose only result is their output."""
OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EBUSY, errno.ESTALE, errno.EXDEV)
"""Errors of the system about a file that it may not name."""


def main(args: list[str] | None = None) -> int:
    """Run a command. Returns 0; 2 for a mistake of the user, with one message (`--debug` adds the traceback); 143 or
    130 where a signal ended a run that saved a checkpoint; or 1 where output that is a command's only result is
    lost."""
    args = list(sys.argv[1:] if args is None else args)
    with clean_output():
        code = _run(args)
        lost = not finish_output() and (not args or args[0] in PRINTED)
    return code or int(lost)


def _run(args: list[str]) -> int:
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    sys.path.append(str(Path.cwd()))  # for class_path to files of the user; last, so that they hide no package
    try:
        return _dispatch(allow_imports(args))
    except (Interrupted, KeyboardInterrupt) as leaving:
        reset()
        left = leaving if isinstance(leaving, Interrupted) else Interrupted(signal.SIGINT)
        print(f"opcd: {left}" + "; --ckpt_path last resumes" * (args[:1] == ["fit"]), file=sys.stderr)
        return left.exit_code
    except _mistakes() as error:
        return _refused(str(error), debug)
    except OSError as error:
        if error.filename is None and error.errno not in OF_A_DISK:
            raise
        return _refused(f"cannot read or write {error.filename or 'a file'}: {error.strerror}", debug)


def _dispatch(args: list[str]) -> int:
    name = args[0] if args else "--help"
    if name in ("--help", "-h"):
        print(_help())
        return 0
    if name == "--version":
        print(f"opcd {VERSION}")
        return 0
    if name not in DESCRIPTIONS:
        raise UserError(f"no command {name}{_command_meant(name)}")
    if name in TRAINER:
        args = [name, *checked(name, args[1:])]
    if name not in WITHOUT_TORCH or "--plan" in args:
        _quiet()  # imports transformers and torch, so that all above is fast
    if name in COMMANDS:
        with leaving_at_once(signal.SIGTERM):  # Ctrl-C is Python's own KeyboardInterrupt, which some of them handle
            return _run_own(name, args[1:])
    with leaving_at_once(signal.SIGINT, signal.SIGTERM):  # until `LeaveOnSignal` handles them
        from opcd.cli.fit import run

        run(args)
    return 0


def _run_own(name: str, words: list[str]) -> int:
    """Run one of the project's own commands. The message about an unknown option names the nearest one."""
    module = importlib.import_module(COMMANDS[name][0])
    try:
        return int(module.main(words))
    except (UserError, ArgumentError) as error:
        found = UNKNOWN.search(str(error))
        if found is None:
            raise
        own = [option for action in module.make_parser()._actions for option in action.option_strings]
        known = [option.removeprefix("--") for option in own if option.startswith("--")]
        fits = [*options(), *inner_keys()] if name in ("record", "doctor") else []  # and options of `opcd fit`
        raise UserError(unknown_words(found["words"].split(), [*known, *fits])) from error


def _command_meant(wrong: str) -> str:
    """The end of the message about an unknown command: one with this word in its description, or the nearest."""
    if Path(wrong).suffix in RECIPES:
        return f"; did you mean opcd fit --config {wrong}?"
    if wrong.startswith("-") and near(wrong, ("--help", "--version")) is None:
        return f"; an option comes after a command, as in opcd fit {wrong}"
    found = [name for name, text in DESCRIPTIONS.items() if wrong.lower() in re.findall(r"\w+", text.lower())]
    return f"; did you mean {found[0]}?" if found else or_all(wrong, [*DESCRIPTIONS, "--help", "--version"])


def _mistakes() -> tuple[type[Exception], ...]:
    """Exceptions for mistakes of the user. Lightning's own is included if Lightning is imported, which is slow."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    return UserError, ArgumentError, *([lightning.MisconfigurationException] if lightning else [])


def _help() -> str:
    """The text of `opcd --help`."""
    return "\n".join(
        [
            "On-policy context distillation: put a context into a language model's weights.\n",
            "usage: opcd COMMAND [options]; opcd COMMAND --help explains each\n",
            *(f"  {name:<12}{text}" for name, text in DESCRIPTIONS.items()),
            "",
            "--version prints the version. --debug shows the traceback of an error. --allow-imports A.B,C allows",
            "import paths in class_path that jsonargparse denies, such as those below os and subprocess. A config",
            "can run any other installed code.",
        ]
    )


def _refused(message: str, debug: bool) -> int:
    if debug:
        print(traceback.format_exc(), end="", file=sys.stderr)  # without colours
    print(f"opcd: error: {in_plain_words(message)}", file=sys.stderr)
    return 2


def _quiet() -> None:
    """Silence messages of other libraries that a user can do nothing about."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("huggingface_hub", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in CHATTERING:
        logging.getLogger(name).addFilter(lambda record: CHATTER.search(str(record.msg)) is None)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    sys.exit(main())
