"""Progress of a long step: a bar for a person at a terminal, readable lines for everybody else."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LINE_INTERVAL_S = 1.0


class StepProgress:
    """Reports how far one step is, as `label: 40 %`, at most once a second and at its end.

    `report` gets the lines. Where stderr is a terminal, a bar is drawn there as well.
    """

    def __init__(self, label: str, report: Callable[[str], None]) -> None:
        self._label = label
        self._report = report
        self._last_percent = -1
        self._last_line_at = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(self._label, total=100)
        self.update(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.update(100)
        if self._bar is not None:
            self._bar.stop()

    def update(self, percent: float) -> None:
        """The step is `percent` (0 to 100) done; it never goes back."""
        whole = max(self._last_percent, 0, min(100, int(percent)))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=whole)
        now = time.monotonic()
        due = now - self._last_line_at >= _LINE_INTERVAL_S or whole == 100
        if whole != self._last_percent and due:
            self._last_percent, self._last_line_at = whole, now
            self._report(f"{self._label}: {whole} %")
