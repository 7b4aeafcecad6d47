"""A teacher out of a record: nothing of it is in memory but what it said."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opcd.data import Batch
from opcd.losses import Divergence, RecordedTopK, SampledReverseKL, TopK
from opcd.models import ModelConfig
from opcd.modules.lm.generation import Sampling
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.teachers.record_folder import Record, read_origin, tokenizer_hash
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import UserError


class RecordedTeacher(Teacher):
    """Responses and likeliest tokens that `opcd record` has written, for off-policy distillation (TeacherRollout).

    Where a prompt has several responses, one is drawn each time. The loss is a TopK of the teacher's support.

    Args:
        folder: of the record.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    @property
    def _folder_key(self) -> str:
        return f"{self.key}.init_args.folder"

    def check(self, loss: Divergence | SampledReverseKL, temperature: float, sampling: Sampling) -> None:
        """Refuse a run that the record does not serve, before a model is loaded.

        Raises:
            UserError: there is no record, or it was made for another loss, temperature or sampling.
        """
        origin = read_origin(self.folder, self._folder_key)
        if not isinstance(loss, TopK):
            raise UserError(f"model.loss: a record holds {origin.k} tokens a position; use TopK with support: teacher")
        try:
            loss.check_record(origin.k)
        except ValueError as error:
            raise UserError(f"model.loss: {error}") from error
        if temperature != origin.temperature:
            raise UserError(
                f"model.temperature is {temperature}, but {self.folder} was recorded at {origin.temperature}"
            )

        if vars(sampling) != origin.sampling:
            raise UserError(f"model.rollout: its sampling must be the record's, {origin.sampling}; nothing is drawn")

    def prepare(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Read and verify the record. UserError where it is damaged or has another tokenizer."""
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

    def respond(self, batch: Batch, sampling: Sampling, eos_ids: set[int], pad_id: int) -> list[Tensor]:
        """A recorded response a prompt, drawn where there are several; `check` has compared the sampling."""
        chosen = []
        for prompt in batch.teacher_prompts:
            responses = self._record.responses(prompt)
            chosen.append(responses[int(torch.randint(len(responses), ()))].to(prompt.device))
        return chosen

    def after_step(self, student: Student) -> None:
        """Nothing to follow."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the record is elsewhere."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""
