"""The student to export, from a run, a model's folder or an adapter's folder, found before its weights are loaded."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from opcd.checkpoints import newest_of_run, read_checkpoint
from opcd.checkpoints.checkpoint_files import manifest_of, saved_config
from opcd.models import (
    PACKAGED,
    ModelConfig,
    architecture,
    base_of,
    load_model,
    load_tokenizer,
    resolve,
    saved_model_config,
)
from opcd.models.adapter_folder import ADAPTER, virtual_tokens
from opcd.models.model_card import Facts
from opcd.models.model_folder import check_weights, explain
from opcd.modules.lm.adapters import Lora, keep_differentiable
from opcd.modules.lm.cartridge import Cartridge
from opcd.modules.student import Student
from opcd.runtime.did_you_mean import beside
from opcd.runtime.errors import UserError
from opcd.runtime.files.safe_yaml import load_yaml
from opcd.runtime.files.user_files import read_text

KEY = "RUN"
CARTRIDGES = {field.name for field in fields(Cartridge)}
"""The settings that tell a Cartridge from a Lora in a config."""


@dataclass(frozen=True)
class Source:
    """A student on this disk.

    Attributes:
        model: its folder; with a checkpoint, the model that the run began with.
        checkpoint: the file or folder of its weights, if the run has written no student folder.
        adapter: the adapter that the checkpoint belongs to.
    """

    model: ModelConfig
    checkpoint: Path | None = None
    adapter: Lora | Cartridge | None = None

    @property
    def adapted(self) -> bool:
        """Whether the student is an adapter over a base."""
        return self.adapter is not None or (Path(self.model.name) / ADAPTER).is_file()

    @property
    def is_cartridge(self) -> bool:
        """Whether that adapter is a Cartridge."""
        if self.adapter is not None:
            return isinstance(self.adapter, Cartridge)
        return self.adapted and virtual_tokens(Path(self.model.name), KEY) > 0

    @property
    def base(self) -> str:
        """The folder or hub id of the model, or of an adapter's base."""
        return base_of(resolve(self.model, KEY), KEY)

    @property
    def architecture(self) -> PreTrainedConfig:
        """The config of the model, without its weights."""
        return architecture(self.model, KEY)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights or of an adapter's base; for a checkpoint, of the model that the run began with."""
        own = self.architecture.dtype
        return own if isinstance(own, torch.dtype) else torch.float32

    def load(self) -> tuple[Student, Facts]:
        """The student in float32, in eval mode, and the facts of its training.

        Raises:
            UserError: it cannot be loaded.
        """
        if self.checkpoint is None:
            facts = Facts.read(Path(self.model.name)) or Facts(base=self.base, opcd=None)
            return load_folder(self.model), facts
        checkpoint = read_checkpoint(self.checkpoint)
        student = Student.load(replace(self.model, dtype="float32"), adapter=self.adapter)
        try:
            state = checkpoint["state_dict"].items()
            start = "student."
            student.load_state_dict({name.removeprefix(start): x for name, x in state if name.startswith(start)})
            facts = Facts.of(checkpoint["facts"])
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{KEY}: {self.checkpoint} does not match its config: {explain(error)}") from error
        student.model.eval()
        check_weights(student.model, f"{KEY}: {self.checkpoint}")
        return student, facts


def load_folder(config: ModelConfig) -> Student:
    """The student of a folder in float32, in eval mode. UserError if it cannot be loaded."""
    config = replace(config, dtype="float32")
    model = load_model(config, key=KEY)
    keep_differentiable(model)  # a CPU's kernel for frozen 4-bit weights rounds inputs
    return Student(model, load_tokenizer(config, KEY))


@dataclass(frozen=True)
class Trust:
    """Permissions that only the command line can give, not the files of a run."""

    trust_remote_code: bool = False
    pickled_weights: bool = False


def find_source(run: Path, trust: Trust) -> Source:
    """The student of RUN: a run (its student/, or the newest complete checkpoint), a folder, or the packaged model.

    Raises:
        UserError: RUN is none of these, or needs a permission that `trust` does not give.
    """
    allowed = asdict(trust)
    if str(run) == PACKAGED:
        return Source(ModelConfig(PACKAGED))
    if not run.is_dir():
        raise UserError(f"{KEY}: no folder {run.resolve()}{beside(run)}")
    if _is_student(run):
        return Source(ModelConfig(str(run), **allowed))
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{KEY}: {run.resolve()} is neither a run of `opcd fit` (no config.yaml) nor a student's folder (no "
            f"config.json or {ADAPTER})"
        )
    if _is_student(run / "student"):
        file = run / "config.yaml"
        trained = _student_config(load_yaml(read_text(file, KEY), f"{KEY}: {file}"), file, trust)
        # An adapter was trained over the base as the run quantized it.
        quantization = trained.quantization if (run / "student" / ADAPTER).is_file() else "none"
        return Source(ModelConfig(str(run / "student"), "auto", quantization, trained.attention, **allowed))
    return _from_checkpoint(run, trust)


def _from_checkpoint(run: Path, trust: Trust) -> Source:
    checkpoint = newest_of_run(run)
    if checkpoint is None:
        raise UserError(f"{KEY}: {run.resolve()} has neither student/ nor a checkpoint: it has trained nothing yet")
    config = saved_config(checkpoint)
    if config is None:
        raise UserError(f"{KEY}: {checkpoint} was not saved by `opcd fit`: its manifest holds no config")
    manifest = manifest_of(checkpoint)
    model = _student_config(config, manifest, trust)
    adapter = config["model"].get("adapter")
    try:
        made = None if adapter is None else Cartridge(**adapter) if CARTRIDGES & {*adapter} else Lora(**adapter)
        return Source(model, checkpoint, made)
    except (TypeError, ValueError) as error:
        raise UserError(f"{KEY}: {manifest} has no model.adapter of this opcd: {error}") from error


def _student_config(config: Any, file: Path, trust: Trust) -> ModelConfig:
    """The student's model config from the values of a run's config."""
    where = f"{KEY}: {file}"
    try:
        values = config["model"]["student"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} has no model.student of this opcd: {explain(error)}") from error
    return saved_model_config(values, where, **asdict(trust))


def _is_student(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER).is_file()
