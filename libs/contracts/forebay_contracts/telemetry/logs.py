"""Log lines: text for people, JSON for machines. Never a key, and no prompt unless LOG_PROMPTS asks for it."""

import asyncio
import contextlib
import json
import logging
import sys
import time
from typing import Any, Final, TextIO, TypedDict, Unpack

import orjson

from forebay_contracts.settings import Settings

FLUSH_S: Final = 0.02
"""How long a line waits for others to be written with."""


class Fields(TypedDict, total=False):
    """What a line can carry besides its message: the same names in every line. Times: seconds; None is left out."""

    request_id: str
    key: str | None
    model: str
    type: str
    attempt: int
    outcome: str | None
    code: str | None
    queue_wait_s: float | None
    time_to_first_token_s: float | None
    total_s: float
    prompt_tokens: int
    completion_tokens: int


def fields(**values: Unpack[Fields]) -> dict[str, Fields]:
    """For `extra` of a log line."""
    return {"fields": values}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, then its Fields, and
    `exception` if any."""

    def __init__(self) -> None:
        super().__init__()
        self._second = -1
        self._time = ""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        if (second := int(record.created)) != self._second:
            self._second, self._time = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        line: dict[str, Any] = {
            "time": f"{self._time}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in record.__dict__.get("fields", {}).items():
            if value is not None:
                # Whole microseconds: what follows is noise. round() takes several times as long.
                line[name] = int(value * 1e6) / 1e6 if value.__class__ is float else value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line).decode()
        except TypeError:  # half a character, as the name of a file can hold one
            return json.dumps(line)


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:34:56,789 INFO    message`, in local time."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")
        self._second = -1
        self._time = ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """The record's time, made anew only when the second has changed."""
        if (second := int(record.created)) != self._second:
            self._second, self._time = second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        return f"{self._time},{int(record.msecs):03d}"


class GatheringHandler(logging.StreamHandler[TextIO]):
    """Formats and writes the lines of an event loop together, FLUSH_S after the first of them.

    Under load a system call a line would be a good part of what a request costs. Warnings, and what is said where no
    event loop runs, are written at once, with all that came before. A process that is killed takes what waits with it.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._records: list[logging.LogRecord] = []
        self._flushing: asyncio.AbstractEventLoop | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line."""
        self._records.append(record)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        if record.levelno >= logging.WARNING:
            self.flush()
        elif self._flushing is not loop:
            self._flushing = loop
            loop.call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write what has been taken."""
        self.acquire()
        try:
            records, self._records, self._flushing = self._records, [], None
            # Whoever read them may be gone, which nobody could be told of.
            with contextlib.suppress(OSError, ValueError):
                if records:
                    self.stream.write("".join(map(self._line, records)))
                self.stream.flush()
        finally:
            self.release()

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record) + self.terminator
        except Exception:  # as logging.Handler wants it: no line is worth what logs it
            self.handleError(record)
            return ""


def write_out() -> None:
    """Write all lines that wait: for those that must not be lost, whatever happens next."""
    for handler in logging.root.handlers:
        handler.flush()


def configure(settings: Settings) -> None:
    """Send all log lines to stderr, as LOG_LEVEL and LOG_FORMAT say."""
    # No line tells these, and to find them out is half of what a line costs:
    # https://docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.logAsyncioTasks = False  # type: ignore[attr-defined,unused-ignore]
    handler = GatheringHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter())
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "nats", "asyncio", "urllib3", "filelock", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
