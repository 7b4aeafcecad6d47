"""The models of the loop, loaded when a stage needs them, one at a time."""

import gc
from collections.abc import Sequence
from typing import Protocol

import torch

from opcd.data import Views
from opcd.data.example import Message
from opcd.evaluation.batched_answers import prompt_ids
from opcd.experience.experience_config import Experience, StageName
from opcd.experience.problems import Writer
from opcd.models import ModelConfig, context_window, load_model, load_tokenizer
from opcd.modules.lm.generation import Sampling
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.modules.student import Student, respond
from opcd.runtime.errors import UserError
from opcd.writing.written import Written

STAGES: tuple[StageName, ...] = ("solve", "extract", "select")
STUDENT: StageName = "student"
ADVICE = "lower max_new_tokens of this stage or of solve (an extractor reads entire attempts), or lessons.max_tokens"


class Writers(Protocol):
    """The models of all stages."""

    def open(self, stage: StageName) -> Writer:
        """Load the model of a stage."""

    def close(self) -> None:
        """Free the memory of the models, for another process."""


class ModelWriter(Writer):
    """A model on this machine.

    Args:
        student: the model and its tokenizer.
        views: renders conversations as prompts.
        sampling: how tokens are drawn.
        window: most tokens of prompt and answer together; None: not known.
        name: config key and name of the model, for messages.
    """

    def __init__(self, student: Student, views: Views, sampling: Sampling, window: int | None, name: str) -> None:
        self.student, self.views, self.sampling, self.window, self.name = student, views, sampling, window, name
        self._prefix = PrefixCache()
        self._context: str | None = None

    def write(self, conversations: Sequence[list[Message]], context: str | None = None) -> list[Written]:
        """One continuation of each conversation, all in one batch."""
        if context != self._context:
            self._prefix.clear()  # one context serves many calls before the next one
            self._context = context
        prompts = [self._prompt(messages, context) for messages in conversations]
        responses = respond(self.student, self.views, prompts, context, self.sampling, self._prefix)
        return [self._written(response.tolist()) for response in responses]

    def _prompt(self, messages: list[Message], context: str | None) -> list[int]:
        ids = prompt_ids(self.views, messages, context, "a conversation")
        most = self.sampling.max_new_tokens
        if self.window is not None and len(ids) + most > self.window:
            raise UserError(
                f"{self.name} takes {self.window} tokens, but a prompt has {len(ids)} and up to {most} are added: "
                f"{ADVICE}; the prompt begins with {messages[-1]['content'][:80]!r}"
            )
        return ids

    def _written(self, ids: list[int]) -> Written:
        text = str(self.student.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return Written(text, len(ids), ids[-1] not in self.student.eos_ids)


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
        return ModelWriter(self._loaded[1], self._views[stage], sampling, window, name)

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
