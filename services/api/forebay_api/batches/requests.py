"""From a line of a batch to its request, and from the answer to what the output file says."""

from typing import Any, Final, NamedTuple

import orjson
from starlette.datastructures import Headers

from forebay_api.batches import lines
from forebay_api.batches.lines import Line
from forebay_api.clients.keys import Client
from forebay_api.context import Context
from forebay_api.http.bodies import off_loop
from forebay_api.openai.batches.record import BatchRecord
from forebay_api.openai.format import Format
from forebay_api.prepare import Accepted
from forebay_contracts.nats import clock
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueError
from forebay_contracts.wire.request import InferenceRequest, Tier
from forebay_contracts.wire.state import Usage

DELTA_BYTES: Final = 100
"""About what one delta is in the log."""


class LineRequest(NamedTuple):
    """The request of a line, and who writes its answer."""

    number: int
    custom_id: str
    request: InferenceRequest
    format: Format


class LineRequests:
    """The requests of one batch. The id of each depends on the batch and its number alone."""

    def __init__(self, context: Context, record: BatchRecord) -> None:
        self._context = context
        self._record = record
        self.endpoint = lines.BY_PATH[record.endpoint]

    def id_of(self, number: int) -> str:
        """The request id of a line."""
        return str(self._record.named(str(number)))

    async def check(self, line: Line) -> str:
        """Validate a line; returns its model. Raises ApiError if it can never be served."""
        body = await lines.valid_body(self.endpoint, line.body, self._context.settings.max_request_bytes)
        try:
            return (await self._context.models.admit(body.model, self.endpoint.completion_type)).model
        except QueueError:  # it may be served later
            return str(body.model)

    async def prepare(self, number: int, line: Line) -> LineRequest:
        """The request of a line. Raises ApiError."""
        body = await lines.valid_body(self.endpoint, line.body, self._context.settings.max_request_bytes)
        asked = await self._context.models.admit(body.model, self.endpoint.completion_type)
        request_id, now = self.id_of(number), clock.now()
        accepted = Accepted(
            body,
            len(line.body),
            request_id,
            Client(self._record.key),
            Headers(),
            self.endpoint.completion_type,
            asked,
            now,
        )
        prepared = await self.endpoint.prepare(self._context, accepted)
        # What the endpoint would await is not begun: a line is answered into the log, and nobody waits.
        changes = {
            "reply_to": names.answer_subject(request_id),
            "deadline": self._record.expires_at,
            "tier": Tier.FLEX,
        }
        request = prepared.request.model_copy(update=changes)
        return LineRequest(number, line.custom_id, request, prepared.format(request))

    async def answer(self, line: LineRequest) -> tuple[bytes, Usage]:
        """The line of the output file of a request that has ended, and its tokens. Raises the request's error."""
        answer = await self._context.carried.whole(line.request)
        completed = answer.completed
        assert completed is not None
        body: Any = await off_loop(DELTA_BYTES * answer.unread, line.format.whole, answer.take(), completed)
        fragment = orjson.Fragment(body)
        return lines.answer_line(line.request.id, line.custom_id, 200, fragment), completed.usage
