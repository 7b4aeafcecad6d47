"""The teacher of a run with anchors: the student as it was before training takes their rows."""

from typing import Any

from opcd.data.example import ANCHORS
from opcd.models import ModelConfig
from opcd.modules.teachers.base import Teacher
from opcd.modules.teachers.model_teachers import BaseTeacher, FrozenTeacher
from opcd.modules.teachers.routed_teachers import RoutedTeachers


class AnchoredTeachers(RoutedTeachers):
    """A run's teacher (or teachers), and beside them the one of the anchors (`data.anchors`), which have no context."""

    def __init__(self, teacher: Teacher, start: Teacher) -> None:
        self.teachers: dict[Any, Teacher] = {**teacher.parts, ANCHORS: start}
        self.default = None


def with_anchors(teacher: Teacher, student: ModelConfig, adapted: bool) -> AnchoredTeachers:
    """The teacher with one for anchors: the student's start, without more memory where it is there already.

    It is the base under an adapter; else a frozen teacher of the student's own model; else a frozen copy.
    """
    if adapted:
        return AnchoredTeachers(teacher, BaseTeacher())
    there = (
        part
        for part in teacher.parts.values()
        if part.frozen and part.stands_alone and part.config in (None, student) and not part.shard
    )
    return AnchoredTeachers(teacher, next(there, None) or FrozenTeacher())
