"""How long the prompts of a run are: from its rows, or as somebody says."""

from dataclasses import dataclass
from typing import Any

from opcd.data import ContextQueryDataModule
from opcd.data.contexts import read_contexts
from opcd.modules.validation import Run, validate
from opcd.runtime.errors import UserError


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest prompts."""

    query: int
    """Without the context."""
    context: int
    """That it adds."""
    response: int
    """Of the longest response."""
    contexts: int = 1
    """How many contexts there are."""


def read_lengths(made: Any, query: int | None, context: int | None) -> Lengths:
    """The lengths of data.train; it is not read where both are given.

    Raises:
        UserError: the rows cannot be had, or their tokenizer.
    """
    data, rollout, distiller = made.data, made.model.rollout, made.model
    try:
        if query is not None and context is not None:
            return Lengths(query, context, rollout.max_response_tokens(data, "train"))
        data.setup("fit")
        response = rollout.max_response_tokens(data, "train")
        validate(Run(distiller, data, connect=False))
    except RuntimeError as error:
        raise UserError(
            f"model.rollout: the length of what {type(rollout).__name__} gives stands in the rows of data.train; leave "
            "--query_tokens or --context_tokens out, and they are read"
        ) from error
    except UserError as error:
        raise UserError(f"{error} (no row is read where --query_tokens and --context_tokens are given)") from error
    longest = data.longest_student_prompt("train")
    taught = max(data.longest_teacher_prompt("train", name) for name in distiller.teacher.parts)
    added = max(0, taught - longest)
    return Lengths(
        longest if query is None else query, added if context is None else context, response, _number_of_contexts(data)
    )


def _number_of_contexts(data: ContextQueryDataModule) -> int:
    own = {example.context for example in data.examples("train")} - {None}
    return len(own) + (len(read_contexts(data.context)) if data.context else 0)
