"""The route of every endpoint that queues a request, from the request's body to the end of its answer."""

import asyncio
import contextlib
import logging
from contextlib import AbstractAsyncContextManager
from typing import Final, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from forebay_api.context import Context
from forebay_api.http import sse
from forebay_api.http.bodies import off_loop, read_body, validated
from forebay_api.http.errors import about
from forebay_api.in_flight.answer import ClientLeft, SlowReader
from forebay_api.in_flight.idempotency import HEADER, scoped_key
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_api.openai.format import Format, StreamFormat
from forebay_api.routes import Endpoint
from forebay_contracts.nats import clock
from forebay_contracts.telemetry import tracing
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.frames import Completed
from forebay_contracts.wire.state import RequestStatus

EARLY_HEADER: Final = "forebay-stream"
"""`Forebay-Stream: early` asks for a stream's headers, with the request's id, as soon as the request is queued."""

LOGPROB_BYTES: Final = 1_000
"""About what one token's log probabilities are in JSON."""

log = logging.getLogger(__name__)


class Create:
    """The route of one endpoint.

    Nothing is sent before a worker has begun, so that an error until then is an HTTP status.
    """

    def __init__(self, endpoint: Endpoint, context: Context) -> None:
        self._endpoint = endpoint
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises the ApiError that the client gets instead of an answer."""
        endpoint, context, request = self._endpoint, self._context, Request(scope, receive)
        client = request.state.client = context.keys.check(request)
        data = await read_body(request, context.settings.max_request_bytes)
        size = len(data)
        body = await off_loop(size, validated, endpoint.body, data)
        model = await context.models.admit(body.model, endpoint.completion_type)
        request_id, now = request.state.request_id, clock.now()
        log.info(
            "%s %s received for %s%s",
            endpoint.log_prefix,
            request_id,
            model,
            f" from {client.name}" if client.name else "",
            extra=fields(request_id=request_id, model=model, type=endpoint.completion_type.value, key=client.name),
        )
        if context.settings.log_prompts:
            log.info("%s %s asks %s", endpoint.log_prefix, request_id, body.model_dump_json(exclude_unset=True))
        queued = request.state.queued = await off_loop(
            size,
            body.request,
            id=request_id,
            completion_type=endpoint.completion_type,
            model=model,
            created_at=now,
            deadline=now + context.settings.request_timeout,
            reply_to=names.reply_subject(context.dispatcher.instance, request_id),
            key=client.name,
        )
        early = request.headers.get(EARLY_HEADER) == "early"
        submitted: AbstractAsyncContextManager[LiveAnswer]
        if (key := request.headers.get(HEADER)) is None:
            submitted = context.dispatcher.submit(queued)
        else:
            key = scoped_key(key, request.headers.get("authorization", ""))
            submitted = context.idempotent.attach(queued, key)
        async with submitted as answer:
            # With an Idempotency-Key it may be the answer of an earlier request, which has another id.
            scope["state"]["request_id"] = answer.request.id
            answer_format = endpoint.format(answer.request, body)
            del request, data, body  # It may wait for long: only what it needs is kept.
            leaving = asyncio.create_task(_fail_when_client_leaves(receive, answer))
            try:
                if queued.stream:
                    await (context.dispatcher.registered(queued.id) if early else answer.started())
                    async with sse.EventStream(send, context.settings.stream_keep_alive) as stream:
                        await self._stream(answer, cast(StreamFormat, answer_format), stream, early=early)
                    return
                whole = await self._whole(answer, answer_format)
            finally:
                leaving.cancel()
        await Response(whole, media_type="application/json")(scope, receive, send)

    async def _whole(self, answer: LiveAnswer, answer_format: Format) -> bytes:
        """The whole answer, once it is complete."""
        deltas = [delta async for some in answer.deltas() for delta in some]
        completed = self._log_end(answer)
        size = sum(
            len(delta.text) + len(delta.reasoning) + len(delta.embedding) + LOGPROB_BYTES * len(delta.logprobs)
            for delta in deltas
        )
        return await off_loop(size, answer_format.whole, deltas, completed)

    async def _stream(
        self, answer: LiveAnswer, answer_format: StreamFormat, stream: sse.EventStream, *, early: bool
    ) -> None:
        """Write the answer as events while it comes. An error is the last event; a client that left gets none."""
        with contextlib.suppress(ClientLeft, SlowReader):
            try:
                if early:
                    await stream.write(b": queued\n\n")
                    await answer.started()
                await stream.write(answer_format.opening())
                async for deltas in answer.deltas():
                    await stream.write(b"".join(map(answer_format.chunk, deltas)))
            except (ClientLeft, SlowReader) as exc:
                answer.fail(exc)
                raise
            except ApiError as exc:
                self._log_failure(answer, exc)
                await stream.write(answer_format.failure(exc), last=True)
                return
            assert answer.completed is not None
            await stream.write(answer_format.closing(answer.completed), last=True)
            self._log_end(answer)

    def _log_failure(self, answer: LiveAnswer, error: ApiError) -> None:
        # The code and not the message, which may quote the request.
        code = error.code or error.type
        known = about(answer.request, code=code, attempt=answer.attempt or None)
        log.info("%s %s broke off: %s", self._endpoint.log_prefix, answer.request.id, code, extra=known)
        tracing.fail(code)

    def _log_end(self, answer: LiveAnswer) -> Completed:
        completed, request = answer.completed, answer.request
        assert completed is not None
        tokens = completed.usage.prompt_tokens, completed.usage.completion_tokens
        log.info(
            "%s %s completed in %.3f s: %d + %d tokens, attempt %d",
            self._endpoint.log_prefix,
            request.id,
            max(clock.now() - request.created_at, 0.0),
            *tokens,
            completed.attempt,
            extra=about(
                request,
                attempt=completed.attempt,
                outcome=RequestStatus.COMPLETED.value,
                prompt_tokens=tokens[0],
                completion_tokens=tokens[1],
            ),
        )
        return completed


async def _fail_when_client_leaves(receive: Receive, answer: LiveAnswer) -> None:
    await sse.left(receive)
    answer.fail(ClientLeft("the client left"))
