"""How a response is made: what it goes on from, what is stored of it, and where its answer goes."""

from forebay_api.context import Context
from forebay_api.openai.responses.format import InputTokensFormat, ResponseFormat
from forebay_api.prepare import Accepted, Prepared
from forebay_contracts.wire import names


async def respond(context: Context, accepted: Accepted) -> Prepared:
    """A response. A stored one is answered into the log, any other to this api."""
    body, settings = accepted.body, context.settings
    before, items = await _conversation(context, accepted)
    request = await accepted.request(
        (*before, *items),
        reply_to=(
            names.answer_subject(accepted.id)
            if body.store
            else names.reply_subject(context.dispatcher.instance, accepted.id)
        ),
        timeout_s=settings.background_timeout if body.background else settings.request_timeout,
    )
    if body.background and context.webhooks.wanted(request.key, "response"):
        request = request.model_copy(update={"notify": True})
    record = body.record(items, request)
    answered = context.responses.submit(record, request) if body.store else context.dispatcher.submit(request)
    writer = ResponseFormat(record)
    at_once = writer.waiting if body.background and not body.stream else None
    return Prepared(request, lambda _: writer, answered, begins_after_s=0, at_once=at_once)


async def count_input(context: Context, accepted: Accepted) -> Prepared:
    """The number of tokens of an input."""
    before, items = await _conversation(context, accepted)
    reply_to = names.reply_subject(context.dispatcher.instance, accepted.id)
    request = await accepted.request((*before, *items), reply_to=reply_to, timeout_s=context.settings.request_timeout)
    return Prepared(request, lambda _: InputTokensFormat(), context.dispatcher.submit(request))


async def _conversation(
    context: Context, accepted: Accepted
) -> tuple[list[dict[str, object]], tuple[dict[str, object], ...]]:
    """The items before the input, and those of the input."""
    before = await context.responses.before(accepted.client.name, accepted.body)
    known = {item["id"]: item for item in before}
    known |= await context.responses.referenced(accepted.client.name, accepted.body.references, known)
    return before, accepted.body.items(accepted.id, known)
