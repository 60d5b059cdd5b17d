"""When log lines are written."""

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from forebay_contracts.telemetry.logs import GatheringHandler


class Stream(io.StringIO):
    """Keeps each write apart."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []
        self.written = asyncio.Event()

    def write(self, text: str) -> int:
        self.writes.append(text)
        self.written.set()
        return len(text)


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def log(stream: Stream) -> Iterator[logging.Logger]:
    logger = logging.Logger("test")
    logger.addHandler(handler := GatheringHandler(stream))
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


async def test_what_a_thread_says_is_written_at_once(log: logging.Logger, stream: Stream) -> None:
    log.info("before")
    await asyncio.to_thread(log.info, "from a thread")
    assert stream.writes == ["before\nfrom a thread\n"]


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


def test_a_stream_that_nobody_reads_breaks_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    logger = logging.Logger("test")
    logger.addHandler(GatheringHandler(Gone()))
    logger.warning("nobody hears it")
