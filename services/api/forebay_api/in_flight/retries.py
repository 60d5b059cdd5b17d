"""Failed requests that run again: as a new request, whose answer is that of the same stored object.

The record of the object names the request that answers it. So a client finds the new answer under the id that it has,
and the state and the log of the request that failed stay as they ended. The new id follows from the old one: whoever
retries it at the same time publishes the same request, and the queue takes it once.
"""

import asyncio
import logging

from pydantic import ConfigDict

from forebay_api.in_flight.records import Records, owner_token
from forebay_api.in_flight.stored import StoredRequests
from forebay_contracts.queueing.failed import FailedRequest, FailedRequests
from forebay_contracts.queueing.protocols import AnswerLog, StateStore
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueConflict, RequestNotFound
from forebay_contracts.wire.message import Message
from forebay_contracts.wire.request import InferenceRequest

MAX_CONFLICTS = 20
"""How often a record is changed anew after another write came first."""

log = logging.getLogger(__name__)


class _Record(Message):
    """What the records of all kinds have: which request answers the object, and until when."""

    model_config = ConfigDict(extra="allow")

    run: str | None = None
    deadline: float


class Retries:
    """Runs failed requests again."""

    def __init__(
        self,
        failed: FailedRequests,
        records: Records,
        stored: StoredRequests,
        states: StateStore,
        answers: AnswerLog,
    ) -> None:
        self._failed = failed
        self._records = records
        self._stored = stored
        self._states = states
        self._answers = answers
        self._one_by_one = asyncio.Lock()

    async def retry(self, owner: str, request_id: str) -> str:
        """Run a failed request of `owner` (see `FailedRequests`) again; returns its new id.

        If it runs again already, nothing happens. If that has failed too, that one runs again: `request_id` may be the
        first of the requests that were to answer the object.

        Raises:
            RequestNotFound: it is not kept, or what it was to answer was deleted.
            QueueFull, QueueUnavailable, KeyLimitReached, AnswerLogFull: it is still kept.
        """
        async with self._one_by_one:
            tried, newest = request_id, None
            failed = await self._failed.get(owner, tried)
            while failed is None:
                tried = names.retry_id(tried)
                failed = await self._failed.get(owner, tried)  # it is kept for longer than its state
                again = await self._states.get(tried)
                if failed is None and again is not None and owner in ("*", owner_token(again.state.key)):
                    newest = tried
                elif failed is None:
                    break
            if failed is not None:
                return await self._run(failed)
            if newest is None:
                raise RequestNotFound(f"No failed request {request_id!r} is kept.", param="request_id")
            return newest

    async def _run(self, failed: FailedRequest) -> str:
        old, request = failed.request, failed.again()
        key = old.record or ""
        if await self._records.get(key, _Record) is None:
            await self._failed.remove(old)
            raise RequestNotFound(f"What {old.id} was to answer was deleted.", param="request_id")
        # Admitted first: whatever dies from here on, the next try publishes the same request and goes on.
        async with self._stored.submit(request):
            pass
        await self._point(key, request)
        await self._answers.purge(old.id)
        await self._stored.registered(request.id)
        await self._failed.remove(old)
        log.info("[RequestQueue] %s runs again as %s", old.id, request.id, extra=fields(request_id=request.id))
        return request.id

    async def _point(self, key: str, request: InferenceRequest) -> None:
        """Have the record name `request`, unless it was deleted."""
        for _ in range(MAX_CONFLICTS):
            kept = await self._records.get(key, _Record)
            if kept is None:
                return await self._stored.cancel(request, "its answer was deleted")
            changed = kept.record.model_copy(update={"run": request.id, "deadline": request.deadline})
            try:
                await self._records.put(key, changed, kept.revision)
            except QueueConflict:
                continue
            return None
        raise QueueConflict(f"{key}: it was changed {MAX_CONFLICTS} times in a row, try again")
