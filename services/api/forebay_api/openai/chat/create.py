"""How a chat completion is made: with `store`, its record is kept and its answer goes into the log."""

from contextlib import AbstractAsyncContextManager

from forebay_api.context import Context
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_api.in_flight.records import key_of
from forebay_api.openai.chat.format import ChatFormat
from forebay_api.openai.chat.record import KIND, ChatRecord
from forebay_api.prepare import Accepted, Prepared, live
from forebay_contracts.wire import names
from forebay_contracts.wire.request import InferenceRequest

_unstored = live(ChatFormat)


async def complete(context: Context, accepted: Accepted) -> Prepared:
    """A chat completion. With `store` it is kept: it outlives its client and its api."""
    body = accepted.body
    if not body.store:
        return await _unstored(context, accepted)
    request = await accepted.request(
        reply_to=names.answer_subject(accepted.id), timeout_s=context.settings.request_timeout
    )

    def begin(request: InferenceRequest) -> AbstractAsyncContextManager[LiveAnswer]:
        record = ChatRecord(
            request_id=request.id,
            key=request.key,
            created_at=request.created_at,
            deadline=request.deadline,
            model=request.named_model,
            messages=request.messages,
            logprobs=request.sampling.logprobs,
            return_prompt=request.return_prompt,
            metadata=body.metadata or {},
            tier=request.tier,
        )
        return context.stored.submit(request, key_of(KIND, request.key, request.id), record)

    key = accepted.idempotency_key
    answered = begin(request) if key is None else context.idempotent.attach(request, key, begin)
    return Prepared(request, lambda answered: ChatFormat(answered, body), answered)
