"""Progress of a long step: a bar for a person at a terminal, readable lines for everybody else."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LINE_INTERVAL_S = 1.0


@contextmanager
def step_progress(label: str, report: Callable[[str], None]) -> Iterator[Callable[[float], None]]:
    """Give a function that is told how far the step is, in percent; it never goes back, and leaving makes it 100.

    `report` gets lines such as `label: 40 %`, at most one a second and the last. Where stderr is a terminal, a bar is
    drawn there as well.
    """
    last_percent, last_line_at = -1, 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=100)

        def update(percent: float) -> None:
            nonlocal last_percent, last_line_at
            whole = max(last_percent, 0, min(100, int(percent)))
            bar.update(task, completed=whole)
            now = time.monotonic()
            if whole != last_percent and (now - last_line_at >= _LINE_INTERVAL_S or whole == 100):
                last_percent, last_line_at = whole, now
                report(f"{label}: {whole} %")

        update(0)
        yield update
        update(100)
