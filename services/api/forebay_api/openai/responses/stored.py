"""Stored responses and conversations: their records, their items, and the items before a new response."""

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

from forebay_api.http.bodies import off_loop
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_api.in_flight.records import Kept, Records, key_of
from forebay_api.in_flight.stored import StoredRequests
from forebay_api.openai.responses.body import PromptBody
from forebay_api.openai.responses.conversation import ConversationRecord, Entry
from forebay_api.openai.responses.events import ResponseFold
from forebay_api.openai.responses.record import KIND, ResponseRecord, response_of
from forebay_contracts.nats import clock
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ApiError, InvalidRequest, QueueConflict, RequestNotFound
from forebay_contracts.wire.request import InferenceRequest

MAX_CHAIN: Final = 1_000
"""Most responses that a conversation may hold, whether by `previous_response_id` or by its id."""

MAX_CONFLICTS: Final = 20
"""How often a change of a conversation is tried."""

CONFLICT_PAUSE_S: Final = 0.01
"""Longest pause before the second try. It grows by as much with each try, so that many clients get their turn."""

DELTA_BYTES: Final = 100
"""About what one delta is in the log."""

_Items = list[dict[str, Any]]


class Responses:
    """The responses and conversations of every key."""

    def __init__(self, records: Records, requests: StoredRequests) -> None:
        self._records = records
        self._requests = requests

    async def get(self, owner: str | None, identifier: str) -> ResponseRecord:
        """The record of a response. Raises RequestNotFound."""
        found = await self._records.get(key_of(KIND, owner, _known(identifier)), ResponseRecord)
        if found is None:
            raise RequestNotFound(f"Response with id '{identifier}' not found.", code=None)
        return found.record

    @contextlib.asynccontextmanager
    async def submit(self, record: ResponseRecord, request: InferenceRequest) -> AsyncIterator[LiveAnswer]:
        """Admit the request of a response, and keep its record; yields its answer."""
        conversation, key = record.conversation, key_of(KIND, record.key, record.id)
        if conversation is not None:
            await self.change(record.key, conversation, Entry(response=record.id))
        async with contextlib.AsyncExitStack() as block:
            try:
                answer = await block.enter_async_context(self._requests.submit(request, key, record))
            except ApiError:
                if conversation is not None:
                    with contextlib.suppress(ApiError):
                        await self.change(record.key, conversation, without=record.id)
                raise
            yield answer

    async def referenced(
        self, owner: str | None, identifiers: Sequence[str], known: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """The items of stored responses that `identifiers` name, without those that are known.

        Raises:
            InvalidRequest: they are of too many responses.
        """
        responses = {response_of(one) for one in identifiers if one not in known}
        if len(responses) > MAX_CHAIN:
            raise InvalidRequest(f"An input may refer to items of {MAX_CHAIN} responses.", param="input")
        found: dict[str, dict[str, Any]] = {}
        for identifier in filter(None, responses):
            with contextlib.suppress(RequestNotFound):
                record = await self.get(owner, identifier)
                found |= {item["id"]: item for item in (*record.input, *(await self._output(record) or ()))}
        return found

    async def forget(self, record: ResponseRecord) -> None:
        """Remove a response, and its answer. The record goes last, so that a failure can be repeated."""
        await self._requests.forget(record.origin())
        await self._records.delete(key_of(KIND, record.key, record.id))

    async def fold(self, record: ResponseRecord) -> ResponseFold:
        """The response as it is now."""
        answer = await self._requests.so_far(record.origin())
        return await off_loop(DELTA_BYTES * answer.unread, folded, record, answer)

    async def conversation(self, owner: str | None, identifier: str) -> Kept[ConversationRecord]:
        """A conversation. Raises RequestNotFound."""
        found = await self._records.get(key_of("conv", owner, _known(identifier)), ConversationRecord)
        if found is None:
            raise RequestNotFound(f"Conversation with id '{identifier}' not found.", param="conversation", code=None)
        return found

    async def change(
        self,
        owner: str | None,
        identifier: str,
        *more: Entry,
        metadata: dict[str, str] | None = None,
        without: str | None = None,
    ) -> ConversationRecord:
        """Add entries to a conversation, replace its metadata, or remove an item or a response."""
        if more:
            await self._requests.need_room()
        for conflicts in range(MAX_CONFLICTS):
            kept = await self.conversation(owner, identifier)
            changed = kept.record.changed(more, metadata, without)
            if sum(entry.response is not None for entry in changed.entries) > MAX_CHAIN:
                raise InvalidRequest(f"A conversation may hold {MAX_CHAIN} responses.", param="conversation")
            try:
                await self._records.put(key_of("conv", owner, identifier), changed, kept.revision)
            except QueueConflict:
                await asyncio.sleep(random.uniform(0, CONFLICT_PAUSE_S * (conflicts + 1)))
                continue
            return changed
        raise QueueConflict(f"conversation {identifier}: it was changed {MAX_CONFLICTS} times in a row, try again")

    async def begin_conversation(
        self, owner: str | None, metadata: dict[str, str], entries: Sequence[Entry]
    ) -> ConversationRecord:
        """Make a conversation."""
        await self._requests.need_room()
        record = ConversationRecord(
            id=f"conv_{uuid.uuid4().hex}", created_at=clock.now(), metadata=metadata, entries=tuple(entries)
        )
        await self._records.put(key_of("conv", owner, record.id), record)
        return record

    async def end_conversation(self, owner: str | None, identifier: str) -> None:
        """Remove a conversation. Its responses stay."""
        await self.conversation(owner, identifier)
        await self._records.delete(key_of("conv", owner, identifier))

    async def before(self, owner: str | None, body: PromptBody) -> _Items:
        """The items that the input of `body` comes after.

        Raises:
            InvalidRequest: a response that it names is not known, or has not ended well.
            RequestNotFound: its conversation is not known.
        """
        if body.conversation_id is not None:
            return await self.items_of(owner, (await self.conversation(owner, body.conversation_id)).record)
        chain: list[ResponseRecord] = []
        identifier = body.previous_response_id
        while identifier is not None:
            if len(chain) == MAX_CHAIN:
                raise InvalidRequest(f"A conversation may hold {MAX_CHAIN} responses.", param="previous_response_id")
            try:
                chain.append(await self.get(owner, identifier))
            except RequestNotFound:
                raise InvalidRequest(
                    f"Previous response with id '{identifier}' not found.",
                    param="previous_response_id",
                    code="previous_response_not_found",
                ) from None
            identifier = chain[-1].previous_response_id
        outputs = await asyncio.gather(*map(self._output, chain))
        if outputs and outputs[0] is None:
            raise InvalidRequest(
                f"Response '{body.previous_response_id}' has not completed, so it cannot be continued.",
                param="previous_response_id",
            )
        pairs = zip(reversed(chain), reversed(outputs), strict=True)
        return [item for record, output in pairs for item in (*record.input, *(output or ()))]

    async def items_of(self, owner: str | None, conversation: ConversationRecord) -> _Items:
        """The items of a conversation, oldest first. A response that has not ended well adds none."""

        async def items(entry: Entry) -> _Items:
            if entry.item is not None:
                return [entry.item]
            try:
                record = await self.get(owner, entry.response or "")
            except RequestNotFound:
                return []
            output = await self._output(record)
            return [] if output is None else [*record.input, *output]

        found = await asyncio.gather(*map(items, conversation.entries))
        return [item for some in found for item in some if item["id"] not in conversation.removed]

    async def _output(self, record: ResponseRecord) -> _Items | None:
        """What a response has answered; None if it has not, or failed."""
        response = (await self.fold(record)).response()
        return response["output"] if response["status"] in ("completed", "incomplete") else None


def _known(identifier: str) -> str:
    # An id becomes part of a subject: what cannot be an id must not.
    return identifier if names.is_request_id(identifier) else "none"


def folded(record: ResponseRecord, answer: LiveAnswer) -> ResponseFold:
    """The fold of all that has come of an answer."""
    fold = ResponseFold(record)
    fold.opening()
    if answer.begun:
        fold.started()
    for delta in answer.take():
        fold.delta(delta)
    if answer.completed is not None:
        fold.completed(answer.completed)
    elif answer.error is not None:
        fold.failed(answer.error.status, answer.error.code, answer.error.message)
    return fold
