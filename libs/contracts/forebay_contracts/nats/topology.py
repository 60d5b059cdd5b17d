"""Streams, consumers and buckets: made where they are missing, changed where the settings have changed.

Whichever service starts first makes them; each start of any service applies its settings to the live ones. A
service whose NATS user may not do so takes them as they are and says what differs: `forebay topology apply` then does
it, as a user that may.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    ConsumerInfo,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError, BadRequestError, NotFoundError

from forebay_contracts.nats import permissions
from forebay_contracts.nats.connection import Connection
from forebay_contracts.settings import Settings
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, QueueUnavailable

HEARTBEAT_TTL_S = 4
"""A service that has not been heard of for so long is dead."""

DUPLICATE_WINDOW_S = 120
"""How long a repeated Nats-Msg-Id is recognised."""

COUNTER_HISTORY = 10_000
"""Increments kept for each counter, so that a repeated one is still recognised after a restart of NATS."""

QUEUE_SHARE = 0.75
"""Of what the NATS account may store, what requests may take; states, counters and kept answers have the rest."""

START_PATIENCE_S = 30.0
"""How long a service waits at start for a NATS that does not answer yet."""

START_RETRY_S = 0.25
"""Pause between tries."""

_STREAM_NAME_IN_USE = 10058
_NO_LEADER = (10005, 10008, 10009)  # no suitable peers, JetStream unavailable, cluster not available: just now

log = logging.getLogger(__name__)


def stream_configs(settings: Settings, queue_bytes: int | None = None) -> list[StreamConfig]:
    """The streams that Forebay owns, the ones behind its buckets included, as `settings` want them.

    `queue_bytes` bounds what requests take; None leaves it as it is.
    """
    replicas = settings.nats_replicas
    return [
        StreamConfig(
            name=names.STREAM,
            description="Requests that wait or are processed",
            subjects=[names.STREAM_SUBJECTS],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_msgs=settings.max_queue_size,
            max_bytes=queue_bytes,
            duplicate_window=DUPLICATE_WINDOW_S,
            allow_msg_ttl=True,
            allow_direct=True,
            num_replicas=replicas,
        ),
        StreamConfig(
            name=names.COUNTERS,
            description="Totals of requests by outcome",
            subjects=[names.COUNTER_SUBJECTS],
            storage=StorageType.FILE,
            max_msgs_per_subject=COUNTER_HISTORY,
            duplicate_window=DUPLICATE_WINDOW_S,
            allow_msg_counter=True,
            allow_direct=True,
            num_replicas=replicas,
        ),
        _bucket(names.REQUESTS_BUCKET, "State of each request", settings.request_state_ttl, replicas),
        _bucket(names.ANSWERS_BUCKET, "Answers to idempotent requests", settings.request_state_ttl, replicas),
        _bucket(names.WORKERS_BUCKET, "Live workers", HEARTBEAT_TTL_S, replicas),
        _bucket(names.APIS_BUCKET, "Live api instances", HEARTBEAT_TTL_S, replicas),
    ]


def consumer_config(settings: Settings, model: str, aliases: Sequence[str] | None = None) -> ConsumerConfig:
    """The shared durable consumer of `model`, which remembers its name and `aliases` while no worker lives."""
    metadata = {names.MODEL_METADATA: model}
    if aliases is not None:
        metadata[names.ALIASES_METADATA] = ",".join(aliases)
    return ConsumerConfig(
        durable_name=names.model_token(model),
        description=f"Requests for {model}",
        filter_subject=names.model_subjects(model),
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=settings.ack_wait,
        max_ack_pending=settings.max_concurrent_requests,
        max_deliver=-1,
        metadata=metadata,
    )


async def ensure(
    connection: Connection, settings: Settings, model: str, aliases: Sequence[str] | None = None
) -> list[str]:
    """Make streams, buckets and the consumer of `model` what `settings` say; returns what was changed.

    Safe to call from any number of services at once. `aliases` are written down by those who serve the model;
    without them, what is written stays. A user that may not change anything waits START_PATIENCE_S for what is not
    there, and only logs what is otherwise: the limits of the server are the ones that hold.

    Raises:
        ConfigurationError: another model has the same token, the server refuses the configuration, or something is
            not there that this user may not make.
        QueueUnavailable: NATS does not answer.
    """
    consumer = consumer_config(settings, model, aliases)
    if not await may_change(connection):
        return await _expect(connection, settings, consumer)
    give_up_at = time.monotonic() + START_PATIENCE_S
    while True:
        try:
            changes = await _ensure_all(connection, settings, consumer)
        except APIError as exc:
            if exc.err_code not in _NO_LEADER:
                raise ConfigurationError(f"NATS refuses the topology: {exc.description}") from exc
            failure: Exception = exc
        except (NatsError, TimeoutError, OSError) as exc:
            failure = exc
        else:
            for change in changes:
                log.info("[RequestQueue] topology: %s", change)
            return changes
        # A cluster that has just been started has no leader yet.
        if time.monotonic() >= give_up_at:
            raise QueueUnavailable(f"NATS did not answer while the topology was checked: {failure!r}") from failure
        await asyncio.sleep(START_RETRY_S)


async def may_change(connection: Connection) -> bool:
    """Whether this NATS user may make and change the topology."""
    allowed = await permissions.own(connection)
    return allowed is None or allowed.publish.permit(f"$JS.API.STREAM.CREATE.{names.STREAM}")


async def _ensure_all(connection: Connection, settings: Settings, consumer: ConsumerConfig) -> list[str]:
    js = connection.jetstream
    configs = stream_configs(settings, await _queue_bytes(connection, settings))
    changes = [change for config in configs for change in await _ensure_stream(js, config)]
    return changes + await _ensure_consumer(js, consumer)


async def _expect(connection: Connection, settings: Settings, consumer: ConsumerConfig) -> list[str]:
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
            return []
        if time.monotonic() >= give_up_at:
            raise ConfigurationError(
                f"{'; '.join(missing)}: this NATS user may not make it, so run `forebay topology apply` as one that may"
            )
        if not waiting:
            log.warning("[RequestQueue] topology: %s: waiting for `forebay topology apply`", "; ".join(missing))
            waiting = True
        await asyncio.sleep(START_RETRY_S)


async def drift(
    connection: Connection, settings: Settings, model: str, aliases: Sequence[str] | None = None
) -> list[str]:
    """What `ensure` would change, changing nothing: each missing or different thing in a few words.

    Raises:
        ConfigurationError: another model has the same token.
        QueueUnavailable: NATS does not answer.
    """
    try:
        missing, different = await _compare(connection, settings, consumer_config(settings, model, aliases))
    except (NatsError, TimeoutError, OSError) as exc:
        raise QueueUnavailable(f"the topology cannot be read: {exc!r}") from exc
    return missing + different


async def _compare(connection: Connection, settings: Settings, consumer: ConsumerConfig) -> tuple[list[str], list[str]]:
    """What is not there, and what is otherwise than wanted."""
    js = connection.jetstream
    missing, different = [], []
    for wanted in stream_configs(settings, await _queue_bytes(connection, settings)):
        try:
            changes = _differences((await js.stream_info(wanted.name)).config, wanted)
        except NotFoundError:
            missing.append(f"stream {wanted.name} is not there")
            continue
        different += [f"stream {wanted.name}: {change}" for change in changes]
    try:
        live = (await js.consumer_info(names.STREAM, consumer.durable_name)).config
    except NotFoundError:
        missing.append(f"consumer {consumer.durable_name} is not there")
    else:
        different += [f"consumer {consumer.durable_name}: {change}" for change in _consumer_differences(live, consumer)]
    return missing, different


async def _queue_bytes(connection: Connection, settings: Settings) -> int | None:
    """QUEUE_SHARE of what the account may store; None where that is unbounded, or not this user's to know."""
    allowed = await permissions.own(connection)
    if allowed is not None and not allowed.publish.permit("$JS.API.INFO"):
        return None
    # An account with tiers has its limits there, and none here.
    limit: int = (await connection.jetstream.account_info()).limits.max_storage
    # The server counts each replica.
    return int(limit * QUEUE_SHARE) // settings.nats_replicas if limit > 0 else None


async def consumers(connection: Connection) -> list[ConsumerInfo]:
    """The live consumers, one a model; none where the stream does not exist yet.

    Raises:
        QueueUnavailable: NATS does not answer.
    """
    try:
        infos: list[ConsumerInfo] = await connection.jetstream.consumers_info(names.STREAM)
    except NotFoundError:
        return []
    except (NatsError, TimeoutError, OSError) as exc:
        raise QueueUnavailable("the queue cannot be reached") from exc
    return infos


def model_of(consumer: ConsumerInfo) -> str:
    """The full name of the model whose requests `consumer` hands out; its own name where the metadata has none."""
    return str((consumer.config.metadata or {}).get(names.MODEL_METADATA, consumer.name))


def aliases_of(consumer: ConsumerInfo) -> tuple[str, ...]:
    """The other names of that model."""
    return tuple(filter(None, (consumer.config.metadata or {}).get(names.ALIASES_METADATA, "").split(",")))


async def known_models(connection: Connection) -> dict[str, tuple[str, ...]]:
    """Each model that has a consumer, with its aliases: what requests can wait for, served now or not.

    Raises:
        QueueUnavailable: NATS does not answer.
    """
    return {
        model_of(consumer): aliases_of(consumer)
        for consumer in await consumers(connection)
        if names.MODEL_METADATA in (consumer.config.metadata or {})
    }


@dataclass(frozen=True, slots=True)
class Place:
    """Where a message stands in its model's line: `position` is 1 for the next one, `moved` what the line has ever."""

    position: int
    moved: int


async def waiting_place(connection: Connection, model: str, sequence: int) -> Place | None:
    """Place in the model's line of a message that waits; None where it cannot be said.

    Where several models share the stream, or messages were taken out between, it is the last place it can be.
    """
    try:
        info = await connection.jetstream.consumer_info(names.STREAM, names.model_token(model))
    except (NatsError, TimeoutError):
        return None
    behind = sequence - (info.delivered.stream_seq if info.delivered else 0)
    moved = info.delivered.consumer_seq if info.delivered else 0
    return Place(max(1, min(behind, info.num_pending or 1)), moved)


def _bucket(bucket: str, description: str, ttl_s: float, replicas: int) -> StreamConfig:
    # The layout of a KV bucket is fixed by NATS ADR-8. Written as a stream, so that a changed TTL is applied
    # to a bucket that exists like any other change. In files, the heartbeats too: a single server that is
    # restarted has forgotten a stream in memory altogether, and those who beat would not notice.
    return StreamConfig(
        name=names.bucket_stream(bucket),
        description=description,
        subjects=[names.bucket_subjects(bucket)],
        storage=StorageType.FILE,
        max_msgs_per_subject=1,
        max_age=ttl_s,
        discard=DiscardPolicy.NEW,
        duplicate_window=min(ttl_s, DUPLICATE_WINDOW_S),
        deny_delete=True,
        # Whoever may write one value could else take out all the others by a header (`Nats-Rollup: all`).
        allow_rollup_hdrs=False,
        allow_direct=True,
        num_replicas=replicas,
    )


async def _ensure_stream(js: JetStreamContext, wanted: StreamConfig) -> list[str]:
    try:
        live = (await js.stream_info(wanted.name)).config
    except NotFoundError:
        try:
            await js.add_stream(wanted)
        except BadRequestError as exc:
            if exc.err_code != _STREAM_NAME_IN_USE:
                raise
            # Another service made it in between, perhaps with other settings.
            live = (await js.stream_info(wanted.name)).config
        else:
            return [f"stream {wanted.name} made"]
    changes = _differences(live, wanted)
    if not changes:
        return []
    await js.update_stream(wanted)
    return [f"stream {wanted.name}: {change}" for change in changes]


async def _ensure_consumer(js: JetStreamContext, wanted: ConsumerConfig) -> list[str]:
    try:
        live = (await js.consumer_info(names.STREAM, wanted.durable_name)).config
    except NotFoundError:
        await js.add_consumer(names.STREAM, wanted)
        return [f"consumer {wanted.durable_name} made"]
    changes = _consumer_differences(live, wanted)
    if not changes:
        return []
    # The server adds metadata of its own, and an update replaces the whole.
    metadata = (live.metadata or {}) | (wanted.metadata or {})
    await js.add_consumer(names.STREAM, replace(wanted, metadata=metadata))
    return [f"consumer {wanted.durable_name}: {change}" for change in changes]


def _consumer_differences(live: ConsumerConfig, wanted: ConsumerConfig) -> list[str]:
    remembered, metadata = live.metadata or {}, wanted.metadata or {}
    owner, model = remembered.get(names.MODEL_METADATA), metadata[names.MODEL_METADATA]
    if owner not in (None, model):
        raise ConfigurationError(
            f"the models {owner!r} and {model!r} both become {wanted.durable_name!r} on NATS: "
            f"give one of them another MODEL_NAME"
        )
    changes = _differences(live, wanted, ignored={"metadata"})
    return changes + [
        f"{key} {remembered.get(key)} → {new}" for key, new in metadata.items() if remembered.get(key) != new
    ]


def _differences(live: Any, wanted: Any, ignored: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """Each field that `wanted` sets and `live` has otherwise, as `name old → new`."""
    changes = []
    for field in fields(wanted):
        new, old = getattr(wanted, field.name), getattr(live, field.name, None)
        if field.name in ignored or new is None or new == old or _same_zero(old, new):
            continue
        changes.append(f"{field.name} {old} → {new}")
    return changes


def _same_zero(old: object, new: object) -> bool:
    return old in (None, False, 0, -1) and new in (None, False, 0, -1)
