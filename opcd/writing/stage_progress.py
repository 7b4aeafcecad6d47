"""The progress of a stage: a bar on a terminal, one line elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.progress import MofNCompleteColumn, Progress

from opcd.runtime.output import Screen


@contextmanager
def progress(stage: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show the progress of a stage; the block gets a function to call with the number of further conversations.

    Args:
        stage: the stage's name.
        total: the number of its conversations.
        done: how many of them an earlier run has finished.
    """
    console = Screen()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield partial(bars.advance, bars.add_task(stage, total=total, completed=done))
    if not console.is_terminal:
        print(f"{stage}: {total} done", flush=True)
