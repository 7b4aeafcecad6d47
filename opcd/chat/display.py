"""Answers while they are written: side by side on a wide terminal, else one below the other."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from opcd.chat.chat_models import Speaker
from opcd.modules.lm.generation import Sampling
from opcd.runtime.output import plain, shown

NARROW = 80
"""Columns of a terminal that is too narrow for answers side by side."""


def show_answers(
    console: Console, speakers: Sequence[Speaker], question: str, sampling: Sampling, remember: bool = False
) -> None:
    """Ask one speaker after the other, and show what they say while they say it; `remember`: as turns of one talk."""
    beside = console.is_terminal and console.width >= NARROW and len(speakers) > 1
    (_beside if beside else _below)(console, speakers, question, sampling, remember)


def _beside(console: Console, speakers: Sequence[Speaker], question: str, sampling: Sampling, remember: bool) -> None:
    answers = dict.fromkeys(speakers, "")
    with Live(_table(answers), console=console, auto_refresh=False) as live:
        for speaker in speakers:

            def show(text: str, speaker: Speaker = speaker) -> None:
                """Draw the table anew."""
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
            """Add what is new; a tokenizer may take back a space, which then waits for the next word."""
            nonlocal said
            if text.startswith(said):
                console.file.write(
                    shown(text[len(said) :])
                )  # without rich, which would cut it into lines and widen its tabs
                console.file.flush()
                said = text

        show(speaker.answer(question, sampling, show, remember))
        console.file.write("\n\n")
