"""The teacher of each row where there are several, their models, and the check that vocabularies agree."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from opcd.data.example import Example
from opcd.models import ModelConfig
from opcd.runtime.did_you_mean import or_all
from opcd.runtime.errors import UserError


@dataclass
class TeacherModels:
    """The models of several teachers (`opcd.modules.RoutedTeachers`), by the names that rows use."""

    models: dict[str, ModelConfig | None]
    """null: no model of its own; the student's tokenizer encodes its prompts."""
    default: str | None = None
    """The teacher of rows that name none; null: such rows are an error."""

    def teacher_of(self, example: Example) -> str:
        """The name of a row's teacher.

        Raises:
            UserError: the row names none and there is no default, or names an unknown one.
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
    """The config key of the teacher, or of the one with this name among several."""
    return "model.teacher" if name is None else f"model.teacher.init_args.teachers.{name}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Words for a message: the name that was probably meant, or all names."""
    return or_all(name, names).removeprefix("; ")


def with_teachers(examples: list[Example], teachers: TeacherModels | None) -> list[Example]:
    """The examples, each with the name of its teacher if there are several.

    Raises:
        UserError: a row names an unknown teacher, none without a default, or one although there is only one.
    """
    if teachers is not None:
        return [replace(example, teacher=teachers.teacher_of(example)) for example in examples]
    for example in examples:
        if example.teacher is not None:
            raise UserError(
                f"{example.source}: teacher {example.teacher!r} has no effect, because model.teacher is a single one; "
                "remove the column, or set model.teacher to RoutedTeachers"
            )
    return examples


def check_same_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, key: str = "model.teacher.init_args.model"
) -> None:
    """Check that two tokenizers agree on every token and id that both have: the divergence compares tokens by id.

    One may have more tokens than the other. `key` is the teacher's config key, for messages.

    Raises:
        UserError: names two of the tokens that differ, and their ids.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    names = {number: token for token, number in theirs.items()}
    clashes = [
        (token, number)
        for token, number in ours.items()
        if theirs.get(token, number) != number or names.get(number, token) != token
    ]
    if not clashes:
        return
    shown = "; ".join(
        f"{token!r} is {number} for the student, {theirs.get(token, 'absent')} for the teacher, whose {number} is "
        f"{names.get(number, 'absent')!r}"
        for token, number in sorted(clashes, key=lambda clash: clash[1])[:2]
    )
    raise UserError(
        f"student and teacher differ in {len(clashes)} tokens of their vocabularies ({shown}): "
        f"choose model.student.name and {key}.name from one family"
    )
