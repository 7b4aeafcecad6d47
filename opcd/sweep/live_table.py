"""The live table of a sweep: on a terminal one that rewrites itself, elsewhere a line for what changes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from opcd.results.run_files import clock
from opcd.runtime.output import Screen, plain

if TYPE_CHECKING:
    from opcd.sweep.job_engine import Task

COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "not run": "yellow", "waiting": "dim"}


class LiveTable:
    """Shows tasks while they run.

    Args:
        tasks: name -> task; read anew at every update.
        console: where to; the standard output if null.
    """

    def __init__(self, tasks: dict[str, Task], console: Console | None = None) -> None:
        self.tasks, self.console = tasks, console or Screen()
        self._live: Live | None = None
        self._shown: dict[str, str] = {}

    def __enter__(self) -> LiveTable:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self) -> None:
        """Show what is so now."""
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
            return
        for name, task in self.tasks.items():
            if self._shown.get(name, "waiting") != task.status:
                self._shown[name] = task.status
                before = " before" if task.before else ""
                took = f" in {clock(task.seconds)}" if task.status in ("finished", "failed") else ""
                self.console.print(
                    f"{name}: {task.status}{before}{took}", markup=False, highlight=False, soft_wrap=True
                )

    def table(self) -> Table:
        """What runs and what failed first, for a screen that cannot hold all."""
        rows = list(self.tasks.items())
        rows.sort(key=lambda item: {"running": 0, "failed": 1}.get(item[1].status, 2))
        counts: Counter[str] = Counter(task.status for task in self.tasks.values())
        table = Table(title=", ".join(f"{counts[status]} {status}" for status in COLOURS if counts[status]))
        for column in ("job", "status", "time", "last line of its log"):
            table.add_column(column, no_wrap=column != "job", overflow="ellipsis" if column != "job" else "fold")
        for name, task in rows:
            last = task.folder.last_lines(1) if task.status in ("running", "failed") else []
            status = f"[{COLOURS[task.status]}]{task.status}{' before' if task.before else ''}[/]"
            table.add_row(plain(name), status, clock(task.seconds), plain(last[0][:120]) if last else "")
        return table
