"""A stream of events shows that it lives while there is nothing to write."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from forebay_api.http import sse
from forebay_api.http.sse import COMMENT, EventStream
from forebay_api.in_flight.answer import SlowReader

KEEP_ALIVE_S = 0.02


class Connection:
    """Takes what a stream sends, unless it is full."""

    def __init__(self) -> None:
        self.bodies: asyncio.Queue[bytes] = asyncio.Queue()
        self.has_room = asyncio.Event()
        self.has_room.set()

    async def send(self, message: Any) -> None:
        await self.has_room.wait()
        if message["type"] == "http.response.body":
            self.bodies.put_nowait(message["body"])


@pytest.fixture
async def connection() -> AsyncIterator[Connection]:
    async with asyncio.timeout(30):
        yield Connection()


async def test_silence_is_broken_again_and_again(connection: Connection) -> None:
    async with EventStream(connection.send, KEEP_ALIVE_S) as stream:
        assert [await connection.bodies.get() for _ in range(2)] == [COMMENT] * 2
        await stream.write(b"data", last=True)
    last = [connection.bodies.get_nowait() for _ in range(connection.bodies.qsize())][-1]
    await asyncio.sleep(3 * KEEP_ALIVE_S)  # nothing tells that nothing comes
    assert (last, connection.bodies.qsize()) == (b"data", 0)


async def test_an_endpoint_has_its_own_sign_of_life(connection: Connection) -> None:
    async with EventStream(connection.send, KEEP_ALIVE_S, lambda: b"ping"):
        assert await connection.bodies.get() == b"ping"


async def test_a_stream_that_is_written_to_needs_none(connection: Connection) -> None:
    async with EventStream(connection.send, 1) as stream:
        stream._look()
        await stream.write(b"data")
        stream._look()
        await asyncio.sleep(0)
        assert connection.bodies.qsize() == 1


async def test_none_waits_behind_a_write_that_stalls(connection: Connection) -> None:
    async with EventStream(connection.send, KEEP_ALIVE_S) as stream:
        connection.has_room.clear()
        writing = asyncio.create_task(stream.write(b"data", last=True))
        await asyncio.sleep(3 * KEEP_ALIVE_S)  # in which a sign of life is due twice
        connection.has_room.set()
        await writing
    assert connection.bodies.get_nowait() == b"data"
    assert connection.bodies.empty()


async def test_a_write_that_begins_with_a_sign_of_life_is_given_up_too(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with EventStream(connection.send, KEEP_ALIVE_S) as stream:
        await connection.bodies.get()
        monkeypatch.setattr(sse, "MAX_WRITE_STALL_S", KEEP_ALIVE_S)
        connection.has_room.clear()
        writing = asyncio.create_task(stream.write(b"data"))
        stream._sign = asyncio.create_task(stream._show_life())
        with pytest.raises(SlowReader):
            await writing


async def test_it_can_be_switched_off(connection: Connection) -> None:
    async with EventStream(connection.send, 0) as stream:
        stream._look()
        await asyncio.sleep(0)
        assert connection.bodies.empty()


@pytest.mark.parametrize("keep_alive_s", [0, KEEP_ALIVE_S])
async def test_a_connection_that_takes_nothing_is_given_up(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, keep_alive_s: float
) -> None:
    monkeypatch.setattr(sse, "MAX_WRITE_STALL_S", 2 * KEEP_ALIVE_S)
    async with EventStream(connection.send, keep_alive_s) as stream:
        await stream.write(b"data")
        connection.has_room.clear()
        for _ in range(2):  # also what is written after a write, or a sign of life, that stalled
            with pytest.raises(SlowReader):
                await stream.write(b"more")
