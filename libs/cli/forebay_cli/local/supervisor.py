"""Child processes: started, listened to, named when they die, ended in order. None is ever restarted."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from forebay_contracts.wire.errors import ForebayError

LAST_LINES = 20
"""Lines of a child that are kept for the case that it dies."""

MAX_LINE_BYTES = 16_384
MAX_LOG_BYTES = 16 * 1024 * 1024

_LINE_END = re.compile(rb"[\r\n]+")
_LEVEL = re.compile(
    rb"^(?:\S+ \S+ (DEBUG|INFO|WARNING|ERROR|CRITICAL)\b"  # LOG_FORMAT=text
    rb'|\{.*?"level": ?"(\w+)"'  # LOG_FORMAT=json
    rb"|\[\d+\] \S+ \S+ \[(TRC|DBG|INF|WRN|ERR|FTL)\])"  # nats-server
)
_SHOWN = {b"WARNING", b"ERROR", b"CRITICAL", b"WRN", b"ERR", b"FTL"}


class ChildDied(ForebayError):
    """A child ended that nobody had asked to end."""


class Show(Protocol):
    """Takes a line of a child for the console."""

    def __call__(self, child: str, line: str) -> None:
        """Show `line` of `child`."""
        ...


class LogFile:
    """A log file, empty at first and of bounded size: full, it becomes `NAME.1` and a new one is begun."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append."""
        if self._size + len(data) > MAX_LOG_BYTES:
            self._file.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            self._file = self.path.open("wb", buffering=0)
            self._size = 0
        self._file.write(data)
        self._size += len(data)

    def close(self) -> None:
        """Close; nothing more can be written."""
        self._file.close()


class Child:
    """A running process. All its lines go to its log file, warnings and errors to the console too."""

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        output: asyncio.StreamReader,
        log: LogFile,
        show: Show,
        *,
        verbose: bool,
        may_leave: bool,
    ) -> None:
        self.name = name
        self.may_leave = may_leave
        self.log_path = log.path
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self.ending = False
        self._process = process
        self._output = output
        self._log = log
        self._show = show
        self._verbose = verbose
        self._showing = False
        self._awaited: dict[bytes, asyncio.Event] = {}
        self.ended: asyncio.Task[int] = asyncio.create_task(self._wait())
        """Its exit code, once it and all that it has started are gone and its last line is read."""

    async def said(self, text: bytes) -> None:
        """Return when a line holds `text`, from now on."""
        await self._awaited.setdefault(text, asyncio.Event()).wait()

    def signal(self, number: signal.Signals) -> None:
        """Signal the process alone: it knows how to end its own children."""
        self.ending = True
        if self._process.returncode is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End the process and everything that it started, at once."""
        self.ending = True
        self._kill_group()

    async def _wait(self) -> int:
        listening = asyncio.create_task(self._listen())
        code = await self._process.wait()
        # What it leaves behind would hold ports and files, and its output open.
        self._kill_group()
        await listening
        return code

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _listen(self) -> None:
        rest = b""
        while data := await self._output.read(65_536):
            self._log.write(data)
            *lines, rest = _LINE_END.split(rest + data)
            for line in lines:
                self._line(line)
            if len(rest) > MAX_LINE_BYTES:
                self._line(rest[:MAX_LINE_BYTES])
                rest = b""
        self._line(rest)
        self._log.close()

    def _line(self, line: bytes) -> None:
        if found := _LEVEL.match(line):
            self._showing = self._verbose or (found[1] or found[2] or found[3]) in _SHOWN
        # A line without a level of its own goes on with the one before it: a traceback after its error.
        text = line.decode(errors="replace")
        if text.strip():
            self.last_lines.append(text)
            if self._showing or self._verbose:
                self._show(self.name, text)
        for awaited, event in self._awaited.items():
            if awaited in line:
                event.set()


class Supervisor:
    """Starts children and notices when one ends unasked; ends them stage by stage, the last stage first."""

    def __init__(self, log_dir: Path, show: Show, *, verbose: bool = False) -> None:
        self._log_dir = log_dir
        self._show = show
        self._verbose = verbose
        self._stages: list[list[Child]] = []
        self._started = asyncio.Event()

    async def start(
        self, name: str, command: Sequence[str], env: Mapping[str, str], *, stage: int, may_leave: bool = False
    ) -> Child:
        """Start `command`, whose first part is a path, as a child that is ended with those of its `stage`.

        One that `may_leave` has not died when it ends by itself with exit code 0: it was told to by somebody else.
        """
        self._log_dir.mkdir(parents=True, exist_ok=True)
        log = LogFile(self._log_dir / f"{name.replace(' ', '-')}.log")
        output, its_end = await _pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "forebay_cli.local.tied", str(os.getpid()), *command],
                env=dict(env),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=its_end,
                stderr=its_end,
                # Ctrl-C in a terminal reaches its whole process group: it is for us, who end children in order.
                # It also makes the child the leader of a group in which its own children are found.
                start_new_session=True,
            )
        finally:
            os.close(its_end)
        child = Child(name, process, output, log, self._show, verbose=self._verbose, may_leave=may_leave)
        while len(self._stages) <= stage:
            self._stages.append([])
        self._stages[stage].append(child)
        self._started.set()
        return child

    async def failure(self) -> None:
        """Wait until a child ends unasked.

        Raises:
            ChildDied: always; it names the child, its exit code and its last log lines.
        """
        while True:
            self._started.clear()
            news = asyncio.create_task(self._started.wait())
            present = [child.ended for child in self._children() if not (child.ending and child.ended.done())]
            try:
                await asyncio.wait([news, *present], return_when="FIRST_COMPLETED")
            finally:
                news.cancel()
            for child in self._children():
                if child.ended.done() and not child.ending:
                    if child.may_leave and child.ended.result() == 0:
                        child.ending = True
                        self._show(child.name, "has drained and left; the others go on")
                        continue
                    raise ChildDied(_obituary(child, child.ended.result()))

    async def drain(self, patience_s: Callable[[Child], float]) -> list[str]:
        """End all stages, the last first: SIGTERM, then SIGKILL after `patience_s`; a sentence for each fault."""
        faults: list[str] = []
        for stage in reversed(self._stages):
            faults += [fault for fault in await asyncio.gather(*(_end(child, patience_s) for child in stage)) if fault]
        return faults

    def kill(self) -> None:
        """End all children at once."""
        for child in self._children():
            child.kill()

    def _children(self) -> list[Child]:
        return [child for stage in self._stages for child in stage]


async def _pipe() -> tuple[asyncio.StreamReader, int]:
    """A pipe to read from, and the descriptor to write to.

    Not asyncio's own pipes of a process: with them an exit is only seen once its output is closed, by its
    children too.
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
    code = child.ended.result()
    # A process that has not yet taken charge of its signals ends by SIGTERM itself.
    if code in (0, -signal.SIGTERM):
        return None
    return _obituary(child, code)


def _obituary(child: Child, code: int) -> str:
    how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    lines = "".join(f"\n    {line}" for line in child.last_lines) or " (none)"
    return f"{child.name} ended with {how}; its last lines (all of them: {child.log_path}):{lines}"
