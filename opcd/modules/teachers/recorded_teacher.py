"""A teacher whose scores were recorded: no model is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from opcd.data import Batch
from opcd.losses import RecordedTopK
from opcd.losses.divergences import Known
from opcd.models import ModelConfig
from opcd.modules.lm.generation import Sampling
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.teachers.record_folder import Record, read_origin, tokenizer_hash
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import whole

if TYPE_CHECKING:
    from opcd.modules.validation import Run


class RecordedTeacher(Teacher):
    """The teacher's likeliest tokens on recorded responses, as written by `opcd record`.

    The rollout is RecordedRollout with the same folder; of a record that the teacher wrote, TeacherRollout with the
    record's sampling takes the same. If a prompt has several responses, one is drawn each time. The loss is a TopK of
    the teacher's support.

    Args:
        folder: of the record.
    """

    provides: ClassVar[tuple[Known, ...]] = ("topk",)
    frozen: ClassVar[bool] = True

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    @property
    def _folder_key(self) -> str:
        return f"{self.key}.init_args.folder"

    def check(self, run: "Run") -> None:
        """Compare the run with the record.

        Raises:
            UserError: there is no record, or it was made for another loss, temperature or sampling; or the rollout
                takes other responses than the recorded ones.
        """
        origin = read_origin(self.folder, self._folder_key)
        loss, temperature = run.distiller.objective.loss, run.distiller.objective.temperature
        for part in run.distiller.rollout.parts:
            if part.record is not None and whole(part.record) == whole(self.folder):
                continue
            if part.writer != "teacher" or part.sampling is None or origin.student is not None:
                raise UserError(
                    f"model.rollout: RecordedTeacher can score the responses of {self.folder} only, and "
                    f"{type(part).__name__} takes others; use RecordedRollout with folder: {self.folder}, without "
                    "refresh_every_n_steps, or a teacher that scores new responses, such as FrozenTeacher"
                )
            if vars(part.sampling) != origin.sampling:
                raise UserError(
                    f"model.rollout: its sampling must be that of the record, {origin.sampling}; or use "
                    f"RecordedRollout with folder: {self.folder}"
                )
        try:
            loss.check_record(origin.k)
        except ValueError as error:
            raise UserError(f"model.loss: {error}") from error
        if temperature != origin.temperature:
            raise UserError(
                f"model.temperature is {temperature}, but {self.folder} was recorded at {origin.temperature}"
            )

    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Read and verify the record (UserError if it is damaged or has another tokenizer)."""
        self._record = Record(self.folder, self._folder_key)
        if self._record.origin.tokenizer != tokenizer_hash(student.tokenizer):
            raise UserError(
                f"{self._folder_key}: {self.folder} was recorded with another tokenizer than model.student's"
            )

    def score(self, trajectories: Trajectories, max_tokens: int) -> RecordedTopK:
        """The recorded tokens and log-probabilities of all response tokens, [N, k]."""
        rows = zip(trajectories.teacher_prompts, trajectories.responses, strict=True)
        tokens, log_probs = zip(*(self._record.top_k(*row) for row in rows), strict=True)
        device = trajectories.responses[0].device
        return RecordedTopK(torch.cat(tokens).to(device), torch.cat(log_probs).to(device))

    def generate(self, batch: Batch, sampling: Sampling, eos_ids: set[int], pad_id: int) -> list[Tensor]:
        """One recorded response per prompt, drawn if there are several; `check` has compared the sampling."""
        return [self._record.draw(prompt) for prompt in batch.teacher_prompts]
