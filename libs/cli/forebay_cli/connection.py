"""How the commands that look at the queue reach it."""

import contextlib
import logging
from collections.abc import AsyncIterator

from forebay_cli.local import nats_server
from forebay_contracts.nats import connection
from forebay_contracts.nats.connection import Connection
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire.errors import ForebayError, QueueUnavailable


class NotPermitted(ForebayError):
    """The user of this connection may not do what was asked."""


class Refusals(logging.Handler):
    """What the connection logs meanwhile: a refused subject is told nowhere else, and its answer never comes."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []
        self._logger = logging.getLogger(connection.__name__)

    def __enter__(self) -> "Refusals":
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a refusal."""
        line = record.getMessage()
        if "ermissions" in line:
            self._lines.append(line.removeprefix("[RequestQueue] NATS: ").removeprefix("nats: "))

    def told(self) -> list[str]:
        """The refusals, each once."""
        return list(dict.fromkeys(self._lines))


def settings() -> Settings:
    """The settings, with NATS_URL of the server that `forebay up` runs here where none is set."""
    read = load(Settings)
    if read.nats_url is not None:
        return read
    return read.model_copy(update={"nats_url": nats_server.running_url(read.data_dir.expanduser())})


@contextlib.asynccontextmanager
async def connected(read: Settings) -> AsyncIterator[Connection]:
    """A connection for one command.

    Raises:
        QueueUnavailable: NATS cannot be reached.
        NotPermitted: what the command waited for in vain was refused.
    """
    with Refusals() as refusals:
        async with connection.connected(read, "forebay") as link:
            try:
                yield link
            except QueueUnavailable as exc:
                if refused := refusals.told():
                    raise NotPermitted(
                        f"this NATS user may not do that ({'; '.join(refused)}): "
                        "use `admin` of deploy/nats/forebay.conf"
                    ) from exc
                raise
