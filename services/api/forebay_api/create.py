"""The route of every endpoint that queues a request, from the request's body to the end of its answer."""

import asyncio
import logging
from typing import Final, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from forebay_api.context import Context
from forebay_api.http import sse
from forebay_api.http.bodies import off_loop, read_body, validated
from forebay_api.http.errors import about
from forebay_api.http.peer import Peer
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_api.openai.format import Format, StreamWriter
from forebay_api.prepare import Accepted
from forebay_api.routes import Endpoint
from forebay_api.streaming import write_stream
from forebay_contracts.nats import clock
from forebay_contracts.telemetry import tracing
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ApiError, LoopDetected
from forebay_contracts.wire.frames import Completed
from forebay_contracts.wire.state import RequestStatus

EARLY_HEADER: Final = "forebay-stream"
"""`Forebay-Stream: early` asks for a stream's headers, with the request's id, as soon as the request is queued."""

LOGPROB_BYTES: Final = 1_000
"""About what one token's log probabilities are in JSON."""

MAX_FORWARDS: Final = 8
"""Forebays that may wait for the answer to one request, each for the next."""

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
        context, request = self._context, Request(scope, receive)
        prepared = await self._endpoint.prepare(context, await self._accepted(request))
        queued, answered, begins_after_s = prepared.request, prepared.answered, prepared.begins_after_s
        request.state.queued = queued
        early = request.headers.get(EARLY_HEADER) == "early"
        async with answered as answer:
            # With an Idempotency-Key it may be the answer of an earlier request, which has another id.
            scope["state"]["request_id"] = answer.request.id
            writer, at_once = prepared.format(answer.request), prepared.at_once
            del request, prepared  # It may wait for long: only what it needs is kept.
            if at_once is not None:
                whole = at_once(answer.request)
            else:
                peer = Peer.of(scope)
                peer.watch(answer.leave)
                try:
                    if queued.stream:
                        if early:
                            await context.dispatcher.registered(queued.id)
                        else:
                            early = not await _started(answer, begins_after_s)
                        await self._stream(answer, cast(StreamWriter, writer), send, early=early)
                        return
                    whole = await self._whole(answer, writer)
                finally:
                    peer.forget(answer.leave)
        await Response(whole, media_type="application/json")(scope, receive, send)

    async def _accepted(self, request: Request) -> Accepted:
        """Who asks, and for what. Raises what the client did wrong."""
        endpoint, context = self._endpoint, self._context
        client = request.state.client = context.keys.check(request)
        data = await read_body(request, context.settings.max_request_bytes)
        body = await off_loop(len(data), validated, endpoint.body, data)
        asked = await context.models.admit(body.model, endpoint.completion_type)
        forwarded: tuple[str, ...] = ()
        if (told := request.headers.get(names.HTTP_FORWARDED)) is not None:
            forwarded = tuple(filter(names.is_request_id, told.split(",")))
            await self._refuse_own(forwarded, asked.model)
        request_id = request.state.request_id
        log.info(
            "%s %s received for %s%s",
            endpoint.log_prefix,
            request_id,
            asked.model,
            f" from {client.name}" if client.name else "",
            extra=fields(
                request_id=request_id, model=asked.model, type=endpoint.completion_type.value, key=client.name
            ),
        )
        if context.settings.log_prompts:
            log.info("%s %s asks %s", endpoint.log_prefix, request_id, body.model_dump_json(exclude_unset=True))
        return Accepted(
            body,
            len(data),
            request_id,
            client,
            request.headers,
            endpoint.completion_type,
            asked,
            clock.now(),
            forwarded,
        )

    async def _refuse_own(self, forwarded: tuple[str, ...], model: str) -> None:
        """Refuse what waits here for `model` already, under one of the ids of `forwarded`; raises LoopDetected."""
        context = self._context
        if len(forwarded) > MAX_FORWARDS:
            raise LoopDetected(f"The request was passed on more than {MAX_FORWARDS} times.")
        for outer in forwarded:
            if (waiting := context.dispatcher.waiting.get(outer)) is not None:
                again = waiting.request.model == model
            else:
                stored = await context.states.get(outer)
                again = stored is not None and not stored.state.status.final and stored.state.model == model
            if again:
                raise LoopDetected("ENGINE_URL of a worker leads back to where the request has come from.")

    async def _whole(self, answer: LiveAnswer, answer_format: Format) -> bytes:
        """The whole answer, once it is complete."""
        deltas = [delta async for some in answer.deltas() for delta in some]
        completed = self._log_end(answer)
        size = sum(
            len(delta.text) + len(delta.reasoning) + len(delta.embedding) + LOGPROB_BYTES * len(delta.logprobs)
            for delta in deltas
        )
        return await off_loop(size, answer_format.whole, deltas, completed)

    async def _stream(self, answer: LiveAnswer, writer: StreamWriter, send: Send, *, early: bool) -> None:
        async with sse.EventStream(send, self._context.settings.stream_keep_alive, writer.keep_alive) as stream:
            error = await write_stream(answer, writer, stream, early=early)
        if error is not None:
            self._log_failure(answer, error)
        elif answer.completed is not None:
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


async def _started(answer: LiveAnswer, within_s: float | None) -> bool:
    """Whether a worker has begun within this time (None: for ever). Raises the request's error if it has ended."""
    if within_s == 0:
        return False
    try:
        async with asyncio.timeout(within_s):
            await answer.started()
    except TimeoutError:
        return False
    return True
