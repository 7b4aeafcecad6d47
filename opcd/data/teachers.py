"""Which teacher each row has, where there are several, and which models they are."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from opcd.data.examples import Example
from opcd.did_you_mean import or_all
from opcd.errors import UserError
from opcd.models import ModelConfig


@dataclass
class TeacherModels:
    """The models of several teachers (`opcd.modules.RoutedTeachers`), by the names that rows give them."""

    models: dict[str, ModelConfig | None]
    """null: none of its own, it sees the context through the student's tokenizer."""
    default: str | None = None
    """The teacher of rows that name none; null refuses such rows."""

    def teacher_of(self, example: Example) -> str:
        """The name of a row's teacher.

        Raises:
            UserError: the row names none and there is no default, or names one that is not there.
        """
        name = self.default if example.teacher is None else example.teacher
        if name is None:
            raise UserError(
                f"{example.source}: no teacher: name one of {', '.join(self.models)} in the row (`teacher`), or set "
                "model.teacher.init_args.default"
            )
        if name not in self.models:
            raise UserError(f"{example.source}: no teacher {name!r} in model.teacher; {nearest(name, self.models)}")
        return name


def teacher_key(name: str | None = None) -> str:
    """The config key of a teacher: of one among several by its name."""
    return "model.teacher" if name is None else f"model.teacher.init_args.teachers.{name}"


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that was probably meant, or all of them, in words for a message."""
    return or_all(name, names).removeprefix("; ")


def with_teachers(examples: list[Example], teachers: TeacherModels | None) -> list[Example]:
    """The examples, each with the name of its teacher where there are several.

    Raises:
        UserError: a row names an unknown teacher, none without a default, or one where there is only one.
    """
    if teachers is not None:
        return [replace(example, teacher=teachers.teacher_of(example)) for example in examples]
    for example in examples:
        if example.teacher is not None:
            raise UserError(
                f"{example.source}: teacher {example.teacher!r} has no effect, for model.teacher is a single one; "
                "remove the column, or set model.teacher to RoutedTeachers"
            )
    return examples
