"""What a person sees: progress and log lines on stderr, results on stdout."""

import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

REPEAT_AFTER_S = 10.0
"""Where there is no terminal, a progress that differs in its numbers alone is printed again after so long."""

PIPE_WIDTH = 240

# Where stdout is no terminal, a table must not be cut to the width of one.
stdout = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


class Progress:
    """One line that says what is waited for: redrawn on a terminal, printed when it changes elsewhere."""

    def __init__(self) -> None:
        self._status: Status | None = Status("", console=stderr) if stderr.is_terminal else None
        self._printed = ("", 0.0)

    def show(self, text: str) -> None:
        """`text` is the state now."""
        if self._status is not None:
            self._status.update(escape(text))
            self._status.start()
            return
        # A percentage that counts up is one line every ten seconds, not a hundred lines.
        kind, (printed, at) = re.sub(r"[\d.]+", "#", text), self._printed
        if kind != printed or time.monotonic() - at >= REPEAT_AFTER_S:
            self._printed = (kind, time.monotonic())
            say(text)

    def stop(self) -> None:
        """Take the line away."""
        if self._status is not None:
            self._status.stop()


def say(text: str) -> None:
    """A line on stderr, for people."""
    stderr.print(text, markup=False)


def say_of_child(child: str, line: str) -> None:
    """A log line of a child process."""
    stderr.print(f"{child}: {line}", markup=False)


def fail(text: str) -> None:
    """An error, as one sentence on stderr."""
    stderr.print(f"forebay: {text}", markup=False, style="red" if stderr.is_terminal else None)


def print_json(value: Any, *, one_line: bool = False) -> None:
    """`value` on stdout, for programs."""
    stdout.out(json.dumps(value, indent=None if one_line else 2, ensure_ascii=False))


LONG_COLUMNS = {"model", "progress", "error", "subjects", "found", "fix"}
"""Columns that give way where a terminal is narrow; the others are never cut."""

LONG_MIN_WIDTH = 10


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table of `rows`; an empty cell for None."""
    looks: Any = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "pad_edge": False}
    made = Table(title=title, show_header=any(columns), padding=(0, 1, 0, 0), **looks)
    for column in columns:
        gives_way = column in LONG_COLUMNS
        made.add_column(column, no_wrap=not gives_way, overflow="fold", min_width=LONG_MIN_WIDTH if gives_way else None)
    for row in rows:
        made.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    return made


def print_table(made: Table) -> None:
    """A table on stdout."""
    stdout.print(made, soft_wrap=False)
