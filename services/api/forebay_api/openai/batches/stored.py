"""The batches of every key: their records, and the queue from which apis take them."""

import contextlib
from collections.abc import AsyncIterator
from typing import Final, cast

from nats.errors import Error as NatsError
from nats.js.errors import APIError

from forebay_api import request_metrics
from forebay_api.clients.fair_part import may_hold
from forebay_api.in_flight.records import Kept, Records, key_of
from forebay_api.openai.batches.record import FINAL, KIND, BatchRecord, Status
from forebay_api.watching.drain_rate import MAX_RETRY_AFTER_S
from forebay_contracts.nats import clock
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.streams import MAX_BATCHES
from forebay_contracts.queueing.events import publish_event
from forebay_contracts.telemetry.metrics import bound
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ApiError, KeyLimitReached, QueueFull, QueueUnavailable
from forebay_contracts.wire.event import EventType, event

PUBLISH_TIMEOUT_S: Final = 5.0
"""How long the queue of batches may take to answer."""

UNSAID_S: Final = 60.0
"""A batch that no api has run for so long is queued again: the api that made it may have died before it queued it."""

_STORE_FAILED: Final = 10077

_ENDED: Final = {status: bound(request_metrics.BATCHES, status) for status in FINAL}


class Batches:
    """See the module. Each method raises QueueUnavailable without an answer from NATS."""

    def __init__(self, connection: Connection) -> None:
        self._jetstream = connection.jetstream
        self._requests = connection.requests
        self._records = Records(connection, names.BATCHES_BUCKET)

    async def create(self, record: BatchRecord) -> None:
        """Keep a new batch, and queue it.

        Raises:
            QueueFull: too many have not ended; nothing is kept.
            KeyLimitReached: too many of its key have not ended for others to find room.
        """
        await self._need_room(record.key)
        await self._records.put(_key(record.id), record)
        try:
            await self._queue(record.id)
        except ApiError:
            with contextlib.suppress(ApiError):
                await self._records.delete(_key(record.id))
            raise

    async def get(self, batch_id: str) -> Kept[BatchRecord] | None:
        """A batch, or None if there is none."""
        kept = await self._records.get(_key(batch_id), BatchRecord)
        if kept is not None and kept.record.waits and clock.now() - kept.record.created_at > UNSAID_S:
            with contextlib.suppress(ApiError):  # the server refuses a batch that is queued
                await self._queue(batch_id)
        return kept

    async def put(self, record: BatchRecord, revision: int) -> int:
        """Replace `revision` of a batch; returns the new one. Raises QueueConflict if `revision` is not the last."""
        revision = await self._records.put(_key(record.id), record, revision)
        if record.status in _ENDED:
            _ENDED[record.status].inc()
        return revision

    def scan(self) -> AsyncIterator[BatchRecord]:
        """All batches, by their last change."""
        return self._records.scan(KIND, None, BatchRecord)

    async def announce(self, record: BatchRecord, status: Status) -> None:
        """Tell webhooks that a batch has ended. A repetition has the same event id."""
        kind = cast(EventType, f"batch.{status}")
        await publish_event(self._requests, event(kind, record.id, clock.now(), record.key))

    async def counts(self) -> tuple[int, int]:
        """How many batches wait for an api, and how many apis run."""
        try:
            info = await self._jetstream.consumer_info(names.BATCHES, names.BATCHES_CONSUMER)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the queue of batches cannot be reached") from exc
        return info.num_pending or 0, info.num_ack_pending or 0

    async def _need_room(self, key: str | None) -> None:
        used = sum(await self.counts()) + 1
        if key is None or may_hold(used, MAX_BATCHES - used):
            return
        own = len([one async for one in self.scan() if one.key == key and one.status not in FINAL])
        if not may_hold(own + 1, MAX_BATCHES - used):
            message = f"Your key `{key}` has {own} batches that have not ended, and others need room: try again later."
            raise KeyLimitReached(message, MAX_RETRY_AFTER_S)

    async def _queue(self, batch_id: str) -> None:
        subject = names.batch_subject(batch_id)
        try:
            await self._requests.store(subject, timeout_s=PUBLISH_TIMEOUT_S, headers={names.HEADER_MSG_ID: batch_id})
        except APIError as exc:
            if exc.err_code == _STORE_FAILED and "exceeded" in (exc.description or ""):
                raise QueueFull("too many batches have not ended, try again later") from exc
            raise QueueUnavailable(f"the batch was not queued: {exc.description}") from exc
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the queue of batches cannot be reached, try again later") from exc


def _key(batch_id: str) -> str:
    # Not by owner: an operator finds a batch by its id.
    return key_of(KIND, None, batch_id)
