"""Lengths in tokens: limits of contexts and queries, and the longest prompts. Nothing is cut or dropped silently."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info

from opcd.data.contexts import ContextSource
from opcd.data.example import Example
from opcd.data.views import Views
from opcd.runtime.errors import UserError

OverlongContext = Literal["raise", "drop", "cut_left", "cut_right"]
OverlongQuery = Literal["raise", "drop"]

SLACK = 64
"""Tokens by which a context may lengthen one prompt more than another: it can replace a default system message, or
merge with the query where they meet."""


@dataclass(frozen=True)
class LengthBudgets:
    """The most tokens of a context's own text and of a student's prompt, and what happens to longer ones.

    Raises:
        UserError: a policy without its limit, or a limit below one token.
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
        """The contexts of the data set that fit, cut if `overlong_context` says so.

        Raises:
            UserError: one is too long, or all were dropped.
        """
        counts: Counter[str] = Counter()
        limited = (
            self._limit_context(context, f"data.context, context {number}", views, counts)
            for number, context in enumerate(contexts, start=1)
        )
        kept = [context for context in limited if context is not None]
        _report(counts, "data.context", len(kept))
        return kept

    def limit_examples(self, examples: list[Example], views: Views, key: str) -> list[Example]:
        """The examples whose own context and query fit, their contexts cut if `overlong_context` says so.

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
        """The context, cut if need be; None if it is dropped."""
        limit, policy = self.max_context_tokens, self.overlong_context
        if limit is None or (length := len(views.context_ids(context))) <= limit:
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
        cut = length - len(views.context_ids(shorter))
        counts[f"cut {{}} tokens in all ({policy}) from contexts over {limit} tokens"] += cut
        return shorter

    def _query_fits(self, example: Example, views: Views, counts: Counter[str]) -> bool:
        limit = self.max_query_tokens
        if limit is None or (length := len(views.student_prompt(example))) <= limit:
            return True
        if self.overlong_query == "raise":
            raise UserError(
                f"{example.source}: the student's prompt has {length} tokens, data.max_query_tokens allows {limit}; "
                "raise it, or set data.overlong_query"
            )
        counts[f"dropped {{}} with a student's prompt over {limit} tokens"] += 1
        return False


def _cut(context: str, limit: int, policy: OverlongContext, views: Views) -> str:
    """The last (cut_left) or first (cut_right) tokens of a context."""
    ids = views.context_ids(context)
    for keep in range(limit, 0, -1):
        text = views.context_text(ids[-keep:] if policy == "cut_left" else ids[:keep])
        text = text.strip("\N{REPLACEMENT CHARACTER}")  # a cut inside a character leaves incomplete bytes
        # Text that was cut can have more tokens than were kept.
        if text.strip() and len(views.context_ids(text)) <= limit:
            return text
    raise UserError(f"data.max_context_tokens: {limit} leaves no text of a context; raise it")


def _report(counts: Counter[str], key: str, kept: int) -> None:
    for message, count in counts.items():
        rank_zero_info(f"{key}: {message.format(count)}; {kept} remain")
    if counts and not kept:
        raise UserError(f"{key}: nothing is left after the length limits (data.max_context_tokens, max_query_tokens)")


def longest_prompts(
    examples: list[Example], contexts: ContextSource, views: Mapping[str | None, Views]
) -> tuple[int, dict[str | None, int]]:
    """Tokens of the longest student prompt, and of each teacher's longest for any drawn context (0 without rows)."""
    students = [(len(views[example.teacher].student_prompt(example)), example) for example in examples]
    sharing = defaultdict(list)
    for length, example in students:
        sharing[example.teacher, tuple(contexts.candidates(example))].append((length, example))
    teachers = dict.fromkeys(views, 0)
    for (teacher, candidates), rows in sharing.items():
        if candidates:
            teachers[teacher] = max(teachers[teacher], _longest_shared(rows, candidates, views[teacher]))
    return max(length for length, _ in students), teachers


def _longest_shared(students: list[tuple[int, Example]], contexts: tuple[str, ...], views: Views) -> int:
    """The longest teacher prompt. Only the longest rows are encoded with the context, which may be long."""
    context = max(contexts, key=lambda text: len(views.context_ids(text))) if len(contexts) > 1 else contexts[0]
    longest, added = 0, 0
    for length, example in sorted(students, key=lambda pair: pair[0], reverse=True):
        if length + added + SLACK <= longest:
            break
        prompt = len(views.teacher_prompt(example, context))
        longest, added = max(longest, prompt), prompt - length
    return longest
