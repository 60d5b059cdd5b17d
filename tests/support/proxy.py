"""A TCP proxy between a service and NATS, to be cut, and to swallow what goes or comes: a real bad network."""

import asyncio
import contextlib
from urllib.parse import urlsplit

from support.ports import port_of


class Proxy:
    """Forwards to `target` until told otherwise; `url` is what NATS_URL must be."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._server: asyncio.Server | None = None
        self._port = port_of(self)
        self._pairs: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.swallow_answers = False
        """Whether bytes from the server are dropped instead of forwarded."""
        self._swallowed: asyncio.StreamReader | None = None

    @property
    def url(self) -> str:
        """Where to connect to."""
        return f"nats://127.0.0.1:{self._port}"

    async def start(self) -> "Proxy":
        """Listen, always on the same port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        return self

    async def lose(self, part: bytes, count: int) -> None:
        """Drop what comes from clients until `count` times `part` was among it, then `cut`."""
        self._swallowed = asyncio.StreamReader()
        for _ in range(count):
            await self._swallowed.readuntil(part)
        await self.cut()
        self._swallowed = None

    async def cut(self) -> None:
        """Close every connection and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        if self._pairs:
            await asyncio.wait(self._pairs)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pairs.add(task)
        self._writers.add(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._target)
            self._writers.add(up_writer)
            await asyncio.gather(
                self._pump(reader, up_writer, answers=False), self._pump(up_reader, writer, answers=True)
            )
            self._writers.discard(up_writer)
        finally:
            self._writers.discard(writer)
            self._pairs.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if not answers and self._swallowed is not None:
                    self._swallowed.feed_data(data)
                elif not (answers and self.swallow_answers):
                    writer.write(data)
                    await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
