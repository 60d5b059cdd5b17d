"""Calling a request off: one way for a client that left, DELETE, a passed deadline and `forebay cancel`."""

import contextlib
import logging
import time

from nats.errors import Error as NatsError

from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.queue import RequestQueue
from forebay_contracts.queueing.states import StateStore, finish
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import StateUnreadable
from forebay_contracts.wire.state import RequestStatus

log = logging.getLogger(__name__)


async def call_off(
    connection: Connection,
    queue: RequestQueue,
    states: StateStore,
    request_id: str,
    outcome: RequestStatus,
    reason: str,
    sequence: int | None = None,
) -> bool:
    """End a request before its time: as `cancelled` or `timed_out`, for `reason`; False if it had ended before.

    Its place in the queue is free when this returns, its slot within one step of the engine. `sequence` is its
    message's, where the caller knows it; otherwise it is read from the state.

    Raises:
        QueueUnavailable: NATS does not answer.
    """
    if sequence is None:
        stored = await states.get(request_id)
        if stored is None or stored.state.status.final:
            return False
        sequence = stored.state.sequence
    try:
        ended = await finish(states, request_id, outcome, reason)
    except StateUnreadable as exc:
        log.error("[RequestQueue] %s", exc.message)
        ended = None
    # Whether the message waits or is out cannot be told from here: it is taken out, and whoever runs it is told.
    if sequence is not None:
        await queue.remove(sequence)
    with contextlib.suppress(NatsError):
        await connection.client.publish(names.cancel_subject(request_id), reason.encode())
    if ended is None:
        return False
    log.info(
        "[RequestQueue] %s %s: %s",
        request_id,
        outcome.value.replace("_", " "),
        reason,
        extra=fields(
            request_id=request_id,
            model=ended.model,
            type=ended.completion_type,
            attempt=ended.attempt,
            outcome=outcome.value,
            total_s=time.time() - ended.queued_at,
        ),
    )
    return True
