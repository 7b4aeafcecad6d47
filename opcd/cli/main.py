"""The command `opcd`: what its first word runs, and how a mistake of the user's is told."""

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
from opcd.config.precheck import RECIPES, UNKNOWN, checked, unknown_words
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
"""What Lightning says of every run; the one line about types is `chosen_precision`'s."""
CHATTERING = (
    *("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"),
    *("lightning.fabric.utilities.seed", "lightning.pytorch.accelerators.cuda"),
)
"""The loggers that it says it by: a filter is asked by the logger that it is added to alone."""
PRINTED = ("--help", "-h", "--version", "chat", "completion", "doctor")
"""First words of commands that leave nothing but what they print."""
OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EBUSY, errno.ESTALE, errno.EXDEV)
"""What the system says of a file where it does not say which."""


def main(args: list[str] | None = None) -> int:
    """Entry point. Returns 0, 2 for the user's mistakes, with one message and no traceback (`--debug` shows it),
    143 or 130 where a signal ended a run that saved a checkpoint, or 1 where a command is there for what it prints,
    and that could not be written."""
    args = list(sys.argv[1:] if args is None else args)
    with clean_output():
        code = _run(args)
        lost = not finish_output() and (not args or args[0] in PRINTED)
    return code or int(lost)


def _run(args: list[str]) -> int:
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    sys.path.append(str(Path.cwd()))  # for files that a class_path names; last, so that they hide no package
    try:
        return _dispatch(allow_imports(args))
    except (Interrupted, KeyboardInterrupt) as leaving:
        reset()
        left = leaving if isinstance(leaving, Interrupted) else Interrupted(signal.SIGINT)
        print(f"opcd: {left}" + "; --ckpt_path last goes on" * (args[:1] == ["fit"]), file=sys.stderr)
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
    if name not in TRAINER | COMMANDS:
        raise UserError(f"no command {name}{_command_meant(name)}")
    if name in TRAINER:
        args = [name, *checked(name, args[1:])]
    if name not in WITHOUT_TORCH or "--plan" in args:
        _quiet()  # transformers, and with it torch: what is above answers at once
    if name in COMMANDS:
        with leaving_at_once(signal.SIGTERM):  # Ctrl-C is Python's own KeyboardInterrupt, which some of them handle
            return _run_own(name, args[1:])
    with leaving_at_once(signal.SIGINT, signal.SIGTERM):  # until training listens (`LeaveOnSignal`)
        from opcd.cli.fit import run

        run(args)
    return 0


def _run_own(name: str, words: list[str]) -> int:
    """Run one of the project's own commands; an option that it does not have is told with the nearest."""
    module = importlib.import_module(COMMANDS[name][0])
    try:
        return int(module.main(words))
    except (UserError, ArgumentError) as error:
        found = UNKNOWN.search(str(error))
        if found is None:
            raise
        own = [option for action in module.make_parser()._actions for option in action.option_strings]
        known = [option.removeprefix("--") for option in own if option.startswith("--")]
        fits = [*options(), *inner_keys()] if name in ("record", "doctor") else []  # which take those of `opcd fit` too
        raise UserError(unknown_words(found["words"].split(), [*known, *fits])) from error


def _command_meant(wrong: str) -> str:
    """The end of a message: the command with the nearest name, or with that word in what it is said to do."""
    lines = _lines()
    if Path(wrong).suffix in RECIPES:
        return f"; did you mean opcd fit --config {wrong}?"
    if wrong.startswith("-") and near(wrong, ("--help", "--version")) is None:
        return f"; an option comes after one, as in opcd fit {wrong}"
    told = [name for name, text in lines.items() if wrong.lower() in re.findall(r"\w+", text.lower())]
    return f"; did you mean {told[0]}?" if told else or_all(wrong, [*lines, "--help", "--version"])


def _mistakes() -> tuple[type[Exception], ...]:
    """What the user's mistakes raise; Lightning's own error where it has been imported, which takes seconds."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    return UserError, ArgumentError, *([lightning.MisconfigurationException] if lightning else [])


def _lines() -> dict[str, str]:
    """Every command, and what it does."""
    return TRAINER | {name: text for name, (_, text) in COMMANDS.items()}


def _help() -> str:
    """What `opcd --help` prints."""
    return "\n".join(
        [
            "On-policy context distillation: put a context into a language model's weights.\n",
            "usage: opcd COMMAND [options]; opcd COMMAND --help explains each\n",
            *(f"  {name:<12}{text}" for name, text in _lines().items()),
            "",
            "--version says which opcd this is. --debug shows the traceback of an error. --allow-imports A.B,C lets a",
            "class_path name what jsonargparse denies, such as what is under os or subprocess: a config can run any",
            "other code that is installed.",
        ]
    )


def _refused(message: str, debug: bool) -> int:
    if debug:
        print(traceback.format_exc(), end="", file=sys.stderr)  # without colours
    print(f"opcd: error: {in_plain_words(message)}", file=sys.stderr)
    return 2


def _quiet() -> None:
    """Switch off what other libraries print that a user can do nothing about."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("huggingface_hub", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in CHATTERING:
        logging.getLogger(name).addFilter(_worth_a_line)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")  # data.val is not needed
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")  # one of the user's own
    warnings.filterwarnings("ignore", message="The dirpath has changed from")  # a resumed run has a folder of its own
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*The .lr_scheduler.step... call.*")
    warnings.filterwarnings(
        "ignore", message=".*The number of training batches .* is smaller than the logging interval.*"
    )


def _worth_a_line(record: logging.LogRecord) -> bool:
    return CHATTER.search(str(record.msg)) is None


if __name__ == "__main__":
    sys.exit(main())
