"""Length budgets: what happens to contexts and queries with too many tokens. Nothing is cut or dropped in silence."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info

from opcd.data.example import Example
from opcd.data.views import Views
from opcd.runtime.errors import UserError

OverlongContext = Literal["raise", "drop", "cut_left", "cut_right"]
OverlongQuery = Literal["raise", "drop"]


@dataclass(frozen=True)
class LengthBudgets:
    """Most tokens of a context's own text and of a student's prompt, and the policy for what is longer.

    Raises:
        UserError: a policy without its budget, or a budget below one token.
    """

    max_context_tokens: int | None = None
    overlong_context: OverlongContext = "raise"
    max_query_tokens: int | None = None
    overlong_query: OverlongQuery = "raise"

    def __post_init__(self) -> None:
        for limit, policy, name in (
            (self.max_context_tokens, self.overlong_context, "context"),
            (self.max_query_tokens, self.overlong_query, "query"),
        ):
            if limit is None and policy != "raise":
                raise UserError(f"data.overlong_{name}: {policy} has no effect without data.max_{name}_tokens; set it")
            if limit is not None and limit < 1:
                raise UserError(f"data.max_{name}_tokens must be at least 1, not {limit}")

    def limit_contexts(self, contexts: list[str], views: Views) -> list[str]:
        """The contexts of the data set that fit, cut where the policy says so.

        Raises:
            UserError: one is too long, or all were dropped.
        """
        counts: Counter[str] = Counter()
        limited = [
            self._limit_context(context, f"data.context, context {number}", views, counts)
            for number, context in enumerate(contexts, start=1)
        ]
        kept = [context for context in limited if context is not None]
        _report(counts, "data.context", len(kept))
        return kept

    def limit_examples(self, examples: list[Example], views: Views, key: str) -> list[Example]:
        """The examples whose own context and query fit, the contexts cut where the policy says so.

        Raises:
            UserError: one is too long, or all were dropped.
        """
        counts: Counter[str] = Counter()
        kept = []
        for example in examples:
            if example.context is not None:
                context = self._limit_context(example.context, example.source, views, counts)
                if context is None:
                    continue
                example = replace(example, context=context)
            if self._query_fits(example, views, counts):
                kept.append(example)
        _report(counts, key, len(kept))
        return kept

    def _limit_context(self, context: str, where: str, views: Views, counts: Counter[str]) -> str | None:
        """The context, cut if need be; None: dropped."""
        limit, policy = self.max_context_tokens, self.overlong_context
        if limit is None:
            return context
        length = len(views.context_ids(context))
        if length <= limit:
            return context
        if policy == "raise":
            raise UserError(
                f"{where}: the context has {length} tokens, data.max_context_tokens allows {limit}; "
                "raise it, or set data.overlong_context"
            )
        if policy == "drop":
            counts[f"dropped {{}} with a context over {limit} tokens"] += 1
            return None
        shorter = _cut(context, limit, policy, views)
        counts[f"cut {{}} tokens in all ({policy}) from contexts over {limit} tokens"] += length - len(
            views.context_ids(shorter)
        )
        return shorter

    def _query_fits(self, example: Example, views: Views, counts: Counter[str]) -> bool:
        limit = self.max_query_tokens
        if limit is None:
            return True
        length = len(views.student_prompt(example))
        if length > limit and self.overlong_query == "raise":
            raise UserError(
                f"{example.source}: the student's prompt has {length} tokens, data.max_query_tokens allows {limit}; "
                "raise it, or set data.overlong_query"
            )
        counts[f"dropped {{}} with a student's prompt over {limit} tokens"] += length > limit
        return length <= limit


def _cut(context: str, limit: int, policy: OverlongContext, views: Views) -> str:
    """The last (cut_left) or first (cut_right) tokens of a context."""
    ids = views.context_ids(context)
    for keep in range(limit, 0, -1):
        text = views.context_text(ids[-keep:] if policy == "cut_left" else ids[:keep])
        text = text.strip("\N{REPLACEMENT CHARACTER}")  # a cut inside one character leaves bytes that spell none
        # Text that was cut can split into more tokens than it was cut from.
        if text.strip() and len(views.context_ids(text)) <= limit:
            return text
    raise UserError(f"data.max_context_tokens: {limit} leaves no text of a context; raise it")


def _report(counts: Counter[str], key: str, kept: int) -> None:
    for message, count in counts.items():
        if count:
            rank_zero_info(f"{key}: {message.format(count)}; {kept} remain")
    if counts and not kept:
        raise UserError(f"{key}: nothing is left after the length budgets (data.max_context_tokens, max_query_tokens)")
