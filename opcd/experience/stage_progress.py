"""How far a stage is: a bar on a terminal, one line elsewhere."""

from types import TracebackType

from rich.progress import MofNCompleteColumn
from rich.progress import Progress as Bars

from opcd.runtime.output import Screen


class Progress:
    """The progress of a stage.

    Args:
        stage: its name.
        total: conversations that it takes.
        done: how many of them a former run has left.
    """

    def __init__(self, stage: str, total: int, done: int = 0) -> None:
        console = Screen()
        self.stage, self.total = stage, total
        self._plain = not console.is_terminal
        columns = (*Bars.get_default_columns(), MofNCompleteColumn())
        self._bars = Bars(*columns, console=console, disable=self._plain)
        self._bar = self._bars.add_task(stage, total=total, completed=done)

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if kind is None and self._plain:
            print(f"{self.stage}: {self.total} done", flush=True)

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._bars.advance(self._bar, count)
