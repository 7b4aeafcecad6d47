"""What a rollout is: it writes the responses that the student learns on."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from opcd.data import Batch, ContextQueryDataModule
from opcd.modules.lm.generation import Sampling
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories

if TYPE_CHECKING:
    from opcd.modules.rollouts.engine import Engine
    from opcd.modules.validation import Run

Writer = Literal["student", "teacher", "data", "other"]


def rollout_dtype(name: str) -> torch.dtype | None:
    """The type of the weights that generate; None for auto. ValueError for any other name."""
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be auto, bfloat16, float16 or float32, got {name!r}")
    return None if name == "auto" else getattr(torch, name)


class Rollout(ABC):
    """Writes one response to each example of a batch, in their order.

    Attributes:
        writer: who writes every token: student (draws from its own distribution, up to age and rounding), teacher,
            data, or other.
        multi_turn: whether it may write more than one response to an example (a game's moves).
        asks_teacher: whether the teacher must be able to write responses.
        importance_clip: where a token counts as much as the student's probability of it is that of the policy which
            wrote it, the most that one counts; None: all count the same.
        sampling: how tokens are drawn, where they are.
        stale: whether the weights that write may be older than this step's.
    """

    writer: ClassVar[Writer] = "other"
    multi_turn: ClassVar[bool] = False
    asks_teacher: ClassVar[bool] = False
    importance_clip: float | None = None
    sampling: Sampling | None = None
    stale: bool = False

    @property
    def parts(self) -> "list[Rollout]":
        """Those that write; one that holds no others is its own."""
        return [self]

    @property
    def engines(self) -> "list[Engine]":
        """The inference engines that write."""
        return []

    def check(self, run: "Run") -> None:  # noqa: B027
        """Refuse a run that this rollout cannot serve, before a model is loaded (UserError)."""

    @abstractmethod
    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        """Most tokens that a prompt of the split gets added. UserError where a row lacks what the rollout needs."""

    def active(self, student: Student) -> AbstractContextManager[None]:
        """The time in which `generate` is called: it has the student's weights of this step, and frees them after."""
        return nullcontext()

    @abstractmethod
    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Responses as data: token ids without gradient."""
