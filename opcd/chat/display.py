"""Answers while they are written: side by side on a wide terminal, else one below the other."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from opcd.chat.chat_models import Speaker
from opcd.modules.lm.generation import Sampling
from opcd.runtime.output import plain, shown

NARROW = 80
"""Fewest columns of a terminal for answers side by side."""


def show_answers(
    console: Console, speakers: Sequence[Speaker], question: str, sampling: Sampling, remember: bool = False
) -> None:
    """Ask one speaker after the other and stream the answers; `remember`: add the answers to the conversation."""
    beside = console.is_terminal and console.width >= NARROW and len(speakers) > 1
    (_beside if beside else _below)(console, speakers, question, sampling, remember)


def _beside(console: Console, speakers: Sequence[Speaker], question: str, sampling: Sampling, remember: bool) -> None:
    answers = dict.fromkeys(speakers, "")
    with Live(_table(answers), console=console, auto_refresh=False) as live:
        for speaker in speakers:

            def show(text: str, speaker: Speaker = speaker) -> None:
                answers[speaker] = text
                live.update(_table(answers), refresh=True)

            show(speaker.answer(question, sampling, show, remember))


def _table(answers: Mapping[Speaker, str]) -> Table:
    table = Table(expand=True)
    for speaker in answers:
        table.add_column(plain(speaker.title), ratio=1, overflow="fold")
    table.add_row(*map(plain, answers.values()))
    return table


def _below(console: Console, speakers: Sequence[Speaker], question: str, sampling: Sampling, remember: bool) -> None:
    for speaker in speakers:
        console.print(f"[{speaker.title}]", style="bold", markup=False, highlight=False, soft_wrap=True)
        said = ""

        def show(text: str) -> None:
            """Print the new text. A tokenizer may remove a space again; the space then comes with the next word."""
            nonlocal said
            if text.startswith(said):
                console.file.write(shown(text[len(said) :]))  # rich would break lines and expand tabs
                console.file.flush()
                said = text

        show(speaker.answer(question, sampling, show, remember))
        console.file.write("\n\n")
