"""What the terminal shows while a stage runs."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tercet.runtime.launch import rank

FIRST = rank() == 0  # of the processes that torchrun started: the one that speaks
console = Console(stderr=True, highlight=False, quiet=not FIRST)


class Bar:
    """A progress bar with figures beside it; silent on every rank but the first."""

    def __init__(self, title: str, total: int, *, done: int = 0, silent: bool = False):
        self._progress = Progress(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
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
