"""The longest prompts of a split, for the check that the models' windows hold them."""

from opcd.data.contexts import ContextSource
from opcd.data.examples import Example
from opcd.data.views import Views

# Tokens that a context may add to one prompt and not to another: a default system message that it replaces, merges
# where context and query meet.
SLACK = 64


def longest_prompts(examples: list[Example], contexts: ContextSource, views: Views) -> tuple[int, int]:
    """Tokens of the longest student prompt and of the longest teacher prompt, whichever contexts are drawn."""
    students = [(len(views.student_prompt(example)), example) for example in examples]
    teacher = max((len(views.teacher_prompt(e, e.context)) for e in examples if e.context is not None), default=0)
    shared = [pair for pair in students if pair[1].context is None]
    if shared and contexts.contexts:
        teacher = max(teacher, _longest_shared(shared, contexts, views))
    return max(length for length, _ in students), teacher


def _longest_shared(students: list[tuple[int, Example]], contexts: ContextSource, views: Views) -> int:
    """The longest teacher prompt, found without encoding a long context once a row: only the longest rows matter."""
    context = max(contexts.contexts, key=lambda text: len(views.context_ids(text)))
    longest, added = 0, 0
    for length, example in sorted(students, key=lambda pair: pair[0], reverse=True):
        if length + added + SLACK <= longest:
            break
        prompt = len(views.teacher_prompt(example, context))
        longest, added = max(longest, prompt), prompt - length
    return longest
