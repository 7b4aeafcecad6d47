"""Several teachers in one run: each row has one of them (multi-teacher distillation without averaging)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from opcd.data import Batch, TeacherModels, nearest, teacher_key
from opcd.data.example import ANCHORS
from opcd.models import ModelConfig
from opcd.modules.lm.generation import Sampling
from opcd.modules.lm.hidden_states import Routed
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories


class RoutedTeachers(Teacher):
    """Several teachers, one for each row: the one named by the row's `teacher` or by its data set.

    They may be of any kind and size, each with its own chat template; all share the student's tokenizer. With
    TeacherRollout, each row's response is written by its own teacher.

    Args:
        teachers: by name.
        default: the teacher of rows that name none; null: such rows are an error.
    """

    def __init__(self, teachers: dict[str, Teacher], default: str | None = None) -> None:
        _check(teachers, default)
        self.teachers, self.default = teachers, default
        for name, teacher in teachers.items():
            teacher.key = teacher_key(name)

    @property
    def parts(self) -> dict[str | None, Teacher]:
        return dict(self.teachers.items())

    @property
    def _each(self) -> list[Teacher]:
        """The teachers, each once: one may have two names (`AnchoredTeachers`)."""
        return list(dict.fromkeys(self.teachers.values()))

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """Whether all of them do."""
        return all(teacher.writes for teacher in self.teachers.values())

    @property
    def models(self) -> TeacherModels:
        """The models of the teachers, for the `teacher` of a ContextQueryDataModule."""
        return TeacherModels({name: teacher.config for name, teacher in self.teachers.items()}, self.default)

    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        for teacher in self._each:
            teacher.setup(student, student_config, device)

    def sync_weights(self, student: Student) -> None:
        for teacher in self._each:
            teacher.sync_weights(student)

    @contextmanager
    def session(self, trajectories: Trajectories) -> Iterator[None]:
        """Enter the session of each teacher with its own rows."""
        with ExitStack() as sessions:
            for name, rows in _by_name(trajectories.teachers).items():
                sessions.enter_context(self.teachers[name].session(trajectories.select(rows)))
            yield

    def score(self, trajectories: Trajectories, max_tokens: int) -> Routed:
        parts = {}
        for name, rows in _by_name(trajectories.teachers).items():
            parts[name] = rows, self.teachers[name].score(trajectories.select(rows), max_tokens)
        return Routed(parts)

    def generate(self, batch: Batch, sampling: Sampling, eos_ids: set[int], pad_id: int) -> list[Tensor]:
        written: dict[int, Tensor] = {}
        for name, rows in _by_name([example.teacher for example in batch.examples]).items():
            responses = self.teachers[name].generate(batch.select(rows), sampling, eos_ids, pad_id)
            written.update(zip(rows, responses, strict=True))
        return [written[row] for row in range(len(batch))]

    def on_student_step(self, student: Student) -> None:
        for teacher in self._each:
            teacher.on_student_step(student)

    def state_dict(self) -> dict[str, Any]:
        return {name: state for name, teacher in self.teachers.items() if (state := teacher.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, own in state.items():
            self.teachers[name].load_state_dict(own)

    @property
    def idle_weights(self) -> list[Tensor]:
        return [weight for teacher in self._each for weight in teacher.idle_weights]


def _by_name(names: Sequence[str | None]) -> dict[Any, list[int]]:
    """The row numbers of each teacher, in their order."""
    rows = defaultdict(list)
    for row, name in enumerate(names):
        rows[name].append(row)
    return rows


def _check(teachers: dict[str, Teacher], default: str | None) -> None:
    """Raise a ValueError for teachers that cannot be routed."""
    if not teachers:
        raise ValueError(
            "model.teacher: RoutedTeachers needs teachers: a mapping from the names in the rows to teachers"
        )
    if ANCHORS in teachers:
        raise ValueError(f"{teacher_key(ANCHORS)}: the teacher of data.anchors has this name; choose another")
    for name, teacher in teachers.items():
        if teacher.parts.keys() != {None}:
            raise ValueError(f"{teacher_key(name)} is itself RoutedTeachers; move its teachers one level up")
    if len({teacher.provides for teacher in teachers.values()}) > 1:
        least = min(teachers.values(), key=lambda teacher: "distribution" in teacher.provides)
        raise ValueError(
            f"model.teacher: {type(least).__name__} cannot be combined with other teacher types: it provides "
            f"{' and '.join(least.provides)} log-probabilities only"
        )
    if default is not None and default not in teachers:
        raise ValueError(f"model.teacher.init_args.default: no teacher {default!r}; {nearest(default, teachers)}")
