"""The longest prompts of a split, for the check that the models' windows hold them."""

from collections import defaultdict
from collections.abc import Mapping

from opcd.data.contexts import ContextSource
from opcd.data.example import Example
from opcd.data.views import Views

# Tokens that a context may add to one prompt and not to another: a default system message that it replaces, merges
# where context and query meet.
SLACK = 64


def longest_prompts(
    examples: list[Example], contexts: ContextSource, views: Mapping[str | None, Views]
) -> tuple[int, dict[str | None, int]]:
    """Tokens of the longest student prompt, and of each teacher's longest, whichever contexts are drawn (0: no row)."""
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
    """The longest teacher prompt, found without encoding a long context once a row: only the longest rows matter."""
    context = max(contexts, key=lambda text: len(views.context_ids(text))) if len(contexts) > 1 else contexts[0]
    longest, added = 0, 0
    for length, example in sorted(students, key=lambda pair: pair[0], reverse=True):
        if length + added + SLACK <= longest:
            break
        prompt = len(views.teacher_prompt(example, context))
        longest, added = max(longest, prompt), prompt - length
    return longest
