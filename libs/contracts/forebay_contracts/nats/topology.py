"""Streams, consumers and buckets: missing ones are made, and changed settings are applied.

The service that starts first makes them. Each later start applies the limits that its environment sets to the live
ones; where it sets none, the live ones stay. A service whose NATS user may not change them uses them as they are and
logs the differences. An operator then runs `forebay topology apply` as a user that may.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from nats.errors import Error as NatsError
from nats.js.api import ConsumerConfig, StreamConfig
from nats.js.errors import APIError, NotFoundError

from forebay_contracts.nats import limits, permissions
from forebay_contracts.nats.connection import JETSTREAM_TIMEOUT_S, Connection
from forebay_contracts.nats.limits import Limits
from forebay_contracts.nats.storage import wanted_streams
from forebay_contracts.nats.streams import API_CONSUMERS, consumer_config, stream_configs
from forebay_contracts.settings import Settings
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable

START_PATIENCE_S = 30.0
"""How long a service waits at its start for NATS to answer."""

START_RETRY_S = 0.25
"""Pause between two tries."""

_TRY_AGAIN = (10005, 10008, 10009, 10058, 10105, 10148)
"""No suitable peers, JetStream unavailable, cluster not available: a new cluster has no leader yet. Stream name in use,
consumer exists: another service has just made it with other settings."""

_ADVICE = {10047: ": give it more disk or a higher limit, or lower ANSWER_LOG_BYTES or FILE_STORE_BYTES"}
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

    A limit that the environment does not set stays as it is live. Any number of services may call it at once. A service
    that serves the model gives its `aliases` and `adapters`; without them, the stored ones stay. A user that may not
    change the topology waits START_PATIENCE_S for missing parts. It only logs differences, since the limits of the
    server are the ones that apply.

    Raises:
        ConfigurationError: another model has the same token, the server refuses the configuration, or a part is
            missing that this user may not make.
        QueueUnavailable: NATS does not answer.
    """
    wanted = _Wanted(settings, model, aliases, adapters)
    if not await may_change(connection):
        await _wait_for_topology(connection, wanted)
        return []
    give_up_at = time.monotonic() + START_PATIENCE_S
    changes: list[str] = []
    while True:
        try:
            for part in await _parts(connection, wanted):
                if part.live is None or part.differences:
                    await _apply(connection, part)
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
                # What was live before, another process may have been told. Names are those of the newest worker.
                calm = change.endswith(" made") or ": forebay." in change
                log.log(logging.INFO if calm else logging.WARNING, "[RequestQueue] topology: %s", change)
            return changes
        if time.monotonic() >= give_up_at:
            raise QueueUnavailable(f"NATS did not answer while the topology was checked: {failure!r}") from failure
        await asyncio.sleep(START_RETRY_S)


async def may_change(connection: Connection) -> bool:
    """Whether this NATS user may make and change the topology."""
    allowed = await permissions.own(connection)
    return allowed is None or allowed.publish.permit(f"$JS.API.STREAM.CREATE.{names.STREAM}")


async def _wait_for_topology(connection: Connection, wanted: "_Wanted") -> None:
    give_up_at = time.monotonic() + START_PATIENCE_S
    waiting = False
    while True:
        try:
            missing, different = await _compare(connection, wanted)
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
        missing, different = await _compare(connection, _Wanted(settings, model, aliases, adapters))
    except (NatsError, TimeoutError, OSError) as exc:
        raise QueueUnavailable(f"the topology cannot be read: {exc!r}") from exc
    return missing + different


async def live_limits(connection: Connection, settings: Settings, model: str) -> Limits:
    """The shared limits as `settings` have them, and as they are live.

    Raises:
        QueueUnavailable: NATS does not answer.
    """
    try:
        live = await _live_streams(connection, {place.stream for place in limits.LIMITS.values() if place.stream})
        consumer = await _live(connection.jetstream.consumer_info(names.STREAM, names.model_token(model)))
        configs = {config.name: config for config in await wanted_streams(connection, settings)}
    except (NatsError, TimeoutError, OSError) as exc:
        raise QueueUnavailable(f"the topology cannot be read: {exc!r}") from exc
    own = limits.read(configs, consumer_config(settings, model))
    is_set = settings.model_fields_set
    return Limits(
        told={name: value for name, value in own.items() if name in is_set},
        default={name: value for name, value in own.items() if name not in is_set},
        live=limits.read(live, consumer),
    )


async def _compare(connection: Connection, wanted: "_Wanted") -> tuple[list[str], list[str]]:
    """The missing parts, and the differences of the others."""
    parts = await _parts(connection, wanted)
    return [f"{part.name} is not there" for part in parts if part.live is None], [
        difference for part in parts for difference in part.differences
    ]


class _Wanted(NamedTuple):
    """What a process wants: its settings, and the consumer of a model."""

    settings: Settings
    model: str
    aliases: Sequence[str] | None
    adapters: Iterable[str] | None


@dataclass(frozen=True, slots=True)
class _Part:
    """A stream, or a consumer of `stream`: as it is `wanted`, as it is `live` (None: missing), and what differs."""

    name: str
    stream: str
    wanted: StreamConfig | ConsumerConfig
    live: Any
    differences: list[str]


async def _parts(connection: Connection, wanted: _Wanted) -> list[_Part]:
    """Each part of the topology, as it is live and as it should be.

    Raises:
        ConfigurationError: another model has the consumer.
    """
    js = connection.jetstream
    live = await _live_streams(connection, [config.name for config in stream_configs(wanted.settings)])
    token = names.model_token(wanted.model)
    of_model = await _live(js.consumer_info(names.STREAM, token))
    settings = limits.adopted(wanted.settings, limits.read(live, of_model))
    parts = []
    for config in await wanted_streams(connection, settings):
        if config.name == names.DEFERRED and live[config.name] is not None:
            most = live[config.name].max_msgs_per_subject
            config.max_msgs_per_subject = await _holding_all(js, most, config.max_msgs_per_subject)
        parts.append(_part(f"stream {config.name}", config.name, config, live[config.name]))
    for stream, shared in API_CONSUMERS.items():
        found = await _live(js.consumer_info(stream, shared.durable_name))
        parts.append(_part(f"consumer {shared.durable_name}", stream, shared, found))
    owner = (of_model.metadata or {}).get(names.MODEL_METADATA) if of_model is not None else None
    if owner not in (None, wanted.model):
        raise ConfigurationError(
            f"the models {owner!r} and {wanted.model!r} both become {token!r} on NATS: "
            f"give one of them another MODEL_NAME"
        )
    consumer = consumer_config(settings, wanted.model, wanted.aliases, wanted.adapters)
    return [*parts, _part(f"consumer {token}", names.STREAM, consumer, of_model)]


def _part(name: str, stream: str, wanted: StreamConfig | ConsumerConfig, live: Any) -> _Part:
    return _Part(name, stream, wanted, live, _differences(name, live, wanted))


async def _live_streams(connection: Connection, wanted: Iterable[str]) -> dict[str, Any]:
    """The live configuration of each stream; None: it is missing."""
    return {name: await _live(connection.jetstream.stream_info(name)) for name in wanted}


async def _live(info: Awaitable[Any]) -> Any:
    try:
        return (await info).config
    except NotFoundError:
        return None


async def _holding_all(js: Any, live: int, wanted: int | None) -> int | None:
    """The bound of the waiting room for each key. The server would remove what waits beyond a lower one."""
    if wanted is None or wanted >= live:
        return wanted
    waiting = (await js.stream_info(names.DEFERRED, subjects_filter=">")).state.subjects or {}
    holds: int = min(max([wanted, *waiting.values()]), live)
    if holds > wanted:
        log.warning("[RequestQueue] topology: KEY_MAX_DEFERRED stays at %d until fewer requests wait", holds)
    return holds


async def _apply(connection: Connection, part: _Part) -> None:
    js = connection.jetstream
    if isinstance(part.wanted, StreamConfig):
        await (js.add_stream if part.live is None else js.update_stream)(part.wanted)
    elif part.live is None:
        await _create(connection, part.stream, part.wanted)
    else:
        # An update replaces all metadata, and the server has added some of its own.
        metadata = (part.live.metadata or {}) | (part.wanted.metadata or {})
        await js.add_consumer(part.stream, replace(part.wanted, metadata=metadata))


async def _create(connection: Connection, stream: str, config: ConsumerConfig) -> None:
    """Make a consumer. nats-py's `add_consumer` would change one that another service has just made."""
    body = {"stream_name": stream, "config": config.as_dict(), "action": "create"}
    subject = f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{config.durable_name}"
    answer = await connection.client.request(subject, json.dumps(body).encode(), timeout=JETSTREAM_TIMEOUT_S)
    if error := json.loads(answer.data).get("error"):
        APIError.from_error(error)


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
