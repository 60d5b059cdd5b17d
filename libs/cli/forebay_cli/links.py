"""How the commands that look at the queue reach it."""

import contextlib
from collections.abc import AsyncIterator

from forebay_cli import nats_server
from forebay_contracts import connection
from forebay_contracts.connection import Connection
from forebay_contracts.settings import Settings, load


def settings() -> Settings:
    """The settings, with NATS_URL of the server that `forebay up` runs here where none is set."""
    read = load(Settings)
    if read.nats_url is not None:
        return read
    return read.model_copy(update={"nats_url": nats_server.running_url(read.data_dir.expanduser())})


@contextlib.asynccontextmanager
async def connected(read: Settings, role: connection.Role = "cli") -> AsyncIterator[Connection]:
    """A connection for one command, with the inboxes of `role`.

    Raises:
        QueueUnavailable: NATS cannot be reached.
    """
    link = await connection.connect(read, "forebay", role)
    try:
        yield link
    finally:
        await link.close()
