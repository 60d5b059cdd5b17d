"""The inference server as a child process of the worker."""

import asyncio
import contextlib
import importlib.util
import logging
import os
import re
import shlex
import signal
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError

LAST_LINES: Final = 10
_MAX_LINE_BYTES: Final = 16_384
_END_S: Final = 10.0
"""Time that the server has to end by itself."""

# `0.00.001.922 W srv ...` of llama.cpp, and the names of Python's levels.
_LEVEL = re.compile(r"^[\d.]+ ([IWED]) |\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
_LEVELS: Final = {
    "W": logging.WARNING,
    "WARNING": logging.WARNING,
    "E": logging.ERROR,
    "ERROR": logging.ERROR,
    "CRITICAL": logging.ERROR,
}

log = logging.getLogger(__name__)


def require(package: str, settings: InferenceSettings) -> None:
    """Find out whether the server's `package` is here, if the worker is to start it from its own environment.

    Raises:
        ConfigurationError: it is not.
    """
    elsewhere = settings.engine_url or settings.engine_command or settings.engine_python
    if not elsewhere and importlib.util.find_spec(package) is None:
        raise ConfigurationError(
            f"INFERENCE_ENGINE={settings.inference_engine} needs the package {package} (pip install {package}), "
            "or ENGINE_PYTHON, ENGINE_COMMAND or ENGINE_URL"
        )


def filled(command: Sequence[str], values: Mapping[str, object]) -> list[str]:
    """`command` with `{port}` and the like replaced in each of its words; other braces stay."""
    return [re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), word) for word in command]


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class ServerProcess:
    """A server that `start` has started, in a session of its own. The kernel kills it when this process dies,
    and with it what it started.

    `name` goes before its log lines. Warnings and errors are logged as such, other lines at DEBUG. None shows `key`,
    which the server may have got as an argument.
    """

    def __init__(self, name: str, key: str = "") -> None:
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._name = name
        self._key = key
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._level = logging.DEBUG
        self._closing = False

    async def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start `command`, with `environment` beside this process's own."""
        self._process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "forebay_inference.engine.served.group", str(os.getpid()), *command],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        log.info("[%s] started: %s", self._name, self._without_key(shlex.join(command)))
        self._listening = asyncio.create_task(self._listen())

    @property
    def fault(self) -> str | None:
        """How it ended unasked, with its last lines; None while it runs."""
        if self._process is None or (code := self._process.returncode) is None or self._closing:
            return None
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"{self._name} ended with {how}; its last lines: " + (" | ".join(self.last_lines) or "(none)")

    async def ended(self, patience_s: float) -> None:
        """Wait until it has ended and its last line is read, for at most `patience_s`."""
        if self._listening is not None:
            await asyncio.wait([self._listening], timeout=patience_s)

    async def close(self) -> None:
        """End it by SIGTERM, and after 10 s by SIGKILL; then what it started."""
        self._closing = True
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _END_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    async def _listen(self) -> None:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        rest = b""
        while data := await process.stdout.read(65_536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._line(line)
            rest = rest[-_MAX_LINE_BYTES:]
        self._line(rest)
        await process.wait()
        if (fault := self.fault) is not None:
            log.error("%s", fault)

    def _line(self, line: bytes) -> None:
        text = self._without_key(line.decode(errors="replace").rstrip()[:_MAX_LINE_BYTES])
        if not text:
            return
        if found := _LEVEL.search(text):
            self._level = _LEVELS.get(found[1] or found[2], logging.DEBUG)
        # A line without a level belongs to the one before it, like a traceback to its error.
        self.last_lines.append(text)
        log.log(self._level, "[%s] %s", self._name, text)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text
