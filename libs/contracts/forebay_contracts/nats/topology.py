"""Streams, consumers and buckets: missing ones are made, and changed settings are applied.

The service that starts first makes them. Each later start applies its settings to the live ones. A service whose NATS
user may not change them uses them as they are and logs the differences. An operator then runs `forebay topology apply`
as a user that may.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, StreamConfig
from nats.js.errors import APIError, NotFoundError

from forebay_contracts.nats import permissions
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.storage import wanted_streams
from forebay_contracts.nats.streams import API_CONSUMERS, consumer_config
from forebay_contracts.settings import Settings
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable

START_PATIENCE_S = 30.0
"""How long a service waits at its start for NATS to answer."""

START_RETRY_S = 0.25
"""Pause between two tries."""

_TRY_AGAIN = (10005, 10008, 10009, 10058)
"""No suitable peers, JetStream unavailable, cluster not available: a new cluster has no leader yet. Stream name in use:
another service has just made it with other settings."""

_ADVICE = {10047: ": give it more storage, or lower ANSWER_LOG_BYTES or FILE_STORE_BYTES"}
"""What helps, by the server's error code. Insufficient storage: it reserves bytes of the answer log and of files."""

_ZERO = (None, False, 0, -1, "")
"""Different ways to write "none"."""

log = logging.getLogger(__name__)


async def ensure(
    connection: Connection,
    settings: Settings,
    model: str,
    aliases: Sequence[str] | None = None,
    adapters: Iterable[str] | None = None,
) -> list[str]:
    """Make streams, buckets and the consumer of `model` as `settings` want them; returns what was changed.

    Any number of services may call it at once. A service that serves the model gives its `aliases` and `adapters`;
    without them, the stored ones stay. A user that may not change the topology waits START_PATIENCE_S for missing
    parts. It only logs differences, since the limits of the server are the ones that apply.

    Raises:
        ConfigurationError: another model has the same token, the server refuses the configuration, or a part is
            missing that this user may not make.
        QueueUnavailable: NATS does not answer.
    """
    consumer = consumer_config(settings, model, aliases, adapters)
    if not await may_change(connection):
        await _wait_for_topology(connection, settings, consumer)
        return []
    give_up_at = time.monotonic() + START_PATIENCE_S
    changes: list[str] = []
    while True:
        try:
            async for part in _parts(connection, settings, consumer):
                if part.live is None or part.differences:
                    await _apply(connection.jetstream, part)
                    changes += [f"{part.name} made"] if part.live is None else part.differences
        except APIError as exc:
            if exc.err_code not in _TRY_AGAIN:
                advice = _ADVICE.get(exc.err_code or 0, "")
                raise ConfigurationError(f"NATS refuses the topology: {exc.description}{advice}") from exc
            failure: Exception = exc
        except (NatsError, TimeoutError, OSError) as exc:
            failure = exc
        else:
            for change in changes:
                log.info("[RequestQueue] topology: %s", change)
            return changes
        if time.monotonic() >= give_up_at:
            raise QueueUnavailable(f"NATS did not answer while the topology was checked: {failure!r}") from failure
        await asyncio.sleep(START_RETRY_S)


async def may_change(connection: Connection) -> bool:
    """Whether this NATS user may make and change the topology."""
    allowed = await permissions.own(connection)
    return allowed is None or allowed.publish.permit(f"$JS.API.STREAM.CREATE.{names.STREAM}")


async def _wait_for_topology(connection: Connection, settings: Settings, consumer: ConsumerConfig) -> None:
    give_up_at = time.monotonic() + START_PATIENCE_S
    waiting = False
    while True:
        try:
            missing, different = await _compare(connection, settings, consumer)
        except (NatsError, TimeoutError, OSError) as exc:
            missing, different = [f"NATS did not answer ({exc!r})"], []
        if not missing:
            for change in different:
                log.warning("[RequestQueue] topology: %s is wanted here: `forebay topology apply` makes it so", change)
            return
        if time.monotonic() >= give_up_at:
            raise ConfigurationError(
                f"{'; '.join(missing)}: this NATS user may not make it, so run `forebay topology apply` as one that may"
            )
        if not waiting:
            log.warning("[RequestQueue] topology: %s: waiting for `forebay topology apply`", "; ".join(missing))
            waiting = True
        await asyncio.sleep(START_RETRY_S)


async def drift(
    connection: Connection,
    settings: Settings,
    model: str,
    aliases: Sequence[str] | None = None,
    adapters: Iterable[str] | None = None,
) -> list[str]:
    """What `ensure` would change: each missing or different part in a few words. Changes nothing.

    Raises:
        ConfigurationError: another model has the same token.
        QueueUnavailable: NATS does not answer.
    """
    try:
        wanted = consumer_config(settings, model, aliases, adapters)
        missing, different = await _compare(connection, settings, wanted)
    except (NatsError, TimeoutError, OSError) as exc:
        raise QueueUnavailable(f"the topology cannot be read: {exc!r}") from exc
    return missing + different


async def _compare(connection: Connection, settings: Settings, consumer: ConsumerConfig) -> tuple[list[str], list[str]]:
    """The missing parts, and the differences of the others."""
    missing, different = [], []
    async for part in _parts(connection, settings, consumer):
        if part.live is None:
            missing.append(f"{part.name} is not there")
        different += part.differences
    return missing, different


@dataclass(frozen=True, slots=True)
class _Part:
    """A stream, or a consumer of `stream`: as it is `wanted`, as it is `live` (None: missing), and what differs."""

    name: str
    stream: str
    wanted: StreamConfig | ConsumerConfig
    live: Any
    differences: list[str]


async def _parts(connection: Connection, settings: Settings, consumer: ConsumerConfig) -> AsyncIterator[_Part]:
    """Read each part of the topology, just before it is yielded.

    Raises:
        ConfigurationError: another model has the consumer.
    """
    js = connection.jetstream
    for wanted in await wanted_streams(connection, settings):
        live = await _live(js.stream_info(wanted.name))
        name = f"stream {wanted.name}"
        yield _Part(name, wanted.name, wanted, live, _differences(name, live, wanted))
    for stream, shared in API_CONSUMERS.items():
        name = f"consumer {shared.durable_name}"
        live = await _live(js.consumer_info(stream, shared.durable_name))
        yield _Part(name, stream, shared, live, _differences(name, live, shared))
    live = await _live(js.consumer_info(names.STREAM, consumer.durable_name))
    if live is not None:
        owner, model = ((one.metadata or {}).get(names.MODEL_METADATA) for one in (live, consumer))
        if owner not in (None, model):
            raise ConfigurationError(
                f"the models {owner!r} and {model!r} both become {consumer.durable_name!r} on NATS: "
                f"give one of them another MODEL_NAME"
            )
    name = f"consumer {consumer.durable_name}"
    yield _Part(name, names.STREAM, consumer, live, _differences(name, live, consumer))


async def _live(info: Awaitable[Any]) -> Any:
    try:
        return (await info).config
    except NotFoundError:
        return None


async def _apply(js: JetStreamContext, part: _Part) -> None:
    if isinstance(part.wanted, StreamConfig):
        await (js.add_stream if part.live is None else js.update_stream)(part.wanted)
        return
    # An update replaces all metadata, and the server has added some of its own.
    stored = part.live.metadata or {} if part.live is not None else {}
    await js.add_consumer(part.stream, replace(part.wanted, metadata=stored | (part.wanted.metadata or {})))


def _differences(name: str, live: Any, wanted: Any) -> list[str]:
    """Each field or metadata that `wanted` sets and `live` has otherwise, as `name: field old → new`."""
    if live is None:
        return []
    pairs = {
        field.name: (getattr(live, field.name, None), getattr(wanted, field.name))
        for field in fields(wanted)
        if field.name != "metadata"
    }
    stored = live.metadata or {}
    pairs |= {key: (stored.get(key), new) for key, new in (wanted.metadata or {}).items()}
    return [
        f"{name}: {field} {old} → {new}"
        for field, (old, new) in pairs.items()
        if new is not None and new != old and not (old in _ZERO and new in _ZERO)
    ]
