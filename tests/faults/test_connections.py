"""Very many connections that ask nothing."""

import asyncio
import resource

import httpx
import pytest

from support.nats import NatsServer
from support.stack import running

IDLE = 10_000
FILES = 2 * IDLE


@pytest.fixture
def many_files() -> int:
    """How many connections this process may hold."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return min(IDLE, allowed - 500)


async def test_idle_connections_are_in_nobodys_way(nats_server: NatsServer, many_files: int) -> None:
    async with running(nats_server) as stack:
        port = stack.apis[0].port
        opened = []
        for _ in range(many_files // 500):
            some = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(500)))
            opened += [writer for _, writer in some]
            # In the order in which they came: after this one the api has taken them.
            async with httpx.AsyncClient(timeout=60) as another:
                assert (await another.get(f"{stack.apis[0].url}/health/live")).status_code == 200
        answers = await asyncio.gather(*(stack.chat("[[tokens=3]]") for _ in range(20)))
        assert [answer.status_code for answer in answers] == [200] * 20
        for writer in opened:
            writer.transport.abort()
        assert (await stack.chat("hi")).status_code == 200
