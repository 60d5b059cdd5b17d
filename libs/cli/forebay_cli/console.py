"""What a person sees: progress and log lines on stderr, results on stdout."""

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
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


LONG_COLUMNS = {"model": 12, "status": 10, "engine": 12, "error": 24, "subjects": 20, "found": 30, "fix": 20}
"""Columns that give way where a terminal is narrow, down to so much; the others are never cut."""

VALUE_MIN_WIDTH = 20
"""What a value beside its name keeps."""


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table of `rows`; an empty cell for None."""
    return _table(title, [(column, LONG_COLUMNS.get(column)) for column in columns], rows)


def pairs(title: str, values: Mapping[str, object], across: int = 1) -> Table:
    """Names and their values, so many of them side by side."""
    items = list(values.items())
    lines = [[cell for item in items[at : at + across] for cell in item] for at in range(0, len(items), across)]
    return _table(title, [("", None), ("", VALUE_MIN_WIDTH)] * across, lines)


def _table(title: str, columns: Sequence[tuple[str, int | None]], rows: Sequence[Sequence[object]]) -> Table:
    """`columns` have what they keep at least; None: all."""
    looks: Any = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "pad_edge": False}
    names = [name for name, _ in columns]
    made = Table(title=title, show_header=any(names), padding=(0, 1, 0, 0), **looks)
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for number, (name, least) in enumerate(columns):
        widest = max(cell_len(row[number]) for row in (names, *cells) if number < len(row))
        width = widest if least is None else min(least, widest)
        made.add_column(name, no_wrap=least is None, overflow="fold", min_width=width)
    for row in cells:
        made.add_row(*map(escape, row))
    return made


def print_table(made: Table, on: Console = stdout) -> None:
    """A table on stdout. A terminal that is too narrow for it wraps its lines, so that nothing of it is lost."""
    # After each column come a space and a line of the box, and one before the first.
    needed = sum(column.min_width or 0 for column in made.columns) + 2 * len(made.columns) + 1
    Console(file=on.file, highlight=False, width=max(on.width, needed)).print(made, crop=False)
