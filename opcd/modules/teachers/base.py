"""What a teacher is: it writes responses under the context, and says what it thinks of those of others."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opcd.data import Batch, teacher_key
from opcd.models import ModelConfig
from opcd.modules.lm.generation import Sampling, eval_mode, generate, own_precision
from opcd.modules.lm.hidden_states import States, Target, head_of, last_hidden
from opcd.modules.prefix.prefix_cache import Mode, SharedPrefix
from opcd.modules.student import Student
from opcd.modules.trajectories import Trajectories, length_groups


class Teacher(ABC):
    """Sees the context. Never trained: no gradient, and no parameter of the LightningModule.

    Attributes:
        prefix: keys and values of contexts; one whose weights change clears it. `share_prefixes` sets it.
        config: the model that it loads; None: none of its own, or the student's.
        key: its config key, for messages.
        shard: whether the ranks hold its weights in parts, and must score as often as one another.
    """

    prefix = SharedPrefix("never")
    config: ModelConfig | None = None
    key = teacher_key()
    shard = False

    @property
    def parts(self) -> "dict[str | None, Teacher]":
        """The teachers that score rows, by the names that rows give them; one that is alone has none."""
        return {None: self}

    def share_prefixes(self, mode: Mode, memory_mib: int) -> None:
        """Let each of them keep keys and values, in `memory_mib` MiB together."""
        for part in self.parts.values():
            part.prefix = SharedPrefix(mode, memory_mib // len(self.parts))

    @abstractmethod
    def prepare(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Get ready on `device`, once, before the first step."""

    def synchronise(self, student: Student) -> None:  # noqa: B027
        """Take over what it needs of the student's weights of this step; comes first in it, on all ranks at once."""

    def ask(self, trajectories: Trajectories) -> None:  # noqa: B027
        """Hear of all the trajectories of a step, which `score` gets in parts: one that is far away asks here for all.

        Raises:
            StepAbandoned: there is no answer.
        """

    @abstractmethod
    def score(self, trajectories: Trajectories, max_tokens: int) -> Target:
        """What it says about p_T(. | c, x, y<t) for all response tokens, in row order, without gradient.

        `max_tokens` is the most of one pass of a model.
        """

    @abstractmethod
    def respond(self, batch: Batch, sampling: Sampling, eos_ids: set[int], pad_id: int) -> list[Tensor]:
        """Responses to the prompts that hold the context: B tensors [R]."""

    @abstractmethod
    def after_step(self, student: Student) -> None:
        """Follow the student, whose weights have just changed."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold; empty for what can be loaded again."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, after `prepare`."""

    def release(self, least: int = 0) -> None:  # noqa: B027
        """Give back what only `score` and `respond` need, where that is at least so many bytes; they take it again."""


class ModelTeacher(Teacher):
    """A teacher that is a model at hand."""

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The model that scores; there after `prepare`."""

    @torch.no_grad()
    def score(self, trajectories: Trajectories, max_tokens: int) -> States:
        """States of p_T(. | c, x, y<t) for all response tokens, in row order, without gradient.

        Rows whose context has its keys and values computed once (`prefix`) come packed; the others, whole, in groups
        of at most `max_tokens` with their padding.
        """
        rows = list(zip(trajectories.teacher_prompts, trajectories.responses, strict=True))
        with eval_mode(self.model), own_precision(self.model):
            hidden = self.prefix.score(self.model, trajectories.teacher_prefixes, rows, max_tokens)
            rest = [number for number in range(len(rows)) if number not in hidden]
            for group in length_groups([sum(map(len, rows[number])) for number in rest], max_tokens):
                numbers = [rest[i] for i in group]
                prompts, responses = [rows[n][0] for n in numbers], [rows[n][1] for n in numbers]
                states = last_hidden(self.model, prompts, responses).split([len(r) for r in responses])
                hidden.update(zip(numbers, states, strict=True))
        return States(torch.cat([hidden[number] for number in range(len(rows))]), head_of(self.model))

    @torch.no_grad()
    def respond(self, batch: Batch, sampling: Sampling, eos_ids: set[int], pad_id: int) -> list[Tensor]:
        """Responses to the prompts that hold the context: B tensors [R]."""
        with eval_mode(self.model), own_precision(self.model):
            prefixes = self.prefix.encoded(self.model, batch.teacher_prefixes, batch.teacher_prompts)
        return generate(self.model, batch.teacher_prompts, sampling, eos_ids, pad_id, prefixes)
