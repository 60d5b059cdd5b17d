"""The streams, buckets and consumers of Forebay, as the settings want them."""

import math
from collections.abc import Iterable, Mapping, Sequence

from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    RePublish,
    RetentionPolicy,
    StorageType,
    StoreCompression,
    StreamConfig,
)

from forebay_contracts.settings import Settings
from forebay_contracts.wire import names

HEARTBEAT_TTL_S = 4
"""A service whose last heartbeat is older is dead."""

DUPLICATE_WINDOW_S = 120
"""How long NATS recognises a repeated Nats-Msg-Id."""

ANSWER_DUPLICATE_WINDOW_S = 30
"""The same for the answer log. Its writers are fenced, so it only saves a read."""

MAX_BATCHES = 1_000
"""Most batches that have not ended."""

MAX_BATCH_S = 7 * 86_400
"""The longest completion window of a batch."""

BATCH_GRACE_S = 86_400
"""How much longer than the longest batch its record is kept at least, for its end to be read."""

BATCH_ACK_WAIT_S = 10
"""A batch whose api says nothing for so long goes on at another one."""

COUNTER_HISTORY = 10_000
"""Increments kept for each counter, so that NATS recognises a repetition also after its restart."""

QUEUE_SHARE = 0.5
"""The part of the NATS account's storage that requests may take."""

ANSWER_SHARE = 0.25
"""The part that the answer log may take, if that is less than ANSWER_LOG_BYTES."""

FILE_SHARE = 0.05
"""The part that files may take, if that is less than FILE_STORE_BYTES. States and counters have what all leave."""

ROOM_SHARE = 0.05
"""The part that the waiting room may take."""

MAX_EVENTS = 100_000
"""Events for webhooks that wait to be delivered. Beyond that, the oldest goes."""

EVENT_TTL_S = 72 * 3600
"""How long an event is tried."""

EVENT_ACK_WAIT_S = 60
"""An api that has pulled an event and has not settled it for so long is taken for dead."""

FAILED_SHARE = 0.125
"""What failed requests may take that are kept to be run again, for each byte that the answer log may take. Beyond that,
the oldest goes."""

USAGE_SHARE = 0.01
"""The part that the counters of usage may take. Beyond it, the oldest days go first."""


def stream_configs(settings: Settings, storage: float | None = math.inf) -> list[StreamConfig]:
    """All streams of Forebay, those behind its buckets included, as `settings` want them.

    `storage` is how many bytes the account may store for each replica: inf if that is unbounded. None: unknown; then
    the bounds in bytes stay as they are.
    """
    queue_bytes = answer_bytes = failed_bytes = room_bytes = file_bytes = None
    if storage is not None:
        queue_bytes = int(storage * QUEUE_SHARE) if storage < math.inf else None
        room_bytes = int(storage * ROOM_SHARE) if storage < math.inf else None
        answer_bytes = int(min(settings.answer_log_bytes, storage * ANSWER_SHARE))
        file_bytes = int(min(settings.file_store_bytes, storage * FILE_SHARE))
        failed_bytes = int(answer_bytes * FAILED_SHARE) or None
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
            republish=RePublish(src=names.REQUEST_SUBJECTS, dest=names.ADMITTED_SUBJECTS, headers_only=True),
            allow_msg_ttl=True,
            allow_direct=True,
            num_replicas=replicas,
        ),
        StreamConfig(
            name=names.DEFERRED,
            description="Requests that wait until a model has nothing else to do",
            subjects=[names.DEFERRED_SUBJECTS, names.YIELDED_SUBJECTS],
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            # So many can give way at once.
            max_msgs_per_subject=max(settings.key_max_deferred, settings.max_concurrent_requests),
            discard_new_per_subject=True,
            max_bytes=room_bytes,
            duplicate_window=DUPLICATE_WINDOW_S,
            republish=RePublish(src=names.ROOM_SUBJECTS, dest=names.WAITING_SUBJECTS, headers_only=True),
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
        StreamConfig(
            name=names.ANSWERS,
            description="Answers that outlive their connection",
            subjects=[names.ANSWER_SUBJECTS],
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_age=settings.response_ttl,
            max_bytes=answer_bytes,
            duplicate_window=min(settings.response_ttl, ANSWER_DUPLICATE_WINDOW_S),
            republish=RePublish(src=names.ANSWER_SUBJECTS, dest=names.ANSWERED_SUBJECTS),
            allow_direct=True,
            num_replicas=replicas,
        ),
        StreamConfig(
            name=names.WEBHOOKS,
            description="Events for webhooks that wait to be delivered",
            subjects=[names.WEBHOOK_SUBJECT],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            discard=DiscardPolicy.OLD,
            max_msgs=MAX_EVENTS,
            max_age=EVENT_TTL_S,
            duplicate_window=DUPLICATE_WINDOW_S,
            allow_direct=True,
            num_replicas=replicas,
        ),
        StreamConfig(
            name=names.FAILED,
            description="Stored requests that failed, to be run again",
            subjects=[names.FAILED_SUBJECTS],
            storage=StorageType.FILE,
            discard=DiscardPolicy.OLD,
            max_msgs_per_subject=1,
            max_bytes=failed_bytes,
            max_age=settings.response_ttl,
            duplicate_window=min(settings.response_ttl, DUPLICATE_WINDOW_S),
            allow_direct=True,
            num_replicas=replicas,
        ),
        StreamConfig(
            name=names.USAGE,
            description="What each key used of each model, a day",
            subjects=[names.USAGE_SUBJECTS],
            storage=StorageType.FILE,
            # The increments of one counter differ in little more than their ids.
            compression=StoreCompression.S2,
            max_age=settings.usage_days * 86_400,
            max_bytes=int(storage * USAGE_SHARE) if storage is not None and storage < math.inf else None,
            max_msgs_per_subject=COUNTER_HISTORY,
            duplicate_window=DUPLICATE_WINDOW_S,
            allow_msg_counter=True,
            allow_direct=True,
            num_replicas=replicas,
        ),
        _bucket(names.RESPONSES_BUCKET, "What responses were asked for", settings.response_ttl, replicas),
        _bucket(names.REQUESTS_BUCKET, "State of each request", settings.request_state_ttl, replicas),
        _bucket(names.ANSWERS_BUCKET, "Answers to idempotent requests", settings.request_state_ttl, replicas),
        _bucket(names.WORKERS_BUCKET, "Live workers", HEARTBEAT_TTL_S, replicas),
        _bucket(names.APIS_BUCKET, "Live api instances", HEARTBEAT_TTL_S, replicas),
        # NATS ADR-20 fixes the layout of an object store. Each message has a TTL of its own.
        StreamConfig(
            name=names.object_stream(names.FILES_BUCKET),
            description="Files, and what batches have answered so far",
            subjects=names.object_subjects(names.FILES_BUCKET),
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_bytes=file_bytes,
            duplicate_window=DUPLICATE_WINDOW_S,
            allow_msg_ttl=True,
            allow_rollup_hdrs=False,
            allow_direct=True,
            num_replicas=replicas,
        ),
        _bucket(names.BATCHES_BUCKET, "Batches", max(settings.file_ttl, MAX_BATCH_S + BATCH_GRACE_S), replicas),
        StreamConfig(
            name=names.BATCHES,
            description="Batches that have not ended",
            subjects=[names.BATCH_SUBJECTS],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_msgs=MAX_BATCHES,
            # The same batch twice is refused, however late.
            max_msgs_per_subject=1,
            discard_new_per_subject=True,
            duplicate_window=DUPLICATE_WINDOW_S,
            allow_direct=True,
            num_replicas=replicas,
        ),
    ]


def consumer_config(
    settings: Settings, model: str, aliases: Sequence[str] | None = None, adapters: Iterable[str] | None = None
) -> ConsumerConfig:
    """The durable consumer that all workers of `model` share. Its metadata keep the model's name, `aliases` and
    `adapters`."""
    metadata = {names.MODEL_METADATA: model}
    if adapters is not None:
        metadata[names.ADAPTERS_METADATA] = ",".join(adapters)
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


API_CONSUMERS: Mapping[str, ConsumerConfig] = {
    names.BATCHES: ConsumerConfig(
        durable_name=names.BATCHES_CONSUMER,
        description="Hands batches to apis",
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=BATCH_ACK_WAIT_S,
        max_ack_pending=MAX_BATCHES,
        max_deliver=-1,
    ),
    # An event that waits for its next try counts as out.
    names.WEBHOOKS: ConsumerConfig(
        durable_name=names.WEBHOOKS_CONSUMER,
        description="Events for webhooks",
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=EVENT_ACK_WAIT_S,
        max_ack_pending=MAX_EVENTS,
        max_deliver=-1,
    ),
}
"""By stream, the durable consumer that all apis share."""


def _bucket(bucket: str, description: str, ttl_s: float, replicas: int) -> StreamConfig:
    # NATS ADR-8 fixes the layout of a KV bucket. Written as a stream, a changed TTL is applied like any other change.
    # Heartbeats are in files too: a single server that restarts loses a stream in memory, and nobody would make it
    # again.
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
        # With the header `Nats-Rollup: all`, a user that may write one value could remove all others.
        allow_rollup_hdrs=False,
        allow_direct=True,
        num_replicas=replicas,
    )
