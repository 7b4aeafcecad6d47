"""The interface of a teacher: it scores responses, and may write them, with the context in the prompt."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opcd.data import Batch, teacher_key
from opcd.losses.divergences import Known
from opcd.models import ModelConfig, context_window, load_tokenizer
from opcd.modules.lm.generation import Sampling, eval_mode, generate, own_precision
from opcd.modules.lm.hidden_states import HiddenStates, TeacherOutput, head_of, last_hidden
from opcd.modules.prefix.prefix_cache import Mode, PrefixCache
from opcd.modules.student import Student, end_ids
from opcd.modules.trajectories import Trajectories, length_groups
from opcd.runtime.errors import UserError

if TYPE_CHECKING:
    from opcd.modules.validation import Run


@dataclass
class Reader:
    """A model that reads a prompt.

    Attributes:
        key: its config key.
        name: its name.
        window: most tokens of a prompt and its response; None if unknown.
    """

    key: str
    name: str
    window: int | None


class Teacher(ABC):
    """A model that sees the context. It is never trained: no gradient, no parameter of the LightningModule.

    A step calls `sync_weights`, then within one `session` `score` once per micro-batch, then `on_student_step`.

    Attributes:
        provides: what it gives at a position: its distribution, its likeliest tokens (topk), or the sampled token.
        frozen: whether its weights never change in a run. If they do, its prefix cache lasts for one step.
        stands_alone: whether `setup` needs no student, so that it can be recorded without one.
        config: the model that it loads; None: no model of its own, or the student's.
        key: its config key, for messages.
        shard: whether its weights are sharded over the ranks, which must then call `score` equally often.
        writes: whether `generate` works.
    """

    provides: ClassVar[tuple[Known, ...]] = ("distribution",)
    frozen: ClassVar[bool] = False
    stands_alone: ClassVar[bool] = False
    config: ModelConfig | None = None
    key = teacher_key()
    shard = False
    writes: bool = False

    @property
    def parts(self) -> "dict[str | None, Teacher]":
        """The teachers that score rows, by their names in the rows; a single teacher has the name None."""
        return {None: self}

    @cached_property
    def prefix(self) -> PrefixCache:
        """The cache of contexts' keys and values; off until `share_contexts`."""
        return PrefixCache("never")

    @property
    def reader(self) -> Reader | None:
        """The model that sees the context, if it is not the student's."""
        if self.config is None:
            return None
        key = f"{self.key}.init_args.model"
        return Reader(f"{key}.name", self.config.name, context_window(self.config, key))

    def check(self, run: "Run") -> None:  # noqa: B027
        """Raise a UserError for a run that does not work with this teacher, before a model is loaded."""

    @property
    def idle_weights(self) -> list[Tensor]:
        """The weights in this process that only `score` and `generate` use."""
        return []

    def share_contexts(self, mode: Mode, memory_mib: int) -> None:
        """Give each of the `parts` a prefix cache, with `memory_mib` MiB together."""
        for part in self.parts.values():
            part.prefix = PrefixCache(mode, memory_mib // len(self.parts))

    @abstractmethod
    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Prepare on `device`; called once, before the first step."""

    def end_ids(self, student: Student) -> set[int]:
        """Token ids that end a response of this teacher, after `setup`; empty if unknown."""
        return set()

    def sync_weights(self, student: Student) -> None:  # noqa: B027
        """Copy what this teacher needs of the student's weights; all ranks call this at the start of a step."""

    def session(self, trajectories: Trajectories) -> AbstractContextManager[None]:
        """Within, `score` is called with parts of these trajectories, which are all of the step's.

        A remote teacher prefetches all scores here.

        Raises:
            StepAbandoned: the remote teacher does not answer.
        """
        return nullcontext()

    @abstractmethod
    def score(self, trajectories: Trajectories, max_tokens: int) -> TeacherOutput:
        """Score all response tokens in row order, without gradient: p_T(. | c, x, y<t), or what the teacher `provides`.

        `max_tokens` is the most of one forward pass of a model.
        """

    def generate(self, batch: Batch, sampling: Sampling, eos_ids: set[int], pad_id: int) -> list[Tensor]:
        """Generate responses to the prompts with the context: B tensors [R].

        Raises:
            UserError: this teacher cannot generate.
        """
        raise UserError(
            f"model.rollout: {type(self).__name__} scores responses and writes none; use StudentRollout, or "
            "RecordedRollout, which takes the responses of the data"
        )

    def on_student_step(self, student: Student) -> None:  # noqa: B027
        """Follow the student after its weights have changed."""

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint; empty if it can be loaded again."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore a state of `state_dict`; called after `setup`."""


class ModelTeacher(Teacher):
    """A teacher with a model in this process; `setup` sets `_model`, or `model` is overridden."""

    _model: PreTrainedModel | None = None

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """Whether its weights are whole, as generation needs them."""
        return not self.shard

    @property
    def model(self) -> PreTrainedModel:
        """The model that scores, available after `setup`."""
        assert self._model is not None, "setup() comes first"
        return self._model

    def end_ids(self, student: Student) -> set[int]:
        """Those of its own generation config and tokenizer, if it is another model than the student."""
        if self.config is None:
            return student.eos_ids
        return end_ids(self.model, load_tokenizer(self.config, f"{self.key}.init_args.model"))

    @torch.no_grad()
    def score(self, trajectories: Trajectories, max_tokens: int) -> HiddenStates:
        """HiddenStates of p_T(. | c, x, y<t) for all response tokens, in row order, without gradient.

        Rows behind a cached prefix are packed; the others run in full, in groups of at most `max_tokens` with padding.
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
        return HiddenStates(torch.cat([hidden[number] for number in range(len(rows))]), head_of(self.model))

    def generate(self, batch: Batch, sampling: Sampling, eos_ids: set[int], pad_id: int) -> list[Tensor]:
        """Generate responses to the prompts with the context: B tensors [R]."""
        prefixes = self.prefix.encoded(self.model, batch.teacher_prefixes, batch.teacher_prompts)
        return generate(self.model, batch.teacher_prompts, sampling, eos_ids, pad_id, prefixes)
