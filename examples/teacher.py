"""A teacher in one file: the student as it was some steps ago.

    opcd fit --config configs/quickstart.yaml \\
        --model.teacher '{class_path: examples.teacher.SnapshotTeacher, init_args: {every_n_steps: 20}}'
"""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from opcd.models import ModelConfig
from opcd.modules import ModelTeacher, Student


class SnapshotTeacher(ModelTeacher):
    """A copy of the student, renewed every few optimizer steps: between FrozenTeacher and SelfTeacher.

    Args:
        every_n_steps: how long a copy teaches, at least 1.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps, self.steps = every_n_steps, 0
        self._model: PreTrainedModel | None = None

    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Copy the student as it begins."""
        self._model = copy.deepcopy(student.model).to(device)  # type: ignore[arg-type]

    @property
    def model(self) -> PreTrainedModel:
        """The copy; there after `setup`."""
        assert self._model is not None, "setup() comes first"
        return self._model

    def on_student_step(self, student: Student) -> None:
        """Renew the copy where its time is over."""
        self.steps += 1
        if self.steps % self.every_n_steps == 0:
            self.model.load_state_dict(student.model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The copy and its age: a run that goes on takes the steps of one that was not stopped."""
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.steps = state["steps"]
