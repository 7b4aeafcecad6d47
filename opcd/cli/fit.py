"""Lightning's fit, validate, test and predict, with the project's defaults and one folder a run."""

import re
import shutil
import signal
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
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
from opcd.callbacks import (
    Alarms,
    AnswerSamples,
    ExactResume,
    ExportStudent,
    KeepHistory,
    LeaveOnSignal,
    PredictionWriter,
    RecoveryAndDrift,
    SaveCheckpoints,
    StepProgress,
    WriteEnvironment,
)
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
from opcd.modules.distributed.fsdp_strategy import check_configured
from opcd.runtime.differences import plain_config
from opcd.runtime.errors import StepAbandoned, UserError
from opcd.runtime.files.disk import whole
from opcd.runtime.files.recipe_paths import ReadRecipe
from opcd.runtime.files.run_folder import RunFolder, one_at_a_time, refuse_living
from opcd.runtime.interruption import Interrupted
from opcd.runtime.lazy import all_of
from opcd.runtime.machine import check_numbers, check_port, in_full

DEFAULT_OPTIMIZER = f"{default_optimizer.__module__}.{default_optimizer.__name__}"
"""As jsonargparse writes it."""
PARSER = {"exit_on_error": False, "allow_abbrev": False}
for _package in ("opcd.data", "opcd.callbacks"):  # a config may name any class by its last name
    all_of(_package)
ASKS = re.compile(r"^-h$|help|comments")
"""Words that ask what keys are for: --help, --model.loss.help, --print_config=comments."""
SOURCES = ("data.train", "data.val", "data.test", "data.predict")


class _Parser(LightningArgumentParser):
    """Lightning's parser, with paths in recipes as `opcd.runtime.files.recipe_paths` takes them."""

    def add_argument(self, *names: str, **options: Any) -> Any:
        """Add it; --config reads recipes."""
        if options.get("action") is ActionConfigFile:
            options["action"] = ReadRecipe
        return super().add_argument(*names, **options)

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        """The config as text, with the optimizer that is taken where none is named."""
        cfg = cfg.clone()
        for config in (cfg, *(cfg[name] for name in LightningCLI.subcommands() if name in cfg)):
            if config is not None and config.get(signatures.OPTIMIZER) in (default_optimizer, DEFAULT_OPTIMIZER):
                written = signatures.default_optimizer()
                make: Any = Namespace
                config[signatures.OPTIMIZER] = make(**{**written, "init_args": make(**written["init_args"])})
        return str(super().dump(cfg, *args, **kwargs))


class Command(LightningCLI):
    """LightningCLI with the project's defaults, one folder a run, and the callbacks that every run has."""

    claimed: RunFolder | None = None
    """The run's folder, on rank 0."""
    going_on: dict[str, Any] | None = None
    """What a checkpoint that the run goes on from says of its data."""
    asked = "fit"
    """The subcommand that is run."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is run: the parsers of the other three take longer than all that is read."""
        return {self.asked: LightningCLI.subcommands()[self.asked]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults that are classes, and what data must know of the models."""
        parser.set_defaults(
            {
                "model.teacher": {"class_path": f"opcd.modules.{FrozenTeacher.__name__}"},
                "model.rollout": {"class_path": f"opcd.modules.{StudentRollout.__name__}"},
            }
        )
        for action in parser._actions:
            if action.dest in SOURCES:
                # jsonargparse would read the file of rows as YAML: it might be a class's.
                action._enable_path = False  # type: ignore[attr-defined]
        parser.link_arguments("model.student", "data.student")
        parser.link_arguments("model.teacher", "data.teacher", compute_fn=_teacher_model)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check the numbers that Lightning would use before anything of ours runs."""
        super().parse_arguments(parser, args)
        check_numbers(self.config[self.config.subcommand])

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint to go on from, and refuse a wrong one before anything is loaded."""
        config = self.config[self.subcommand]
        if self.subcommand != "fit":  # what it trained with has nothing to do now
            warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided")
        if config.trainer.precision is None:
            config.trainer.precision = chosen_precision(str(config.trainer.accelerator))
        self.plain = plain_config(self._parser(self.subcommand), config)
        self.plain.pop("ckpt_path", None)
        check_configured(config.trainer.strategy)
        if config.ckpt_path is None and self.subcommand == "fit" and started_again():
            config.ckpt_path = "last"
        root = whole(Path(config.trainer.default_root_dir))
        first = getattr(rank_zero_only, "rank", 0) == 0
        asked = config.ckpt_path
        path = self._claim(root, asked) if first else find_checkpoint(asked, root)
        config.ckpt_path = path and str(path)
        if path is not None:  # `last` has been verified
            self.going_on = check_checkpoint(path, self.plain, self.subcommand == "fit", verified=str(asked) == "last")

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would take the model's settings, and code with them, out of the checkpoint."""

    def after_instantiate_classes(self) -> None:
        """Let the data refuse other rows or contexts than the checkpoint's, before a model is loaded."""
        if self.subcommand == "fit" and self.going_on is not None:
            self.datamodule.go_on_from(self.going_on)

    def _run_subcommand(self, subcommand: str) -> None:
        """As Lightning does; what it refuses, and a checkpoint that cannot be restored, are mistakes of the user's."""
        try:
            super()._run_subcommand(subcommand)
        except (OSError, UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            connector = self.trainer._checkpoint_connector
            if connector._loaded_checkpoint:  # Lightning lets go of it when all is restored
                why = f"{type(error).__name__}: {str(error) or repr(error)}".splitlines()[0]
                raise BrokenCheckpoint(f"{connector._ckpt_path} cannot be restored into this run ({why})") from error
            if _refused_by_lightning(error):
                raise UserError(" ".join(str(error).split())) from error
            raise

    def _claim(self, root: Path, ckpt_path: Any) -> Path | None:
        """Make and lock a folder for this run, if there is no other that `last` would run into; its checkpoint."""
        with one_at_a_time(root):
            if self.subcommand == "fit" and str(ckpt_path) == "last":
                refuse_living(root)
            path = find_checkpoint(ckpt_path, root)
            self.claimed = RunFolder.claim(root)
        return path

    def instantiate_classes(self) -> None:
        """Classes refuse bad arguments with ValueError: the user's mistake, not a bug."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise UserError(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that writes into a folder of its own."""
        config = self._get(self.config_init, "trainer")
        # Rank 0 has claimed a folder; the others learn of it from Lightning, which broadcasts `trainer.log_dir`.
        self.run_folder = self.claimed.path if self.claimed else whole(Path(config["default_root_dir"]))
        callbacks = config["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        kwargs |= {
            "default_root_dir": self.run_folder,
            "logger": self._loggers(config["logger"]),
            "callbacks": [*callbacks, *self._own_callbacks(callbacks, config)],
            "plugins": _with_safe_io(config["plugins"]),
        }
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:
            raise UserError(in_full(error, config)) from error
        check_port(trainer)
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):  # a rank that waits for the others would not get to more
                signal.signal(number, signal.SIG_DFL)
        return trainer

    def _loggers(self, configured: Any) -> list[Logger] | bool:
        if configured is False:
            return False
        chosen = configured if isinstance(configured, list) else [configured] if isinstance(configured, Logger) else []
        return [RunLogger(self.run_folder), *chosen]

    def _own_callbacks(self, configured: list[Callback], config: Any) -> list[Callback]:
        """Those that are always there; one that the config holds too is taken from there."""
        own: list[Callback] = [WriteEnvironment(), LeaveOnSignal(), ExactResume(self.plain), ExportStudent()]
        own.append(PredictionWriter())
        if config["enable_progress_bar"] is not False:
            own.append(StepProgress())
        if config["enable_checkpointing"] is not False:
            own.append(SaveCheckpoints())
        if self.subcommand == "fit":
            own += [AnswerSamples(), RecoveryAndDrift(), Alarms(), KeepHistory()]
        return [callback for callback in own if not any(isinstance(c, type(callback)) for c in configured)]


def _refused_by_lightning(error: Exception) -> bool:
    """Whether Lightning itself says no: to a metric that nobody logs, or an interval longer than an epoch."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    module = place.tb_frame.f_globals.get("__name__", "") if place is not None else ""
    return isinstance(error, ValueError | RuntimeError) and module.startswith("lightning.")


def _teacher_model(teacher: Any) -> Any:
    """The teacher's ModelConfig out of its class_path/init_args, or None where it has none of its own.

    Of several teachers (`RoutedTeachers`) the TeacherModels, as an object: jsonargparse parses a linked value twice,
    and refuses what it has made of a dictionary of dictionaries.
    """
    init_args = getattr(teacher, "init_args", None) or {}
    if not isinstance(several := init_args.get("teachers"), dict):
        return init_args.get("model")
    models = {name: (getattr(part, "init_args", None) or {}).get("model") for name, part in several.items()}
    configs = {name: model and ModelConfig(**model.init_args.as_dict()) for name, model in models.items()}
    return TeacherModels(configs, init_args.get("default"))


def _with_safe_io(configured: Any) -> list[Any]:
    """The trainer's plugins, with the project's way to write checkpoints where the config has no other."""
    plugins = configured if isinstance(configured, list) else [configured] if configured is not None else []
    own = [] if any(isinstance(plugin, CheckpointIO) for plugin in plugins) else [SafeCheckpointIO()]
    return [*plugins, *own]


def find_checkpoint(ckpt_path: Any, root: Path) -> Path | None:
    """The file that `ckpt_path` means: last is the newest whole one of the runs under `root`, if there is one."""
    if ckpt_path is None:
        return None
    if str(ckpt_path) == "last":
        return newest_whole(root)
    path = Path(ckpt_path)
    if not path.is_file():
        raise UserError(
            f"ckpt_path: no checkpoint {path.absolute()}; name a .ckpt file, or say last (the newest whole one of the "
            f"runs under {root})"
        )
    return path


def run(args: list[str]) -> None:
    """Parse `args` and run one of Lightning's subcommands. UserError for the user's mistakes."""
    sys.argv[1:] = args  # where Lightning looks, also when it starts the other ranks
    command = Command.__new__(Command)
    command.asked = args[0]
    try:
        command.__init__(**_settings(args[0], described=any(ASKS.search(word) for word in args)))  # type: ignore[misc]
    except (UserError, MisconfigurationException, ArgumentError) as error:  # a crash keeps what was written
        if not isinstance(error, StepAbandoned):  # its batch is kept for a look
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
    """The parser of `opcd fit`, for those who check a config without running it, or read what its keys are for."""
    command = _ParserOnly.__new__(_ParserOnly)
    with suppress(_ParsersStand):
        command.__init__(**_settings("fit", described))  # type: ignore[misc]
    return command._subcommand_parsers["fit"]


class _ParsersStand(Exception):
    """Everything that parses is built, and nothing has been parsed."""


class _ParserOnly(Command):
    """The command up to where it would read its arguments."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Stop here."""
        raise _ParsersStand


def _settings(subcommand: str, described: bool) -> dict[str, Any]:
    """What the command tells LightningCLI. `described`: with the docstrings below attributes, which take a second."""
    set_parsing_settings(docstring_parse_attribute_docstrings=described)
    return {
        "parser_class": _Parser,
        "model_class": Distiller,
        "datamodule_class": ContextQueryDataModule,
        "trainer_defaults": {
            "default_root_dir": "runs",
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        },
        "seed_everything_default": 0,
        "auto_configure_optimizers": False,
        "load_from_checkpoint_support": False,
        "parser_kwargs": PARSER | {subcommand: PARSER},
    }


def _has_begun(command: Command) -> bool:
    """Whether all was loaded and restored."""
    callbacks: list[Callback] = getattr(getattr(command, "trainer", None), "callbacks", [])
    return any(isinstance(callback, LeaveOnSignal) and callback.has_listened for callback in callbacks)


def _remove_unused_folder(command: Command) -> None:
    """Leave nothing behind of a run that was refused before its first step."""
    trainer, claimed = getattr(command, "trainer", None), command.claimed
    if claimed is None or any(claimed.path.glob("predictions*.jsonl")):
        return
    if trainer is None or trainer.global_step == 0 or not _has_begun(command):
        shutil.rmtree(claimed.path, ignore_errors=True)
