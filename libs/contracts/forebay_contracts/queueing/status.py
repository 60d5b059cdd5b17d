"""The queue in numbers. They come from NATS alone, so all api replicas give the same, also after restarts."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from datetime import datetime

from nats.errors import Error as NatsError
from nats.js.api import ConsumerInfo
from nats.js.errors import NotFoundError
from pydantic import BaseModel, ConfigDict

from forebay_contracts.nats import limits
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.consumers import consumers, model_of
from forebay_contracts.nats.limits import Values
from forebay_contracts.queueing import room
from forebay_contracts.queueing.protocols import StateStore
from forebay_contracts.settings import Settings
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.heartbeats import ApiInfo, WorkerInfo, WorkerStatus
from forebay_contracts.wire.state import RequestStatus


class ModelQueue(BaseModel):
    """The queue of one model.

    `paused_until` (seconds since the epoch) is set while its consumer is paused. `delivered` counts all deliveries to
    workers so far, redeliveries included. `deferred` wait in the waiting room.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    consumer: str
    waiting: int
    processing: int
    max_concurrent: int
    delivered: int
    paused_until: float | None
    deferred: int = 0


class QueueStatus(BaseModel):
    """What `GET /v1/queue/status` and `forebay status` show.

    The first nine fields are those of the reference document, in its order. `total_failed` includes the timed-out
    requests; `total_timed_out` counts them alone. `active_requests` is waiting and processing together, which
    `max_queue_size` bounds. `deferred` is how many wait in the waiting room besides. `total_queued` counts a request
    again each time that it gives way. `differences` has a sentence for each limit that a service was told otherwise
    than others, or than what is live.
    """

    model_config = ConfigDict(frozen=True)

    queue_size: int
    processing_count: int
    max_concurrent: int
    max_queue_size: int
    total_processed: int
    total_failed: int
    total_queued: int
    active_requests: int
    is_running: bool
    total_timed_out: int
    total_cancelled: int
    workers: int
    workers_ready: int
    deferred: int = 0
    models: tuple[ModelQueue, ...] = ()
    differences: tuple[str, ...] = ()


async def queue_status(
    connection: Connection,
    states: StateStore,
    settings: Settings,
    workers: Iterable[WorkerInfo],
    apis: Iterable[ApiInfo] = (),
    shared: Values | None = None,
) -> QueueStatus:
    """Read the queue's numbers. `workers` and `apis` are those alive now; `shared` are the live limits of streams.

    The limits are those that the server has now. `settings` gives them if no model has a consumer yet.

    Raises:
        QueueUnavailable: NATS does not answer, or no service has made the stream yet.
    """
    try:
        stream, live, totals, deferred = await asyncio.gather(
            connection.jetstream.stream_info(names.STREAM),
            consumers(connection),
            states.totals(),
            _deferred(connection),
        )
    except NotFoundError as exc:
        raise QueueUnavailable(f"NATS has no stream {names.STREAM} yet: no service has been started") from exc
    except (NatsError, TimeoutError, OSError) as exc:
        raise QueueUnavailable("the queue cannot be reached") from exc
    alive = list(workers)
    ready = sum(worker.status is WorkerStatus.READY for worker in alive)
    active = stream.state.messages
    # The two are read a moment apart: a request that ended in between must not make the other number negative.
    processing = min(sum(consumer.num_ack_pending or 0 for consumer in live), active)
    concurrent = [consumer.config.max_ack_pending or 0 for consumer in live]
    timed_out = totals[RequestStatus.TIMED_OUT]
    return QueueStatus(
        queue_size=active - processing,
        processing_count=processing,
        max_concurrent=sum(concurrent) if concurrent else settings.max_concurrent_requests,
        max_queue_size=stream.config.max_msgs or 0,
        total_processed=totals[RequestStatus.COMPLETED],
        total_failed=totals[RequestStatus.FAILED] + timed_out,
        # Every admitted request gets one sequence, or will. A stream that lost its tail gives sequences out again.
        total_queued=max(stream.state.last_seq, sum(totals.values())) + sum(deferred.values()),
        active_requests=active,
        is_running=connection.connected and ready > 0,
        total_timed_out=timed_out,
        total_cancelled=totals[RequestStatus.CANCELLED],
        workers=len(alive),
        workers_ready=ready,
        deferred=sum(deferred.values()),
        models=tuple(sorted((model_queue(one, deferred[one.name]) for one in live), key=lambda line: line.model)),
        differences=tuple(
            limits.differences(
                shared or {}, {model_of(one): limits.read({}, one.config) for one in live}, [*alive, *apis]
            )
        ),
    )


async def _deferred(connection: Connection) -> Counter[str]:
    """How many wait in the waiting room, by the token of their model."""
    found: Counter[str] = Counter()
    for subject, count in (await room.subjects(connection, ">")).items():
        found[subject.split(".")[2]] += count
    return found


def model_queue(consumer: ConsumerInfo, deferred: int = 0) -> ModelQueue:
    """The queue behind a consumer."""
    config = consumer.config
    until = datetime.fromisoformat(config.pause_until).timestamp() if consumer.paused and config.pause_until else None
    return ModelQueue(
        model=model_of(consumer),
        consumer=consumer.name,
        waiting=consumer.num_pending or 0,
        processing=consumer.num_ack_pending or 0,
        max_concurrent=config.max_ack_pending or 0,
        delivered=consumer.delivered.consumer_seq if consumer.delivered else 0,
        paused_until=until,
        deferred=deferred,
    )
