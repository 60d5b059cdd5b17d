"""How a response is made: what it goes on from, what is stored of it, and where its answer goes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from forebay_api.context import Context
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_api.openai.format import Format
from forebay_api.openai.responses.format import CompactFormat, InputTokensFormat, ResponseFormat
from forebay_api.openai.responses.last import Last
from forebay_api.prepare import Accepted, Prepared
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import InferenceRequest


async def respond(context: Context, accepted: Accepted, last: Last | None = None) -> Prepared:
    """A response. One that is stored or has an Idempotency-Key is answered into the log, any other to this api.

    `last`: the last response of the connection, if that is a WebSocket.
    """
    body, settings, key = accepted.body, context.settings, accepted.idempotency_key
    before, items = await _conversation(context, accepted, last)
    request = await accepted.request(
        (*before, *items),
        reply_to=(
            names.answer_subject(accepted.id)
            if body.store or key is not None
            else names.reply_subject(context.dispatcher.instance, accepted.id)
        ),
        timeout_s=settings.background_timeout if body.background else settings.request_timeout,
    )
    if body.background and context.webhooks.wanted(request.key, "response"):
        request = request.model_copy(update={"notify": True})

    def begin(request: InferenceRequest) -> AbstractAsyncContextManager[LiveAnswer]:
        if body.store:
            return context.responses.submit(body.record(items, request), request)
        return context.dispatcher.submit(request) if key is None else context.stored.submit(request)

    def writer(answered: InferenceRequest) -> ResponseFormat:
        made = ResponseFormat(body.record(items, answered))
        if last is not None and not body.store:
            last.keep((*before, *items), made)
        return made

    if key is None:
        answered = begin(request)
    else:
        asked = body.model_dump_json(exclude_unset=True)
        answered = context.idempotent.attach(request, key, begin, asked)
    at_once = (lambda answered: writer(answered).waiting()) if body.background and not body.stream else None
    return Prepared(request, writer, answered, begins_after_s=0, at_once=at_once)


async def count_input(context: Context, accepted: Accepted) -> Prepared:
    """The number of tokens of an input."""
    before, items = await _conversation(context, accepted)
    return await _live(context, accepted, (*before, *items), lambda _: InputTokensFormat())


async def compact(context: Context, accepted: Accepted) -> Prepared:
    """A compacted conversation."""
    before, items = await _conversation(context, accepted)
    known = (*before, *items)
    return await _live(context, accepted, known, lambda answered: CompactFormat(answered, known))


async def _live(
    context: Context,
    accepted: Accepted,
    items: Sequence[Mapping[str, Any]],
    writer: Callable[[InferenceRequest], Format],
) -> Prepared:
    """Answered to this api, and nothing of it stored."""
    reply_to = names.reply_subject(context.dispatcher.instance, accepted.id)
    request = await accepted.request(items, reply_to=reply_to, timeout_s=context.settings.request_timeout)
    return Prepared(request, writer, context.dispatcher.submit(request))


async def _conversation(
    context: Context, accepted: Accepted, last: Last | None = None
) -> tuple[list[dict[str, Any]], tuple[dict[str, Any], ...]]:
    """The items before the input, and those of the input."""
    body, owner = accepted.body, accepted.client.name
    before = last.take(body.previous_response_id) if last is not None else None
    if before is None:
        before = await context.responses.before(owner, body)
    elif body.store:
        raise InvalidRequest("A response that is stored cannot go on from one that is not.", param="store")
    known = {item["id"]: item for item in before}
    known |= await context.responses.referenced(owner, body.references, known)
    return before, body.items(accepted.id, known)
