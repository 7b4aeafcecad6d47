"""What a teacher is: it writes responses under the context, and says what it thinks of those of others."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opcd.data import Batch, teacher_key
from opcd.losses.divergences import Known
from opcd.models import ModelConfig, context_window
from opcd.modules.lm.generation import Sampling, eval_mode, generate, own_precision
from opcd.modules.lm.hidden_states import HiddenStates, TeacherOutput, head_of, last_hidden
from opcd.modules.prefix.prefix_cache import Mode, PrefixCache
from opcd.modules.student import Student
from opcd.modules.trajectories import Trajectories, length_groups
from opcd.runtime.errors import UserError

if TYPE_CHECKING:
    from opcd.modules.validation import Run


@dataclass
class Reader:
    """Who reads a prompt.

    Attributes:
        key: its config key.
        name: the model's.
        window: most tokens of a prompt and its response; None where that is not known.
    """

    key: str
    name: str
    window: int | None


class Teacher(ABC):
    """Sees the context. Never trained: no gradient, and no parameter of the LightningModule.

    A step uses it in this order: `sync_weights`, then within one `session` as many calls of `score` as there are
    micro-batches, then `on_student_step`.

    Attributes:
        provides: what is known of it at a position: its distribution, its likeliest tokens (topk), the sampled token.
        frozen: whether its weights never change in a run. What is computed with others is kept for one step.
        stands_alone: whether `setup` needs no student, so that it can be recorded without one.
        config: the model that it loads; None: none of its own, or the student's.
        key: its config key, for messages.
        shard: whether the ranks hold its weights in parts, and must score as often as one another.
        writes: whether `generate` is implemented.
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
        """The teachers that score rows, by the names that rows give them; one that is alone has none."""
        return {None: self}

    @property
    def prefix(self) -> PrefixCache:
        """Keys and values of contexts; `share_contexts` makes room for them."""
        found: PrefixCache = vars(self).setdefault("_prefix", PrefixCache("never"))
        return found

    @prefix.setter
    def prefix(self, cache: PrefixCache) -> None:
        vars(self)["_prefix"] = cache

    @property
    def reader(self) -> Reader | None:
        """The model that sees the context, where it is not the student's."""
        if self.config is None:
            return None
        key = f"{self.key}.init_args.model"
        return Reader(f"{key}.name", self.config.name, context_window(self.config, key))

    def check(self, run: "Run") -> None:  # noqa: B027
        """Refuse a run that this teacher cannot serve, before a model is loaded (UserError)."""

    @property
    def idle_weights(self) -> list[Tensor]:
        """Weights in this process that only `score` and `generate` read."""
        return []

    def share_contexts(self, mode: Mode, memory_mib: int) -> None:
        """Let each of them keep keys and values, in `memory_mib` MiB together."""
        for part in self.parts.values():
            part.prefix = PrefixCache(mode, memory_mib // len(self.parts))

    @abstractmethod
    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Get ready on `device`, once, before the first step."""

    def sync_weights(self, student: Student) -> None:  # noqa: B027
        """Take over what this teacher needs of the student's weights; all ranks call it at the start of a step."""

    def session(self, trajectories: Trajectories) -> AbstractContextManager[None]:
        """The time in which `score` is asked for parts of these trajectories, the whole step's.

        A teacher that is far away prefetches all scores here.

        Raises:
            StepAbandoned: there is no answer.
        """
        return nullcontext()

    @abstractmethod
    def score(self, trajectories: Trajectories, max_tokens: int) -> TeacherOutput:
        """Score all response tokens, in row order, without gradient: p_T(. | c, x, y<t), or what is known of it.

        `max_tokens` is the most of one forward pass of a model.
        """

    def generate(self, batch: Batch, sampling: Sampling, eos_ids: set[int], pad_id: int) -> list[Tensor]:
        """Responses to the prompts that hold the context: B tensors [R].

        Raises:
            UserError: this teacher writes none.
        """
        raise UserError(
            f"model.rollout: {type(self).__name__} scores responses and writes none; use StudentRollout, or "
            "RecordedRollout, which takes those of the data"
        )

    def on_student_step(self, student: Student) -> None:  # noqa: B027
        """Follow the student, whose weights have just changed."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold; empty for what can be loaded again."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take back what `state_dict` gave, after `setup`."""


class ModelTeacher(Teacher):
    """A teacher that is a model at hand."""

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """Whether its weights are whole, as generation needs them."""
        return not self.shard

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The model that scores; there after `setup`."""

    @torch.no_grad()
    def score(self, trajectories: Trajectories, max_tokens: int) -> HiddenStates:
        """HiddenStates of p_T(. | c, x, y<t) for all response tokens, in row order, without gradient.

        Rows whose context is in the prefix cache come packed; the others, whole, in groups of at most `max_tokens` with
        their padding.
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

    @torch.no_grad()
    def generate(self, batch: Batch, sampling: Sampling, eos_ids: set[int], pad_id: int) -> list[Tensor]:
        """Responses to the prompts that hold the context: B tensors [R]."""
        with eval_mode(self.model), own_precision(self.model):
            prefixes = self.prefix.encoded(self.model, batch.teacher_prefixes, batch.teacher_prompts)
        return generate(self.model, batch.teacher_prompts, sampling, eos_ids, pad_id, prefixes)
