"""The connection of a command to NATS: its settings, and its errors as sentences."""

import contextlib
import logging
from collections.abc import AsyncIterator, Iterator

from nats.errors import Error as NatsError

from forebay_cli.local import nats_server
from forebay_contracts.nats import clock, connection
from forebay_contracts.nats.connection import Connection
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire.errors import ForebayError, QueueUnavailable


class NotPermitted(ForebayError):
    """The NATS user of this command lacks a permission."""


@contextlib.contextmanager
def permission_violations() -> Iterator[list[str]]:
    """The permission violations that the connection logs meanwhile, each once. The denied call itself only times out.

    All that the connection logs is left out of stderr: a command prints its errors itself.
    """
    lines: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        line = record.getMessage().removeprefix("[RequestQueue] NATS: ").removeprefix("nats: ")
        if "ermissions" in line and line not in lines:
            lines.append(line)
        return False

    connection.log.addFilter(collect)
    try:
        yield lines
    finally:
        connection.log.removeFilter(collect)


def load_settings() -> Settings:
    """The settings. Without NATS_URL, they lead to the server of the `forebay up` that runs on DATA_DIR."""
    read = load(Settings)
    if read.nats_url is not None:
        return read
    return read.model_copy(update=nats_server.running(read.data_dir))


@contextlib.asynccontextmanager
async def connected(read: Settings) -> AsyncIterator[Connection]:
    """A connection for one command. Inside, every error of nats-py becomes one of ours.

    Raises:
        QueueUnavailable: NATS cannot be reached, or does not answer.
        NotPermitted: the call failed because a permission is missing.
    """
    with permission_violations() as violations:
        async with connection.connected(read, "forebay") as link:
            await clock.measure(link.requests)
            try:
                yield link
            except (QueueUnavailable, NatsError, TimeoutError) as exc:
                if violations:
                    raise NotPermitted(
                        f"this NATS user may not do that ({'; '.join(violations)}): "
                        "use `admin` of deploy/nats/forebay.conf"
                    ) from exc
                if isinstance(exc, QueueUnavailable):
                    raise
                raise QueueUnavailable(f"NATS did not answer: {exc or type(exc).__name__}") from exc
