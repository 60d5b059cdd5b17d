"""The connection of a command to NATS: which server it asks, and its errors as sentences."""

import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple, Self

from nats.errors import Error as NatsError

from forebay_cli import console
from forebay_cli.local.running import running
from forebay_contracts.nats import clock, connection
from forebay_contracts.nats.connection import Connection
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire.errors import ConfigurationError, ForebayError, QueueUnavailable, SteeringNotAllowed


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


class Target(NamedTuple):
    """The NATS of a command: the settings that lead to it, and what has named it. None: nothing has."""

    settings: Settings
    named_by: str | None

    def named(self) -> Self:
        """This target, for a command that changes something.

        Raises:
            ConfigurationError: nothing has named it. Whatever answers on the usual port may be another system.
        """
        if self.named_by is None:
            raise ConfigurationError(
                f"no NATS server is named, and no `forebay up` runs on DATA_DIR={self.settings.data_dir}: "
                "give --data-dir or --nats-url, or set NATS_URL"
            )
        return self


def target(data_dir: Path | None = None, nats_url: str | None = None) -> Target:
    """The NATS that --nats-url names, or the `forebay up` of --data-dir, or NATS_URL, or the `forebay up` of DATA_DIR.

    Raises:
        ConfigurationError: a setting is wrong, or no `forebay up` runs on the --data-dir that is given.
    """
    given = {"data_dir": data_dir, "nats_url": nats_url}
    read = load(Settings, **{name: value for name, value in given.items() if value is not None})
    if nats_url is not None:
        return Target(read, "--nats-url")
    if data_dir is None and read.nats_url is not None:
        return Target(read, "NATS_URL")
    if (up := running(read.data_dir)) is not None:
        return Target(read.model_copy(update=up.access), f"`forebay up` on {read.data_dir}")
    if data_dir is not None:
        raise ConfigurationError(f"no `forebay up` runs on --data-dir {data_dir}")
    return Target(read, None)


@contextlib.asynccontextmanager
async def connected(at: Target) -> AsyncIterator[Connection]:
    """A connection for one command. Inside, every error of nats-py becomes one of ours.

    Raises:
        QueueUnavailable: NATS cannot be reached, or does not answer.
        NotPermitted: the call failed because a permission is missing.
    """
    with permission_violations() as violations:
        async with connection.connected(at.settings, "forebay") as link:
            console.say_server(link.server, at.named_by)
            await clock.measure(link.requests)
            try:
                yield link
            except SteeringNotAllowed as exc:
                raise NotPermitted(f"{exc}: use `admin` of deploy/nats/forebay.conf") from exc
            except (QueueUnavailable, NatsError, TimeoutError) as exc:
                if violations:
                    raise NotPermitted(
                        f"this NATS user may not do that ({'; '.join(violations)}): "
                        "use `admin` of deploy/nats/forebay.conf"
                    ) from exc
                if isinstance(exc, QueueUnavailable):
                    raise
                raise QueueUnavailable(f"NATS did not answer: {exc or type(exc).__name__}") from exc
