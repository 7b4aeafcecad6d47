"""The models of the loop, loaded when a stage needs them, one at a time."""

import gc
from typing import Protocol

import torch

from opcd.data import Views
from opcd.experience.experience_config import Experience, StageName
from opcd.models import ModelConfig, context_window, load_model, load_tokenizer
from opcd.modules.student import Student
from opcd.runtime.errors import UserError
from opcd.writing.model_writer import ModelWriter
from opcd.writing.writer import Writer

STAGES: tuple[StageName, ...] = ("solve", "extract", "select")
STUDENT: StageName = "student"
ADVICE = "lower max_new_tokens of this stage or of solve (an extractor reads entire attempts), or lessons.max_tokens"


class Writers(Protocol):
    """The models of all stages."""

    def open(self, stage: StageName) -> Writer:
        """Load the model of a stage."""

    def close(self) -> None:
        """Free the memory of the models, for another process."""


class ModelWriters:
    """The models of the config, whose tokenizers and chat templates are checked at once.

    Args:
        config: the run.
        device: the device of the models.

    Raises:
        UserError: a model is not there, or its chat template does not take a list at the `placement`.
    """

    def __init__(self, config: Experience, device: torch.device) -> None:
        self.config, self.device = config, device
        stages = (*STAGES, STUDENT) if config.rounds else STAGES
        self._views = {stage: self._make_views(stage) for stage in stages}
        self._loaded: tuple[ModelConfig, Student] | None = None

    def open(self, stage: StageName) -> Writer:
        """Load the model of a stage, in place of another one that is loaded."""
        config, key = self.config.model_of(stage)
        if self._loaded is None or self._loaded[0] != config:
            self.close()
            model = load_model(config, key=key, device=self.device).to(self.device)  # type: ignore[arg-type]
            self._loaded = (config, Student(model, load_tokenizer(config, key)))
        window = context_window(config, key)
        name = f"{key}.name: {config.name}"
        sampling = self.config.stage(stage).sampling
        return ModelWriter(self._loaded[1], self._views[stage], sampling, window, name, ADVICE)

    def close(self) -> None:
        """Free the memory of the model."""
        self._loaded = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _make_views(self, stage: StageName) -> Views:
        config, key = self.config.model_of(stage)
        tokenizer = load_tokenizer(config, key)
        # Only `select` has lists in its prompts; the other stages work without a system role too.
        place, template = (self.config.placement, self.config.template) if stage == "select" else ("user", None)
        window, most = context_window(config, key), self.config.stage(stage).sampling.max_new_tokens
        if window is not None and most >= window:
            where = "select" if stage == STUDENT else stage
            raise UserError(
                f"{where}.sampling.max_new_tokens: {most} leaves no room for a prompt; {config.name} ({key}.name) has "
                f"{window} tokens"
            )
        kwargs = config.chat_template_kwargs
        return Views(tokenizer, tokenizer, place, template, kwargs, kwargs, (key, key, ""))
