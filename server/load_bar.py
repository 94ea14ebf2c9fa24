"""`LoadBar`: what the commands show while they work. Knows stages and shares, not what is done in them."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

_STEPS = 4  # lines a stage, where no bar can be drawn


class LoadBar:
    """A bar for each stage; on something that is no terminal, a line for each quarter of a stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, int] = {}  # stage -> steps printed

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is None:
            return
        if kind is None:  # stages need not say that they are done
            for task in self._tasks.values():
                self._progress.update(task, completed=1.0)
        self._progress.stop()

    def is_new(self, stage: str) -> bool:
        """Whether nothing was shown of the stage yet."""
        return stage not in self._tasks and stage not in self._lines

    def update(self, stage: str, share: float) -> None:
        """`share` of the stage is done, 0..1. May be called from any thread, one at a time."""
        if self._progress is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=1.0)
            self._progress.update(self._tasks[stage], completed=share)
            return
        step = int(share * _STEPS)
        if step > self._lines.get(stage, -1):
            self._lines[stage] = step
            self._console.print(f"{stage}: {100 * step // _STEPS} %", highlight=False, markup=False)
