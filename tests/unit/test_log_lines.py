"""When log lines are written."""

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from forebay_contracts.telemetry.logs import BATCH_LINES, BatchHandler


class Stream(io.StringIO):
    """A stream that buffers until it is flushed; `writes` has what each flush wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []
        self.written = asyncio.Event()

    def flush(self) -> None:
        if text := self.getvalue():
            self.seek(0)
            self.truncate()
            self.writes.append(text)
            self.written.set()


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def log(stream: Stream) -> Iterator[logging.Logger]:
    logger = logging.Logger("test")
    logger.addHandler(handler := BatchHandler(stream, logging.Formatter()))
    yield logger
    handler.close()


async def test_the_lines_of_an_event_loop_are_written_together(log: logging.Logger, stream: Stream) -> None:
    for number in range(3):
        log.info("line %d", number)
    assert stream.writes == []
    await stream.written.wait()
    assert stream.writes == ["line 0\nline 1\nline 2\n"]
    stream.written.clear()
    log.info("and again")
    await stream.written.wait()
    assert stream.writes[1:] == ["and again\n"]


async def test_a_warning_waits_for_nothing(log: logging.Logger, stream: Stream) -> None:
    log.info("before")
    log.warning("now")
    assert stream.writes == ["before\nnow\n"]


def test_without_an_event_loop_a_line_is_written_at_once(log: logging.Logger, stream: Stream) -> None:
    log.info("starting")
    assert stream.writes == ["starting\n"]


def test_lines_that_wait_when_the_loop_ends_are_not_lost(log: logging.Logger, stream: Stream) -> None:
    async def one() -> None:
        log.info("last words")

    asyncio.run(one())
    assert stream.writes == []
    asyncio.run(one())
    log.handlers[0].flush()
    assert "".join(stream.writes) == "last words\nlast words\n"


async def test_many_lines_wait_for_no_timer(log: logging.Logger, stream: Stream) -> None:
    for number in range(BATCH_LINES):
        log.info("line %d", number)
    assert len("".join(stream.writes).splitlines()) == BATCH_LINES


async def test_threads_lose_no_line(log: logging.Logger, stream: Stream) -> None:
    def say(name: str) -> None:
        for number in range(500):
            log.info("%s %d", name, number)

    await asyncio.gather(*(asyncio.to_thread(say, name) for name in ("one", "two")), say_here(log, 500))
    log.handlers[0].flush()
    said = "".join(stream.writes).splitlines()
    for name in ("one", "two", "here"):
        assert [line for line in said if line.startswith(name)] == [f"{name} {number}" for number in range(500)]


async def say_here(log: logging.Logger, count: int) -> None:
    for number in range(count):
        log.info("here %d", number)
        await asyncio.sleep(0)


async def test_a_line_that_cannot_be_formatted_takes_no_other_with_it(
    log: logging.Logger, stream: Stream, capsys: pytest.CaptureFixture[str]
) -> None:
    log.info("before")
    log.info("%d", "no number")
    log.warning("after")
    assert stream.writes == ["before\nafter\n"]
    assert "no number" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["write", "flush"])
def test_a_stream_that_nobody_reads_breaks_nothing(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BrokenPipeError

    stream = Stream()
    monkeypatch.setattr(stream, broken, fail)
    logger = logging.Logger("test")
    logger.addHandler(BatchHandler(stream, logging.Formatter()))
    logger.warning("nobody hears it")
