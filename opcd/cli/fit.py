"""Lightning's fit, validate, test and predict, with the project's defaults and a folder for each run."""

import re
import shutil
import signal
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from jsonargparse import ActionConfigFile, ArgumentError, Namespace, set_parsing_settings  # type: ignore[attr-defined]
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from opcd.accel.precision import chosen_precision
from opcd.callbacks import ExactResume, LeaveOnSignal, default_callbacks
from opcd.callbacks.log_folder import RunLogger
from opcd.callbacks.slurm import started_again
from opcd.checkpoints import BrokenCheckpoint, SafeCheckpointIO, check_checkpoint, newest_whole
from opcd.config import (
    parsing,  # noqa: F401  parsing: its settings
    signatures,
)
from opcd.data import ContextQueryDataModule, TeacherModels
from opcd.models import ModelConfig
from opcd.modules import Distiller, FrozenTeacher, StudentRollout
from opcd.modules.distiller import default_optimizer
from opcd.modules.distributed.fsdp_strategy import check_configured, wait_for_rollouts
from opcd.runtime.differences import plain_config
from opcd.runtime.errors import StepAbandoned, UserError
from opcd.runtime.files.disk import whole
from opcd.runtime.files.recipe_paths import ReadRecipe
from opcd.runtime.files.run_folder import RunFolder, one_at_a_time, refuse_living
from opcd.runtime.interruption import Interrupted
from opcd.runtime.lazy import all_of
from opcd.runtime.machine import check_numbers, check_port, in_full

TRAINER_DEFAULTS = {"log_every_n_steps": 1, "num_sanity_val_steps": 0, "enable_model_summary": False}
"""Where the defaults differ from Lightning's."""
DEFAULT_OPTIMIZER = f"{default_optimizer.__module__}.{default_optimizer.__name__}"
"""The default optimizer as jsonargparse writes it."""
PARSER = {"exit_on_error": False, "allow_abbrev": False}
for _package in ("opcd.data", "opcd.callbacks"):  # a config may name any class by its last name
    all_of(_package)
ASKS = re.compile(r"^-h$|help|comments")
"""Words that show help texts of keys: --help, --model.loss.help, --print_config=comments."""
SOURCES = ("data.train", "data.val", "data.test", "data.predict")


class _Parser(LightningArgumentParser):
    """Lightning's parser, whose --config replaces relative paths (`opcd.runtime.files.recipe_paths`)."""

    def add_argument(self, *names: str, **options: Any) -> Any:
        """Add an argument; --config reads recipes."""
        if options.get("action") is ActionConfigFile:
            options["action"] = ReadRecipe
        return super().add_argument(*names, **options)

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """The config as text, with the default optimizer written out."""
        cfg = cfg.clone()
        for config in (cfg, *(cfg[name] for name in LightningCLI.subcommands() if name in cfg)):
            if config is not None and config.get(signatures.OPTIMIZER) in (default_optimizer, DEFAULT_OPTIMIZER):
                written = signatures.default_optimizer()
                make: Any = Namespace
                config[signatures.OPTIMIZER] = make(**{**written, "init_args": make(**written["init_args"])})
        return str(super().dump(cfg, *args, **kwargs))


class Command(LightningCLI):
    """LightningCLI with the project's defaults, a folder for each run, and the callbacks of every run."""

    claimed: RunFolder | None = None
    """The run's folder, on rank 0."""
    going_on: dict[str, Any] | None = None
    """The data section of the checkpoint that the run resumes."""
    asked = "fit"
    """The subcommand."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the subcommand that runs: the other three parsers take longer to build than a config takes to read."""
        return {self.asked: LightningCLI.subcommands()[self.asked]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add defaults that are classes, and link the models to the data."""
        parser.set_defaults(
            {
                "model.teacher": {"class_path": f"opcd.modules.{FrozenTeacher.__name__}"},
                "model.rollout": {"class_path": f"opcd.modules.{StudentRollout.__name__}"},
            }
        )
        for action in parser._actions:
            if action.dest in SOURCES:
                # jsonargparse would read a file of rows as the YAML of a class.
                action._enable_path = False  # type: ignore[attr-defined]
        parser.link_arguments("model.student", "data.student")
        parser.link_arguments("model.teacher", "data.teacher", compute_fn=_teacher_model)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and check the numbers that Lightning uses early."""
        super().parse_arguments(parser, args)
        check_numbers(self.config[self.config.subcommand])

    def before_instantiate_classes(self) -> None:
        """Lock a folder for this run, and find and check the checkpoint to resume, before anything is loaded."""
        config = self.config[self.subcommand]
        if self.subcommand != "fit":  # the callbacks of the training do not matter here
            warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided")
        if config.trainer.precision is None:
            config.trainer.precision = chosen_precision(str(config.trainer.accelerator))
        self.plain = plain_config(self._parser(self.subcommand), config)
        self.plain.pop("ckpt_path", None)
        check_configured(config.trainer.strategy)
        if config.ckpt_path is None and self.subcommand == "fit" and started_again():
            config.ckpt_path = "last"
        root = whole(Path(config.trainer.default_root_dir))
        asked = config.ckpt_path
        if getattr(rank_zero_only, "rank", 0) == 0:
            with one_at_a_time(root):
                if self.subcommand == "fit" and str(asked) == "last":
                    refuse_living(root)
                path = find_checkpoint(asked, root)
                self.claimed = RunFolder.claim(root)
        else:
            path = find_checkpoint(asked, root)
        config.ckpt_path = path and str(path)
        if path is not None:  # `last` has been verified
            self.going_on = check_checkpoint(path, self.plain, self.subcommand == "fit", verified=str(asked) == "last")

    def _parse_ckpt_path(self) -> None:
        """Do nothing. Lightning would take the model's settings, and with them code, from the checkpoint."""

    def after_instantiate_classes(self) -> None:
        """Compare rows and contexts with the checkpoint's, before a model is loaded."""
        if self.subcommand == "fit" and self.going_on is not None:
            self.datamodule.go_on_from(self.going_on)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run as Lightning does. Its own errors, and checkpoints that cannot be restored, become UserError."""
        try:
            super()._run_subcommand(subcommand)
        except (OSError, UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            connector = self.trainer._checkpoint_connector
            if connector._loaded_checkpoint:  # Lightning drops it after a complete restore
                why = f"{type(error).__name__}: {str(error) or repr(error)}".splitlines()[0]
                raise BrokenCheckpoint(f"{connector._ckpt_path} cannot be restored into this run ({why})") from error
            if _refused_by_lightning(error):
                raise UserError(" ".join(str(error).split())) from error
            raise

    def instantiate_classes(self) -> None:
        """Make all objects. A ValueError of a class about its arguments becomes UserError."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise UserError(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, which writes into the run's folder."""
        config = self._get(self.config_init, "trainer")
        # Rank 0 has claimed a folder. The other ranks get it from Lightning, which broadcasts `trainer.log_dir`.
        self.run_folder = self.claimed.path if self.claimed else whole(Path(config["default_root_dir"]))
        callbacks, plugins, logger = (_listed(config[name]) for name in ("callbacks", "plugins", "logger"))
        own_io = any(isinstance(plugin, CheckpointIO) for plugin in plugins)
        loggers = [RunLogger(self.run_folder), *(each for each in logger if isinstance(each, Logger))]
        kwargs |= {
            "default_root_dir": self.run_folder,
            "logger": False if config["logger"] is False else loggers,
            "callbacks": self._all_callbacks(callbacks, config),
            "plugins": plugins if own_io else [*plugins, SafeCheckpointIO()],
        }
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:
            raise UserError(in_full(error, config)) from error
        check_port(trainer)
        wait_for_rollouts(trainer.strategy)
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):  # a rank that waits for the others could not handle them
                signal.signal(number, signal.SIG_DFL)
        return trainer

    def _all_callbacks(self, configured: list[Callback], config: Any) -> list[Callback]:
        """The configured callbacks, those of every run, and those that need the command line."""
        own = (LeaveOnSignal(), ExactResume(self.plain))
        return default_callbacks(
            *configured,
            *(callback for callback in own if not any(isinstance(c, type(callback)) for c in configured)),
            fit=self.subcommand == "fit",
            progress=config["enable_progress_bar"] is not False,
            checkpoints=config["enable_checkpointing"] is not False,
        )


def _refused_by_lightning(error: Exception) -> bool:
    """Whether Lightning itself raised, for example about a metric that is not logged."""
    raised_in = [frame for frame, _ in walk_tb(error.__traceback__)][-1]
    module = raised_in.f_globals.get("__name__", "")
    return isinstance(error, ValueError | RuntimeError) and module.startswith("lightning.")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _teacher_model(teacher: Any) -> Any:
    """The teacher's ModelConfig in its class_path and init_args, or None if it has none.

    Several teachers (`RoutedTeachers`) give a TeacherModels object: jsonargparse parses a linked value twice, and
    cannot parse its own result for a dictionary of dictionaries.
    """
    init_args = getattr(teacher, "init_args", None) or {}
    if not isinstance(several := init_args.get("teachers"), dict):
        return init_args.get("model")
    models = {name: (getattr(part, "init_args", None) or {}).get("model") for name, part in several.items()}
    configs = {name: model and ModelConfig(**model.init_args.as_dict()) for name, model in models.items()}
    return TeacherModels(configs, init_args.get("default"))


def find_checkpoint(ckpt_path: Any, root: Path) -> Path | None:
    """The file of `ckpt_path`. `last` is the newest complete checkpoint of the runs under `root`, or None."""
    if ckpt_path is None:
        return None
    if str(ckpt_path) == "last":
        return newest_whole(root)
    path = Path(ckpt_path)
    if not path.is_file():
        raise UserError(
            f"ckpt_path: no checkpoint {path.absolute()}; name a .ckpt file, or say last (the newest complete "
            f"one of the runs under {root})"
        )
    return path


def run(args: list[str]) -> None:
    """Parse `args` and run one of Lightning's subcommands. UserError for mistakes of the user."""
    sys.argv[1:] = args  # Lightning reads them, also to start the other ranks
    command = Command.__new__(Command)
    command.asked = args[0]
    try:
        command.__init__(**_settings(args[0], described=any(ASKS.search(word) for word in args)))  # type: ignore[misc]
    except (UserError, MisconfigurationException, ArgumentError) as error:  # a crash keeps the folder
        if not isinstance(error, StepAbandoned):  # the folder has its batch
            _remove_unused_folder(command)
        raise
    except Interrupted:
        if not _has_begun(command):
            _remove_unused_folder(command)
        raise
    finally:
        if command.claimed is not None:
            command.claimed.release()


def fit_parser(described: bool = False) -> LightningArgumentParser:
    """The parser of `opcd fit`, to check a config without a run. `described`: with the help texts of its keys."""
    command = _ParserOnly.__new__(_ParserOnly)
    with suppress(_ParsersStand):
        command.__init__(**_settings("fit", described))  # type: ignore[misc]
    return command._subcommand_parsers["fit"]


class _ParsersStand(Exception):
    """The parsers are built, and nothing is parsed."""


class _ParserOnly(Command):
    """The command up to the parsing of its arguments."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Stop here."""
        raise _ParsersStand


def _settings(subcommand: str, described: bool) -> dict[str, Any]:
    """Arguments of LightningCLI. `described`: with docstrings below attributes, which take a second."""
    set_parsing_settings(docstring_parse_attribute_docstrings=described)
    return {
        "parser_class": _Parser,
        "model_class": Distiller,
        "datamodule_class": ContextQueryDataModule,
        "trainer_defaults": {"default_root_dir": "runs", **TRAINER_DEFAULTS},
        "seed_everything_default": 0,
        "auto_configure_optimizers": False,
        "load_from_checkpoint_support": False,
        "parser_kwargs": PARSER | {subcommand: PARSER},
    }


def _has_begun(command: Command) -> bool:
    """Whether everything was loaded and restored."""
    callbacks: list[Callback] = getattr(getattr(command, "trainer", None), "callbacks", [])
    return any(isinstance(callback, LeaveOnSignal) and callback.has_listened for callback in callbacks)


def _remove_unused_folder(command: Command) -> None:
    """Remove the folder of a run that ended before its first step."""
    trainer, claimed = getattr(command, "trainer", None), command.claimed
    if claimed is None or any(claimed.path.glob("predictions*.jsonl")):
        return
    if trainer is None or trainer.global_step == 0 or not _has_begun(command):
        shutil.rmtree(claimed.path, ignore_errors=True)
