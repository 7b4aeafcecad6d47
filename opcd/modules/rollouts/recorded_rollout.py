"""Responses that were written before: of the data, of a record, or of the student some steps ago."""

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from opcd.data import Batch, ContextQueryDataModule, Example
from opcd.data.batch import Row
from opcd.data.example import ANCHORS
from opcd.modules.rollouts.base import Rollout, Writer
from opcd.modules.rollouts.student_rollout import StudentRollout
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.teachers.record_folder import Record, prompt_hash, read_origin
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import UserError

if TYPE_CHECKING:
    from opcd.modules.validation import Run

FOLDER = "model.rollout's folder"
Value = TypeVar("Value")


class RecordedRollout(Rollout):
    """Recorded responses: the `response` (or `completion`) of every example, or those of a record (`opcd record`).

    With `refresh_every_n_steps`, responses of the student are replayed too: off-policy between refreshes, at a fraction
    of the cost of StudentRollout (arXiv:2610.11291). A query that comes twice between two refreshes has one response.

    Args:
        folder: of a record, whose responses are taken in place of the data's; anchors keep those of their rows.
        refresh_every_n_steps: drop all responses at every n-th training step. Then, and at the start for rows without a
            recorded response, the current student writes a response when its row comes, which is replayed until the
            next refresh. Held-out responses are always written anew. null: only recorded responses.
        rollout: writes for the student, StudentRollout or VLLMRollout; StudentRollout if null. It needs
            refresh_every_n_steps.
    """

    writer: ClassVar[Writer] = "data"

    def __init__(
        self, folder: str | None = None, refresh_every_n_steps: int | None = None, rollout: Rollout | None = None
    ) -> None:
        if refresh_every_n_steps is None and rollout is not None:
            raise ValueError("RecordedRollout: rollout has no effect without refresh_every_n_steps; set that too")
        if refresh_every_n_steps is not None and refresh_every_n_steps < 1:
            raise ValueError(f"refresh_every_n_steps must be at least 1, got {refresh_every_n_steps}")
        self.record = None if folder is None else Path(folder)
        self.every, self.rollout = refresh_every_n_steps or 0, rollout
        if refresh_every_n_steps is not None:
            self.rollout = rollout or StudentRollout()
            _check_writer(self.rollout)
        self._steps = 0
        self._written: dict[str, Tensor] = {}  # by the student's prompt, since the last refresh

    @property
    def parts(self) -> list[Rollout]:
        return [self] if self.rollout is None else [self, *self.rollout.parts]

    @cached_property
    def _record(self) -> Record:
        assert self.record is not None
        return Record(self.record, FOLDER)

    def check(self, run: "Run") -> None:
        """Raise a UserError if there is no record, or if the responses that refreshes replay could not be used."""
        if self.record is not None:
            read_origin(self.record, FOLDER)
        if self.rollout is None:
            return
        key = "model.rollout's refresh_every_n_steps"
        if run.ranks > 1:
            raise UserError(
                f"{key} is for one rank, because rows change their rank in every epoch and their responses do not; "
                "remove it, or use StudentRollout"
            )
        if run.data is None or run.stage != "fit" or self.record is not None:
            return
        rows, size = run.data.examples("train"), run.data.batch_size
        if self.every * size <= len(rows) and all(example.response is None for example in rows):
            raise UserError(
                f"{key}: {self.every} steps of {size} rows are no more than one pass over data.train ({len(rows)} "
                "rows), so that hardly any response would be used twice; take several passes, such as "
                f"{3 * -(-len(rows) // size)}, or use StudentRollout"
            )

    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        """The longest response; of a record, the most that its sampling allows (UserError if a row has none)."""
        if self.rollout is None:
            return self._longest(data, split)
        live = self.rollout.max_response_tokens(data, split)
        return max(live, self._longest(data, split)) if split in ("train", ANCHORS) else live

    def _longest(self, data: ContextQueryDataModule, split: str) -> int:
        """The longest recorded response."""
        if self.record is not None and split != ANCHORS:
            return int(read_origin(self.record, FOLDER).sampling["max_new_tokens"])
        rows = [example for example in data.examples(split) if self.rollout is None or example.response is not None]
        return max((len(data.views.response_ids(_required(e, e.response))) for e in rows), default=0)

    def active(self, student: Student) -> AbstractContextManager[None]:
        """Count the training step, and drop the student's responses if a refresh is due."""
        if self.rollout is None:
            return nullcontext()
        if not student.training:
            return self.rollout.active(student)
        if self._steps % self.every == 0:
            self._written.clear()
        self._steps += 1
        return nullcontext()  # the student's weights are copied only if a response is missing

    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        if self.rollout is None:
            responses = [_required(row.example, self._recorded(row)) for row in batch.rows]
            return Trajectories.of(batch, responses, student.eos_ids)
        if not student.training:
            return self.rollout.generate(student, teacher, batch)
        begun = self._steps <= self.every  # no refresh yet
        found = [self._recorded(row) if begun else None for row in batch.rows]
        rest = [number for number, response in enumerate(found) if response is None]
        if rest:
            replayed = self._replayed(self.rollout, student, teacher, batch.select(rest))
            found = [replayed.pop(0) if response is None else response for response in found]
        return Trajectories.of(batch, [response for response in found if response is not None], student.eos_ids)

    def _recorded(self, row: Row) -> Tensor | None:
        if self.record is None or row.example.teacher == ANCHORS:
            return row.response
        return self._record.draw(row.teacher_prompt)

    def _replayed(self, rollout: Rollout, student: Student, teacher: Teacher, batch: Batch) -> list[Tensor]:
        """The student's responses since the last refresh; it writes those that are missing."""
        keys = [prompt_hash(prompt) for prompt in batch.student_prompts]
        missing = {key: number for number, key in enumerate(keys) if key not in self._written}
        if missing:
            with rollout.active(student):
                written = rollout.generate(student, teacher, batch.select(list(missing.values()))).responses
            self._written |= zip(missing, (response.cpu() for response in written), strict=True)
        return [self._written[key] for key in keys]

    def state_dict(self) -> dict[str, Any]:
        return {} if self.rollout is None else {"steps": self._steps, "written": dict(self._written)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._steps, self._written = int(state["steps"]), dict(state["written"])


def _check_writer(rollout: Rollout) -> None:
    """Raise a ValueError for a rollout whose responses cannot be replayed by the student's prompt."""
    if any(part.writer != "student" for part in rollout.parts) or rollout.multi_turn:
        raise ValueError(
            f"RecordedRollout: {type(rollout).__name__} cannot write the responses that refresh_every_n_steps replays; "
            "use StudentRollout or VLLMRollout"
        )
    if rollout.importance_clip is not None:
        raise ValueError("RecordedRollout: a rollout's importance_clip has no effect inside it; leave it out")


def _required(example: Example, response: Value | None) -> Value:
    """The response of a row, which must have one."""
    if response is None:
        raise UserError(
            f"{example.source}: no `response`, but model.rollout is RecordedRollout; "
            "add one to every row, or let StudentRollout or TeacherRollout write it"
        )
    return response
