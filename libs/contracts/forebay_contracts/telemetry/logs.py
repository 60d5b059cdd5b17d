"""Log lines, as text or JSON. No line has a key, and none has a prompt unless LOG_PROMPTS is true."""

import asyncio
import contextlib
import json
import logging
import logging.handlers
import sys
import time
from typing import Any, Final, TextIO, TypedDict, Unpack

import orjson

from forebay_contracts.settings import Settings

FLUSH_S: Final = 0.02
"""Longest time for which a line waits to be written together with others."""

BATCH_LINES: Final = 1000
"""So many lines are written at once, whatever the time."""

TEXT_FORMAT: Final = "%(asctime)s %(levelname)-7s %(message)s"
"""`2026-01-31 12:34:56,789 INFO    message`, in local time."""


class Fields(TypedDict, total=False):
    """The fields that a line can have besides its message. Times are seconds; a field that is None is left out."""

    request_id: str
    key: str | None
    model: str
    type: str
    attempt: int | None
    outcome: str | None
    code: str | None
    queue_wait_s: float | None
    time_to_first_token_s: float | None
    total_s: float
    prompt_tokens: int
    completion_tokens: int


def fields(**values: Unpack[Fields]) -> dict[str, Fields]:
    """The `extra` of a log line."""
    return {"fields": values}


class TextFormatter(logging.Formatter):
    """TEXT_FORMAT. The time is formatted once a second, which saves 2.4 of 12 us a line."""

    def __init__(self) -> None:
        super().__init__(TEXT_FORMAT)
        self._second, self._time = -1, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """The time of a line, with milliseconds."""
        if (second := int(record.created)) != self._second:
            self._second, self._time = (
                second,
                time.strftime(datefmt or self.default_time_format, self.converter(second)),
            )
        return self._time if datefmt else f"{self._time},{int(record.msecs):03d}"


class JsonFormatter(TextFormatter):
    """One JSON object a line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, then its Fields, and
    `exception` if any."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        line: dict[str, Any] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in record.__dict__.get("fields", {}).items():
            if value is not None:
                # Whole microseconds: further digits are noise. round() takes several times as long.
                line[name] = int(value * 1e6) / 1e6 if value.__class__ is float else value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line).decode()
        except TypeError:  # half a character, as the name of a file can hold one
            return json.dumps(line)


class Record(logging.LogRecord):
    """A line without a place in the code, a thread or a process: to find these out takes a third of a line's time."""

    filename = module = processName = threadName = taskName = "unknown"  # noqa: N815 - the names are logging's
    process = thread = None
    relativeCreated = 0.0  # noqa: N815

    def __init__(  # it does not call that of LogRecord
        self,
        name: str,
        level: int,
        pathname: str,
        lineno: int,
        msg: object,
        args: Any,
        exc_info: Any,
        func: str | None = None,
        sinfo: str | None = None,
        **_: Any,
    ) -> None:
        self.name, self.levelno, self.levelname = name, level, logging.getLevelName(level)
        self.pathname, self.lineno, self.funcName = pathname, lineno, func or "unknown"
        # One mapping has the values of the message by name.
        self.msg, self.args = msg, args[0] if args and len(args) == 1 and isinstance(args[0], dict) else args
        self.exc_info, self.exc_text, self.stack_info = exc_info, None, sinfo
        self.created = time.time()
        self.msecs = self.created % 1 * 1000


class _Lines(logging.StreamHandler[TextIO]):
    """Formats and writes lines; BatchHandler flushes the stream."""

    def flush(self) -> None:
        """Do nothing after a single line."""


class BatchHandler(logging.handlers.MemoryHandler):
    """Formats and writes lines together, FLUSH_S after the first of them; a killed process loses those that wait.

    A warning is written at once with all lines before it, and so is a line outside of an event loop. `stream` must
    buffer. A StreamHandler alone, with a system call a line, has 0.84 of the requests/s, and so has a QueueListener,
    whose thread competes with the event loop (compare.py, whole answers, 16 clients, an engine that takes no time).
    """

    def __init__(self, stream: TextIO, formatter: logging.Formatter) -> None:
        lines = _Lines(stream)
        lines.setFormatter(formatter)
        super().__init__(BATCH_LINES, flushLevel=logging.WARNING, target=lines)
        self._stream = stream
        self._loop: asyncio.AbstractEventLoop | None = None
        """The event loop that is going to call `flush`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line."""
        super().emit(record)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        if self.buffer and loop is not self._loop:
            self._loop = loop
            loop.call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write all lines."""
        self._loop = None
        super().flush()
        # The reader of stderr may be gone, and nobody else can be told.
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def write_out() -> None:
    """Write all lines that wait, before something that may end the process or that writes to stderr itself."""
    for handler in logging.root.handlers:
        handler.flush()


def configure(settings: Settings) -> None:
    """Send all log lines to stderr, as LOG_LEVEL and LOG_FORMAT say."""
    # Finding out where a line was logged is half of what it costs:
    # https://docs.python.org/3/howto/logging.html#optimization
    logging._srcfile = None
    logging.setLogRecordFactory(Record)
    # sys.stderr would write each line at once.
    stream = open(sys.stderr.fileno(), "w", encoding=sys.stderr.encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    formatter = JsonFormatter() if settings.log_format == "json" else TextFormatter()
    logging.basicConfig(level=settings.log_level, handlers=[BatchHandler(stream, formatter)], force=True)
    for noisy in ("httpx", "httpcore", "nats", "asyncio", "urllib3", "filelock", "uvicorn.access", "websockets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
