"""What a person sees: progress and log lines on stderr, results on stdout."""

import contextlib
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
"""Pause without a terminal until a progress is printed again if only its numbers have changed."""

PIPE_WIDTH = 240
"""Columns of a table where stdout is no terminal."""

LONG_COLUMNS = {"model": 12, "status": 10, "engine": 12, "error": 24, "subjects": 20, "found": 30, "fix": 20}
LONG_COLUMNS |= {"key": 6, "quantization": 12, "error\ntokens": 12}
"""The columns that fold on a narrow terminal, with the width that each keeps. The others are never cut."""

VALUE_MIN_WIDTH = 20
"""The width that a value beside its name keeps."""


class Messages(Console):
    """Where messages go. A command goes on when they cannot be written: its work does not depend on them."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print a message."""
        with contextlib.suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Print nothing more."""
        self.quiet = True


stdout = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
stderr = Messages(stderr=True, highlight=False, soft_wrap=True)


class Progress:
    """One line that says what the command waits for: redrawn on a terminal, else printed when it changes."""

    def __init__(self) -> None:
        spinner = "dots" if stderr.encoding.startswith("utf") else "line"
        self._status: Status | None = Status("", console=stderr, spinner=spinner) if stderr.is_terminal else None
        self._printed = ("", 0.0)

    def show(self, text: str) -> None:
        """Replace the line by `text`."""
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
        """Remove the line."""
        if self._status is not None:
            self._status.stop()


def say(text: str) -> None:
    """Print a line on stderr."""
    stderr.print(text, markup=False)


def say_server(address: str, named_by: str | None) -> None:
    """Print which server a command asks, and why this one."""
    say(f"server: {address} ({named_by or 'the usual address: nothing names another'})")


def say_of_child(child: str, line: str) -> None:
    """Print a log line of a child process on stderr."""
    say(f"{child}: {line}")


def fail(text: str) -> None:
    """Print an error on stderr."""
    stderr.print(f"forebay: {text}", markup=False, style="red" if stderr.is_terminal else None)


def print_json(value: Any, *, one_line: bool = False) -> None:
    """Print `value` on stdout as JSON, with escapes where the terminal knows no Unicode."""
    escaped = not stdout.encoding.startswith("utf")
    stdout.out(json.dumps(value, indent=None if one_line else 2, ensure_ascii=escaped))


def print_result(value: Any, text: str, *, as_json: bool) -> None:
    """Print on stdout what a command did: as JSON, or as a line for people."""
    if as_json:
        print_json(value)
    else:
        stdout.print(text, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table of `rows`; None is an empty cell."""
    return _table(title, [(column, LONG_COLUMNS.get(column)) for column in columns], rows)


def pairs(title: str, values: Mapping[str, object], across: int = 1) -> Table:
    """A table of names and their values, `across` of them side by side."""
    items = list(values.items())
    lines = [[cell for item in items[at : at + across] for cell in item] for at in range(0, len(items), across)]
    return _table(title, [("", None), ("", VALUE_MIN_WIDTH)] * across, lines)


def _table(title: str, columns: Sequence[tuple[str, int | None]], rows: Sequence[Sequence[object]]) -> Table:
    """`columns`: name, and the width that each keeps when it folds; None: it never folds."""
    looks: Any = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "pad_edge": False}
    names = [name for name, _ in columns]
    made = Table(title=title, show_header=any(names), padding=(0, 1, 0, 0), **looks)
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for number, (name, least) in enumerate(columns):
        lines = [line for row in (names, *cells) if number < len(row) for line in row[number].split("\n")]
        widest = max(map(cell_len, lines))
        width = widest if least is None else min(least, widest)
        made.add_column(name, no_wrap=least is None, overflow="fold", min_width=width)
    for row in cells:
        made.add_row(*map(escape, row))
    return made


def print_tables(*tables: Table, on: Console = stdout) -> None:
    """Print tables. A terminal that is too narrow for one wraps its lines, so that nothing is cut."""
    for made in tables:
        if needed_width(made) > on.width:
            made.padding = 0
        Console(file=on.file, highlight=False, width=max(on.width, needed_width(made))).print(made, crop=False)


def needed_width(made: Table) -> int:
    """The columns that a table takes with all that may fold folded."""
    # A column is followed by its padding and a line of the box; one more line comes before the first.
    _, right, _, left = made.padding
    return sum((column.min_width or 0) + left + right + 1 for column in made.columns) + 1
