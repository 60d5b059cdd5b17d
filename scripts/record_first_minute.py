"""Record the first minute with Forebay as an SVG of the terminal: `record_first_minute.py FILE.svg [OPTIONS OF UP]`.

It starts `forebay up` on an empty folder, so the model is fetched and converted. It runs the curl command that `up`
prints, looks with `forebay status` and ends `up` by Ctrl-C. Nothing is drawn by hand: what programs print is shown.
"""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

WIDTH: Final = 100
# The library's format fetches a font from a CDN.
FORMAT: Final = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


class Recording:
    """What a terminal shows, each line after the seconds that have passed."""

    def __init__(self) -> None:
        self.console = Console(record=True, width=WIDTH, file=io.StringIO())
        self._started = time.monotonic()
        self._shown = ""

    def show(self, line: str, style: str = "") -> None:
        """Add a line of a program's output; the seconds where they have changed."""
        seconds = f"{time.monotonic() - self._started:4.0f} s  "
        text = Text.from_ansi(line, style=style)
        for part in text.wrap(self.console, WIDTH - len(seconds)):
            self.console.print(
                Text(seconds if seconds != self._shown else " " * len(seconds), style="dim"), part, sep=""
            )
            self._shown = seconds

    def typed(self, command: str) -> None:
        """Add a command."""
        self.show(f"$ {command}", style="bold green")

    def ran(self, command: str) -> None:
        """Run `command` to its end, and add it with its output."""
        self.typed(command)
        done = subprocess.run(
            shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
        for line in done.stdout.splitlines():
            self.show(line)
        self.console.print()


def record(options: list[str]) -> Recording:
    """The whole minute. Raises CalledProcessError where a command fails, and RuntimeError where `up` does."""
    recording = Recording()
    command = ["forebay", "up", *options]
    recording.typed(shlex.join(command))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as up:
        assert up.stdout is not None
        try:
            for line in up.stdout:
                recording.show(line.rstrip())
                if found := re.match(r" +try it +curl (.*)", line):
                    break
            else:
                raise RuntimeError("forebay up did not become ready")
            recording.console.print()
            recording.ran(f"curl -sf {found[1]}")
            recording.ran("forebay status")
            recording.show("^C", style="bold green")
        finally:
            up.send_signal(signal.SIGINT)
            for line in up.stdout:
                recording.show(line.rstrip())
    return recording


def main(file: str, *options: str) -> int:
    """Write `file`; the exit status."""
    with tempfile.TemporaryDirectory(prefix="forebay-") as folder:
        os.environ |= {"DATA_DIR": folder, "COLUMNS": str(WIDTH - 8)}
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        recording = record(list(options))
    svg = recording.console.export_svg(title="The first minute", code_format=FORMAT, unique_id="first-minute")
    Path(file).write_text(svg)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
