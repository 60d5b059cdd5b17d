"""A connection to a nats-server with the queue's streams, for the contract suites of the seams."""

import contextlib
from collections.abc import AsyncIterator

from forebay_contracts.nats import topology
from forebay_contracts.nats.connection import Connection, connect
from forebay_contracts.settings import Settings, load
from support.nats import NatsServer

MODEL = "org/model"
MAX_QUEUE_SIZE = 4
MAX_CONCURRENT = 2
MAX_DEFERRED = 3
ACK_WAIT_S = 30


@contextlib.asynccontextmanager
async def connected(server: NatsServer, ack_wait: float = ACK_WAIT_S) -> AsyncIterator[Connection]:
    settings = load(
        Settings,
        nats_url=server.url,
        max_queue_size=MAX_QUEUE_SIZE,
        max_concurrent_requests=MAX_CONCURRENT,
        key_max_deferred=MAX_DEFERRED,
        ack_wait=ack_wait,
    )
    connection = await connect(settings, "test")
    try:
        await topology.ensure(connection, settings, MODEL)
        yield connection
    finally:
        await connection.close()
