"""Rollouts: who writes the responses that the student learns on."""

from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import ClassVar, Literal, TypeVar

import torch
from transformers import PreTrainedModel

from opcd.accel.cpu.onednn_linear import packed_linears
from opcd.accel.precision import fast_dtype, warn_if_emulated
from opcd.data import Batch, ContextQueryDataModule, Example
from opcd.modules.distributed.sharding import fill
from opcd.modules.lm.generation import Sampling, generate
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import UserError

Value = TypeVar("Value")


def rollout_dtype(name: str) -> torch.dtype | None:
    """The type of the weights that generate; None for auto. ValueError for any other name."""
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be auto, bfloat16, float16 or float32, got {name!r}")
    return None if name == "auto" else getattr(torch, name)


class Rollout(ABC):
    """Writes one response to each example of a batch, in their order.

    Attributes:
        several_turns: whether it may write more than one to an example (a game's moves).
        teacher_writes: whether the teacher is asked to respond.
        max_importance: where tokens count as much as the student's probability of them is that of the policy which
            wrote them, the most that one counts; None: all count the same.
    """

    several_turns: ClassVar[bool] = False
    teacher_writes: ClassVar[bool] = False
    max_importance: float | None = None

    @property
    def parts(self) -> "list[Rollout]":
        """Those that write; one that holds no others is its own."""
        return [self]

    @abstractmethod
    def longest_response(self, data: ContextQueryDataModule, split: str) -> int:
        """Most tokens that a prompt of the split gets added. UserError where a row lacks what the rollout needs."""

    @abstractmethod
    def synchronise(self, student: Student) -> None:
        """Take over the student's weights of this step; comes before `sample`."""

    @abstractmethod
    def sample(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Responses as data: token ids without gradient."""

    def release(self) -> None:  # noqa: B027
        """Give back what only `sample` needs; `synchronise` comes before the next one."""


class StudentRollout(Rollout):
    """On-policy: y ~ p_S(. | x), the student answers without the context.

    Args:
        sampling: how tokens are drawn.
        dtype: type of the weights that generate; auto: bfloat16 where the device has instructions for it, else float32.
            Where it differs from the student's, or these are sharded, `synchronise` fills a copy from the master
            weights; its memory is given back after the rollout.
    """

    def __init__(
        self,
        sampling: Sampling = Sampling(),  # noqa: B008
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    ) -> None:
        self.sampling = sampling
        self.dtype = rollout_dtype(dtype)
        self._copy: PreTrainedModel | None = None
        self._packed = ExitStack()

    def longest_response(self, data: ContextQueryDataModule, split: str) -> int:
        """As many as are sampled at most."""
        return self.sampling.max_new_tokens

    @torch.inference_mode(mode=False)  # validation may come first, and its tensors could never be written again
    @torch.no_grad()
    def synchronise(self, student: Student) -> None:
        """Overwrite the copy, where one is needed."""
        master = student.model
        if not self._needs_copy(student):
            return
        if getattr(master, "is_quantized", False):
            raise UserError(
                f"model.rollout: a quantized student computes in {str(master.dtype)[6:]}; leave the rollout's dtype out"
            )
        dtype = self._dtype(student)
        if self._copy is None or self._copy.device != master.device:
            self._copy = student.blank_copy(dtype)
        self._packed.close()  # of a rollout that was not given back
        for parameter in self._copy.parameters():
            parameter.untyped_storage().resize_(parameter.nbytes)
        fill(self._copy, master)
        self._packed.enter_context(packed_linears(self._copy, dtype, self.sampling.max_new_tokens, consume=True))

    def sample(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Generate with the student of this step."""
        model = self._copy if self._needs_copy(student) else student.model
        assert model is not None, "synchronise() comes first"
        responses = generate(model, batch.student_prompts, self.sampling, student.eos_ids, student.pad_id)
        return Trajectories.of(batch, responses, student.eos_ids)

    def release(self) -> None:
        """The memory of the copy's weights goes to the gradients that follow."""
        self._packed.close()
        for parameter in self._copy.parameters() if self._copy else ():
            parameter.untyped_storage().resize_(0)

    def _needs_copy(self, student: Student) -> bool:
        return student.is_sharded or student.model.dtype != self._dtype(student)

    def _dtype(self, student: Student) -> torch.dtype:
        """The configured type; auto: what the hardware computes fastest in, of a quantized student its own."""
        device = student.model.device
        if self.dtype is None:
            return student.model.dtype if getattr(student.model, "is_quantized", False) else fast_dtype(device)
        warn_if_emulated("model.rollout's dtype", self.dtype, device)
        return self.dtype


class TeacherRollout(Rollout):
    """Off-policy, as in plain context distillation: y ~ p_T(. | c, x), the teacher answers with the context.

    Args:
        sampling: how tokens are drawn.
    """

    teacher_writes: ClassVar[bool] = True

    def __init__(self, sampling: Sampling = Sampling()) -> None:  # noqa: B008
        self.sampling = sampling

    def longest_response(self, data: ContextQueryDataModule, split: str) -> int:
        """As many as are sampled at most."""
        return self.sampling.max_new_tokens

    def synchronise(self, student: Student) -> None:
        """Nothing to take over: the teacher writes."""

    def sample(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Generate with the teacher, from the prompts with the context."""
        responses = teacher.respond(batch, self.sampling, student.eos_ids, student.pad_id)
        return Trajectories.of(batch, responses, student.eos_ids)


class RecordedRollout(Rollout):
    """Responses from the data: the `response` (or `completion`) of every example."""

    def longest_response(self, data: ContextQueryDataModule, split: str) -> int:
        """The longest of the data; every row must have one."""
        return max(len(data.views.response_ids(_recorded(e, e.response))) for e in data.examples(split))

    def synchronise(self, student: Student) -> None:
        """Nothing to take over: nobody writes."""

    def sample(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """The responses of the batch."""
        responses = [_recorded(e, response) for e, response in zip(batch.examples, batch.responses, strict=True)]
        return Trajectories.of(batch, responses, student.eos_ids)


class MixedRollout(Rollout):
    """One of several rollouts writes, drawn with given shares (the lambda of GKD, arXiv:2306.13649).

    Args:
        rollouts: at least two rollouts.
        shares: probability of each, in the same order; they sum to 1.
        draw: row: for each example alone, so that a batch holds responses of several. batch: once for all examples of a
            batch, as GKD does; a step then has the decode passes of one rollout, not of each.
    """

    def __init__(self, rollouts: list[Rollout], shares: list[float], draw: Literal["row", "batch"] = "row") -> None:
        if len(rollouts) < 2 or len(rollouts) != len(shares):
            raise ValueError(f"MixedRollout wants two or more rollouts and a share for each, got {len(shares)} shares")
        if any(rollout.several_turns for rollout in rollouts):
            raise ValueError("MixedRollout wants one response a row: put it inside the GameRollout, not around it")
        if any(rollout.max_importance is not None for rollout in rollouts):
            raise ValueError("MixedRollout: a rollout's max_importance has no effect inside it; leave it out")
        if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares must be positive and sum to 1, got {shares}")
        if draw not in ("row", "batch"):
            raise ValueError(f"MixedRollout: draw must be row or batch, got {draw!r}")
        self.rollouts, self.shares, self.draw = rollouts, shares, draw

    @property
    def parts(self) -> list[Rollout]:
        """Those of all."""
        return [part for rollout in self.rollouts for part in rollout.parts]

    def longest_response(self, data: ContextQueryDataModule, split: str) -> int:
        """The longest of all: any row may go to any rollout."""
        return max(rollout.longest_response(data, split) for rollout in self.rollouts)

    def synchronise(self, student: Student) -> None:
        """All of them, whichever is drawn."""
        for rollout in self.rollouts:
            rollout.synchronise(student)

    def release(self) -> None:
        """All of them."""
        for rollout in self.rollouts:
            rollout.release()

    def sample(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Draw a rollout for each row, or for the batch; the rows keep their order."""
        draws = len(batch) if self.draw == "row" else 1
        drawn = torch.multinomial(torch.tensor(self.shares), draws, replacement=True).tolist()
        drawn *= len(batch) // draws
        parts: list[Trajectories] = []
        order: list[int] = []
        for number, rollout in enumerate(self.rollouts):
            rows = [row for row, choice in enumerate(drawn) if choice == number]
            if rows:
                parts.append(rollout.sample(student, teacher, batch.select(rows)))
                order += rows
        return Trajectories.joined(parts).select([order.index(row) for row in range(len(batch))])


def _recorded(example: Example, response: Value | None) -> Value:
    """The response of a row, which must have one."""
    if response is None:
        raise UserError(
            f"{example.source}: no `response`, but model.rollout is RecordedRollout; "
            "add one to every row, or let StudentRollout or TeacherRollout write it"
        )
    return response
