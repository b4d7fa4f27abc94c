"""What the terminal shows while a stage runs."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from tercet.runtime.launch import rank

FIRST = rank() == 0  # of the processes that torchrun started: the one that speaks
_ROOMY = 110  # columns
console = Console(stderr=True, highlight=False, quiet=not FIRST)


class Bar:
    """A progress bar with figures beside it; silent on every rank but the first."""

    def __init__(self, title: str, total: int, *, done: int = 0, silent: bool = False):
        drawn = (
            (BarColumn(bar_width=24), TimeElapsedColumn()) if console.width >= _ROOMY else ()
        )  # else rich would cut the figures
        self._progress = Progress(
            TextColumn("[bold]{task.description:<10}"),
            *drawn,
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}", table_column=Column()),  # what may go on in a second line
            console=console,
            disable=silent,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, figures="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, **figures: float) -> None:
        shown = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        self._progress.update(self._task, advance=1, figures=shown)

    def advance_by(self, count: int) -> None:
        self._progress.update(self._task, advance=count)
