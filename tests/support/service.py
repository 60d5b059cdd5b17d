"""One process of ours, to be killed, paused and waited for."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ClassVar, NamedTuple, TypeVar

from support import fork_server
from support.ports import port_of

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60

T = TypeVar("T")


class Started(NamedTuple):
    """A process that has begun: `ended` gives its exit status, negative for a signal."""

    pid: int
    ended: Coroutine[Any, Any, int]
    stderr: asyncio.StreamReader


async def fresh(module: str, env: dict[str, str]) -> Started:
    """Run `python -m MODULE`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    return Started(process.pid, process.wait(), process.stderr)


class ForkServer:
    """Runs modules as `fresh` does, by fork from a process that has imported them; it is started at the first."""

    def __init__(self) -> None:
        self._orders: socket.socket | None = None
        self._process: subprocess.Popen[bytes]

    async def forked(self, module: str, env: dict[str, str]) -> Started:
        """Run `module` in a fork."""
        stderr, child_stderr = os.pipe()
        status, child_status = os.pipe()
        order = fork_server.Order(module, os.getcwd(), env)
        fork_server.send(self._orders or self._start(), order, child_stderr, child_status)
        os.close(child_stderr)
        os.close(child_status)
        lines = await _reader(status)
        pid = int(await lines.readline())

        async def ended() -> int:
            return int(await lines.read())

        return Started(pid, ended(), await _reader(stderr))

    def stop(self) -> None:
        """End it and all that it has started."""
        if self._orders is not None:
            self._orders.close()
            self._process.wait(STOP_TIMEOUT_S)

    def _start(self) -> socket.socket:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                # -P: the folder of the test that comes first is no place to import from.
                [sys.executable, "-P", "-m", fork_server.__name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for pytest alone
            )
        return self._orders


async def _reader(fd: int) -> asyncio.StreamReader:
    """What comes from a pipe, which is closed at its end."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
    )
    return reader


class Service:
    """A process with its log lines kept; `id` is the name that it has on NATS, once it is known there."""

    starter: ClassVar[Callable[[str, dict[str, str]], Awaitable[Started]]] = staticmethod(fresh)
    """How all are started: what is measured is started afresh, what is tested by a ForkServer."""

    def __init__(self, module: str, env: dict[str, str]) -> None:
        self._module = module
        self.env = env
        self._lines_changed = asyncio.Condition()
        self.log: deque[str] = deque(maxlen=10_000)
        self.id = ""
        self.pid = 0
        self.returncode: int | None = None
        self._life: asyncio.Future[Any]

    async def launch(self) -> None:
        """Start without waiting until it is of use."""
        started = await self.starter(self._module, self.env)
        self.pid = started.pid
        self._life = asyncio.gather(self._await_end(started), self._read(started.stderr))

    async def unless_it_ends(self, awaited: Awaitable[T], timeout_s: float = START_TIMEOUT_S) -> T:
        """The result of `awaited`; AssertionError with the log if the process ends before."""
        wanted = asyncio.ensure_future(awaited)
        try:
            await asyncio.wait({wanted, self._life}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if wanted.done():
                return wanted.result()
            how = "runs on" if self.returncode is None else f"ended with {self.returncode}"
            raise AssertionError(f"{self._module} {how}:\n" + "\n".join(self.log))
        finally:
            wanted.cancel()

    async def logged(self, pattern: str | re.Pattern[str], timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """Wait for a log line, one that is there already included. Only for tests of what is logged."""
        compiled = re.compile(pattern)

        def found() -> re.Match[str] | None:
            return next((match for line in self.log if (match := compiled.search(line))), None)

        async def line() -> re.Match[str]:
            async with self._lines_changed:
                return await self._lines_changed.wait_for(found)  # type: ignore[return-value]

        try:
            return await self.unless_it_ends(line(), timeout_s)
        except AssertionError:
            if match := found():  # one of its last
                return match
            raise

    async def whole_log(self) -> list[str]:
        """All its lines: it is stopped first, since the newest wait a moment before they are written."""
        await self.stop()
        return list(self.log)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process; nothing happens if it has ended."""
        assert self.pid  # 0 would be all of ours
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    async def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.signal(signal.SIGTERM)
        return await self.ended()

    async def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)
        await self.ended()

    async def ended(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for its end; its exit status, negative for a signal."""
        async with asyncio.timeout(timeout_s):
            await asyncio.shield(self._life)
        assert self.returncode is not None
        return self.returncode

    async def _await_end(self, started: Started) -> None:
        self.returncode = await started.ended

    async def _read(self, stderr: asyncio.StreamReader) -> None:
        # As many lines at a time as have come: one by one they would cost as much as the service itself under load.
        rest = b""
        while piece := await stderr.read(2**16):
            *lines, rest = (rest + piece).split(b"\n")
            if lines:
                async with self._lines_changed:
                    self.log.extend(line.decode(errors="replace").rstrip() for line in lines)
                    self._lines_changed.notify_all()
        self.log.extend([rest.decode(errors="replace").rstrip()] if rest else [])


class Api(Service):
    """An api process."""

    def __init__(self, env: dict[str, str]) -> None:
        self.port = int(env["API_PORT"]) or port_of(self)
        super().__init__("forebay_api", env | {"API_PORT": str(self.port)})

    @property
    def url(self) -> str:
        """Its base address, without /v1."""
        return f"http://127.0.0.1:{self.port}"


class Worker(Service):
    """A worker process; it tells of itself over HTTP if METRICS_PORT is set, where 0 means a free one."""

    def __init__(self, env: dict[str, str]) -> None:
        self.port: int | None = None
        if (port := env.get("METRICS_PORT")) is not None:
            self.port = int(port) or port_of(self)
            env = env | {"METRICS_PORT": str(self.port)}
        super().__init__("forebay_inference", env)

    @property
    def url(self) -> str:
        """The base address of its /metrics and /health."""
        assert self.port is not None, "METRICS_PORT is not set"
        return f"http://127.0.0.1:{self.port}"
