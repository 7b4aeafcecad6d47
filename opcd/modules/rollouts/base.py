"""The interface of a rollout, which writes the responses that the student is trained on."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
    """The type of the generating weights; None for auto (ValueError for an unknown name)."""
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be auto, bfloat16, float16 or float32, got {name!r}")
    return None if name == "auto" else getattr(torch, name)


class Rollout(ABC):
    """Writes one response to each example of a batch, in their order.

    Attributes:
        writer: who writes every token: student (draws from its own distribution, up to stale weights and rounding),
            teacher, data, or other.
        multi_turn: whether it may write more than one response to an example (a game's moves).
        asks_teacher: whether it calls the teacher's `generate`.
        importance_clip: the largest importance weight p_S(y) / p_B(y) of a token, where p_B is the policy that wrote
            it; None: all tokens have the same weight.
        sampling: how tokens are drawn; None if they are not.
        stale: whether the generating weights may be older than this step's.
        rows_at_a_time: most responses that it generates side by side; None: all, or what fits into a GPU.
        record: the folder of the record (`opcd record`) that it takes the responses of; None: of no record.
    """

    writer: ClassVar[Writer] = "other"
    multi_turn: ClassVar[bool] = False
    asks_teacher: ClassVar[bool] = False
    importance_clip: float | None = None
    sampling: Sampling | None = None
    stale: bool = False
    rows_at_a_time: int | None = None
    record: Path | None = None

    @property
    def parts(self) -> "list[Rollout]":
        """The rollouts that write: this one, unless it combines others."""
        return [self]

    @property
    def engines(self) -> "list[Engine]":
        """The inference engines that it uses."""
        return []

    def check(self, run: "Run") -> None:  # noqa: B027
        """Raise a UserError for a run that does not work with this rollout, before a model is loaded."""

    @abstractmethod
    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        """The most response tokens for a prompt of the split (UserError if a row lacks what the rollout needs)."""

    def active(self, student: Student) -> AbstractContextManager[None]:
        """Within, `generate` is called: it uses the student's weights of this step, which are freed afterwards."""
        return nullcontext()

    @abstractmethod
    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Write the responses: token ids without gradient."""

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank, without which a resumed run would go on differently; empty if there is none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore a state of `state_dict`."""
