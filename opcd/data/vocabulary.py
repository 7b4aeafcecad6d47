"""Student and teacher must mean the same token by the same id: the divergence compares them id by id."""

from transformers import PreTrainedTokenizerBase

from opcd.errors import UserError


def check_same_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, key: str = "model.teacher.init_args.model"
) -> None:
    """Refuse two tokenizers that disagree on a token or an id that both have. One may have more than the other.

    `key` is the teacher's config key, for messages.

    Raises:
        UserError: gives two of the tokens that differ, and their ids.
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
