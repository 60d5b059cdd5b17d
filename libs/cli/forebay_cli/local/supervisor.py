"""Child processes: starts them, reads their output, names the one that dies and ends them in order; restarts none."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from forebay_contracts.wire.errors import ForebayError

LAST_LINES = 20
"""Lines of a child that are kept, to be printed when it dies."""

MAX_LINE_BYTES = 16_384
MAX_LOG_BYTES = 16 * 1024 * 1024

_LINE_END = re.compile(rb"[\r\n]+")
_LEVEL = re.compile(
    rb"^(?:\S+ \S+ (DEBUG|INFO|WARNING|ERROR|CRITICAL)\b"  # LOG_FORMAT=text
    rb'|\{.*?"level": ?"(\w+)"'  # LOG_FORMAT=json
    rb"|\[\d+\] \S+ \S+ \[(TRC|DBG|INF|WRN|ERR|FTL)\])"  # nats-server
)
_SHOWN = {b"WARNING", b"ERROR", b"CRITICAL", b"WRN", b"ERR", b"FTL"}


Show = Callable[[str, str], None]
"""Prints a child's name and one of its lines."""


class ChildDied(ForebayError):
    """A child ended unasked."""


class LogFile:
    """A log file of bounded size, empty at first: once full, it becomes `NAME.1` and a new one starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append. What a full disk refuses is dropped: otherwise nobody would read on, and the process would block."""
        with contextlib.suppress(OSError):
            if self._size + len(data) > MAX_LOG_BYTES:
                self.path.replace(self.path.with_name(self.path.name + ".1"))
                full, self._file = self._file, self.path.open("wb", buffering=0)
                full.close()
                self._size = 0
            self._file.write(data)
            self._size += len(data)

    def close(self) -> None:
        """Close; nothing more can be written."""
        self._file.close()


@dataclass(eq=False)
class Child:
    """A running process. All its lines go to `log`; warnings and errors go to `show` too, with `verbose` all lines.

    One that `may_leave` has not died when it exits by itself with code 0.
    """

    name: str
    process: asyncio.subprocess.Process
    output: asyncio.StreamReader
    log: LogFile
    show: Show
    verbose: bool
    may_leave: bool

    def __post_init__(self) -> None:
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self.ending = self.killed = False
        self._showing = False
        self._awaited: dict[bytes, asyncio.Event] = {}
        self.ended: asyncio.Task[int] = asyncio.create_task(self._wait())
        """Its exit code, once it and all that it has started are gone and its last line is read."""

    async def said(self, text: bytes) -> None:
        """Wait for a line that contains `text`."""
        await self._awaited.setdefault(text, asyncio.Event()).wait()

    def signal(self, number: signal.Signals) -> None:
        """Signal the process alone: it ends its own children."""
        self.ending = True
        if self.process.returncode is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the process and everything that it started."""
        self.ending = self.killed = True
        self._kill_group()

    async def _wait(self) -> int:
        listening = asyncio.create_task(self._listen())
        code = await self.process.wait()
        # Processes that it leaves behind would hold ports and files, and keep its output open.
        self._kill_group()
        await listening
        return code

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    async def _listen(self) -> None:
        rest = b""
        while data := await self.output.read(65_536):
            self.log.write(data)
            *lines, rest = _LINE_END.split(rest + data)
            for line in lines:
                self._line(line)
            if len(rest) > MAX_LINE_BYTES:
                self._line(rest[:MAX_LINE_BYTES])
                rest = b""
        self._line(rest)
        self.log.close()

    def _line(self, line: bytes) -> None:
        if found := _LEVEL.match(line):
            self._showing = self.verbose or (found[1] or found[2] or found[3]) in _SHOWN
        # A line without a level belongs to the one before it, like a traceback to its error.
        text = line.decode(errors="replace")
        if text.strip():
            self.last_lines.append(text)
            if (self._showing or self.verbose) and not self.killed:
                self.show(self.name, text)
        for awaited, event in self._awaited.items():
            if awaited in line:
                event.set()


class Supervisor:
    """Starts children, notices when one ends unasked, and ends them stage by stage, the last stage first."""

    def __init__(self, log_dir: Path, show: Show, *, verbose: bool = False) -> None:
        self._log_dir = log_dir
        self._show = show
        self._verbose = verbose
        self._stages: defaultdict[int, list[Child]] = defaultdict(list)
        self._died: list[Child] = []
        self.killed = False
        """Whether all were killed, so that no end is a fault."""
        self._one_died = asyncio.Event()

    async def start(
        self, name: str, command: Sequence[str], env: Mapping[str, str], *, stage: int, may_leave: bool = False
    ) -> Child:
        """Start `command`, whose first part is a path, as a child of `stage`."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log = LogFile(self._log_dir / f"{name.replace(' ', '-')}.log")
        output, write_end = await _pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "forebay_contracts.parent_death", str(os.getpid()), *command],
                env=dict(env),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                # Ctrl-C signals the whole process group of a terminal, and the supervisor must end children in order.
                # The child also leads a group of its own, by which its own children can be killed.
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        child = Child(name, process, output, log, self._show, self._verbose, may_leave)
        self._stages[stage].append(child)
        child.ended.add_done_callback(lambda _: self._on_end(child))
        return child

    def _on_end(self, child: Child) -> None:
        if child.ending or child.ended.cancelled():
            return
        if child.may_leave and child.ended.exception() is None and child.ended.result() == 0:
            self._show(child.name, "has drained and exited; the others go on")
            return
        self._died.append(child)
        self._one_died.set()

    async def failure(self) -> None:
        """Wait until a child ends unasked.

        Raises:
            ChildDied: always; it names the child, its exit code and its last log lines.
        """
        await self._one_died.wait()
        raise ChildDied(_obituary(self._died[0], self._died[0].ended.result()))

    async def drain(self, patience_s: Callable[[Child], float]) -> list[str]:
        """End all stages, the last first, by SIGTERM, and after `patience_s` by SIGKILL; a sentence for each fault."""
        faults: list[str] = []
        for _, children in sorted(self._stages.items(), reverse=True):
            ends = await asyncio.gather(*(_end(child, patience_s) for child in children))
            faults += filter(None, ends)
        return faults

    def kill(self) -> None:
        """Kill all children."""
        self.killed = True
        for _, children in sorted(self._stages.items(), reverse=True):
            for child in children:
                child.kill()


async def _pipe() -> tuple[asyncio.StreamReader, int]:
    """A reader, and the descriptor that writes to it.

    With asyncio's own pipes, `wait` returns only once the output is closed, by the children of the process too.
    """
    reading, writing = os.pipe()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(reading, "rb", buffering=0))
    return reader, writing


async def _end(child: Child, patience_s: Callable[[Child], float]) -> str | None:
    if child.ended.done():
        return None
    child.signal(signal.SIGTERM)
    done, _ = await asyncio.wait([child.ended], timeout=patience_s(child))
    if not done:
        child.kill()
        await child.ended
        return f"{child.name} did not end within {patience_s(child):g} s and was killed"
    if child.killed:
        return None
    code = child.ended.result()
    # SIGTERM itself ends a process that has no handler yet.
    return None if code in (0, -signal.SIGTERM) else _obituary(child, code)


def _obituary(child: Child, code: int) -> str:
    how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    lines = "".join(f"\n    {line}" for line in child.last_lines) or " (none)"
    return f"{child.name} ended with {how}; its last lines (all of them: {child.log.path}):{lines}"
