"""The student that is exported: out of a run, a model's folder or an adapter's, known before its weights are loaded."""

from dataclasses import asdict, dataclass, replace
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
from opcd.models.adapter_folder import ADAPTER
from opcd.models.model_card import Facts
from opcd.models.model_folder import check_weights, explain
from opcd.modules.lm.adapters import Lora, keep_differentiable
from opcd.modules.student import Student
from opcd.runtime.did_you_mean import beside
from opcd.runtime.errors import UserError
from opcd.runtime.files.safe_yaml import load_yaml
from opcd.runtime.files.user_files import read_text

KEY = "RUN"


@dataclass(frozen=True)
class Source:
    """A student on this disk.

    Attributes:
        model: its folder; with a checkpoint, the model that the run began with.
        checkpoint: what holds its weights, where the run has left no folder of it.
        lora: the adapter that the checkpoint's weights are of.
    """

    model: ModelConfig
    checkpoint: Path | None = None
    lora: Lora | None = None

    @property
    def adapted(self) -> bool:
        """Whether the student is an adapter over a base."""
        return self.lora is not None or (Path(self.model.name) / ADAPTER).is_file()

    @property
    def base(self) -> str:
        """The folder or hub id of the model, of an adapter's base."""
        return base_of(resolve(self.model, KEY), KEY)

    @property
    def architecture(self) -> PreTrainedConfig:
        """The config of the model, without its weights."""
        return architecture(self.model, KEY)

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights, of an adapter's base; for a checkpoint that of the model that the run began with."""
        own = self.architecture.dtype
        return own if isinstance(own, torch.dtype) else torch.float32

    def load(self) -> tuple[Student, Facts]:
        """The student in float32, in eval mode, and how it was made.

        Raises:
            UserError: it cannot be loaded.
        """
        if self.checkpoint is None:
            facts = Facts.read(Path(self.model.name)) or Facts(base=self.base, opcd=None)
            return load_folder(self.model), facts
        checkpoint = read_checkpoint(self.checkpoint)
        student = Student.load(replace(self.model, dtype="float32"), adapter=self.lora)
        try:
            student.load_state_dict(_of_student(checkpoint["state_dict"]))
            facts = Facts.of(checkpoint["facts"])
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{KEY}: {self.checkpoint} is no checkpoint of its config: {explain(error)}") from error
        student.model.eval()
        check_weights(student.model, f"{KEY}: {self.checkpoint}")
        return student, facts


def load_folder(config: ModelConfig) -> Student:
    """A student's folder in float32, in eval mode. UserError where it cannot be loaded."""
    config = replace(config, dtype="float32")
    model = load_model(config, key=KEY)
    keep_differentiable(model)  # in place of the kernel that a CPU has for frozen 4-bit weights, which rounds inputs
    return Student(model, load_tokenizer(config, KEY))


@dataclass(frozen=True)
class Trust:
    """What the command line allows; the files of a run cannot."""

    trust_remote_code: bool = False
    pickled_weights: bool = False


def find_source(run: Path, trust: Trust) -> Source:
    """What RUN means: a run's folder (its student/, else its newest whole checkpoint), a student's, the packaged model.

    Raises:
        UserError: it is none of these, or asks for what `trust` does not allow.
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
            f"{KEY}: {run.resolve()} is no run of `opcd fit` (it has no config.yaml) and no student's folder (it has "
            f"neither config.json nor {ADAPTER})"
        )
    if _is_student(run / "student"):
        trained = _student_config(_read_config(run / "config.yaml"), run / "config.yaml", trust)
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
    lora = config["model"].get("adapter")
    try:
        return Source(model, checkpoint, None if lora is None else Lora(**lora))
    except (TypeError, ValueError) as error:
        raise UserError(f"{KEY}: {manifest} has no model.adapter of this opcd: {error}") from error


def _read_config(file: Path) -> Any:
    return load_yaml(read_text(file, KEY), f"{KEY}: {file}")


def _student_config(config: Any, file: Path, trust: Trust) -> ModelConfig:
    """Out of the plain values of a run's config."""
    where = f"{KEY}: {file}"
    try:
        values = config["model"]["student"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} has no model.student of this opcd: {explain(error)}") from error
    return saved_model_config(values, where, **asdict(trust))


def _is_student(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER).is_file()


def _of_student(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}
