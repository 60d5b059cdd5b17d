"""`POST /v1/chat/completions`, `/v1/completions` and `/v1/embeddings`: one way for all, streamed and not."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from forebay_api.clients.keys import Client
from forebay_api.context import Context, authorized
from forebay_api.http.bodies import read_body
from forebay_api.http.error_answers import ErrorAnswers, about
from forebay_api.in_flight.answer import Answer as PendingAnswer
from forebay_api.in_flight.answer import ClientLeft, SlowReader
from forebay_api.in_flight.idempotency import HEADER, scoped_key
from forebay_api.openai.embeddings import EmbeddingBody, EmbeddingFormat
from forebay_api.openai.formats import ChatFormat, CompletionFormat, Format, WholeFormat, error_event
from forebay_api.openai.schemas import ChatCompletionBody, CompletionBody
from forebay_contracts.telemetry import tracing
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.frames import Completed
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_contracts.wire.state import RequestStatus

LOG_PREFIX = {
    CompletionType.CHAT: "[Chat Completions]",
    CompletionType.COMPLETION: "[Completions]",
    CompletionType.EMBEDDING: "[Embeddings]",
}

EARLY_HEADER = "forebay-stream"
"""`Forebay-Stream: early` asks for the headers of a stream, its id among them, once it is queued."""

MAX_WRITE_STALL_S = 30.0
"""A client whose connection takes nothing for so long is given up."""

Body = TypeVar("Body", ChatCompletionBody, CompletionBody, EmbeddingBody)
Answer = TypeVar("Answer", bound=WholeFormat)

log = logging.getLogger(__name__)


async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    context = await authorized(request)
    queued, answer = await _taken(
        request, context, ChatCompletionBody, lambda queued, body: ChatFormat(queued, include_usage=body.include_usage)
    )
    return await _answer(request, context, queued, answer)


async def create_completion(request: Request) -> Response:
    """Continue a prompt."""
    context = await authorized(request)
    queued, answer = await _taken(
        request,
        context,
        CompletionBody,
        lambda queued, body: CompletionFormat(queued, include_usage=body.include_usage),
    )
    return await _answer(request, context, queued, answer)


async def create_embeddings(request: Request) -> Response:
    """Turn texts into vectors."""
    context = await authorized(request)
    queued, answer = await _taken(
        request,
        context,
        EmbeddingBody,
        lambda queued, body: EmbeddingFormat(queued, base64=body.encoding_format == "base64"),
    )
    return await _whole(request, context, queued, answer)


async def _taken(
    request: Request, context: Context, kind: type[Body], answer: Callable[[InferenceRequest, Body], Answer]
) -> tuple[InferenceRequest, Answer]:
    """The request as it goes into the queue, and how it is answered; the body itself is not kept while it waits."""
    body = await read_body(request, kind, context.settings.max_request_bytes)
    request_id: str = request.state.request_id
    client: Client = request.state.client
    now = time.time()
    model = await context.models.admit(body.model, body.completion_type)
    log.info(
        "%s %s received for %s%s",
        LOG_PREFIX[body.completion_type],
        request_id,
        model,
        f" from {client.name}" if client.name else "",
        extra=fields(request_id=request_id, model=model, type=body.completion_type.value, key=client.name),
    )
    if context.settings.log_prompts:
        log.info(
            "%s %s asks %s", LOG_PREFIX[body.completion_type], request_id, body.model_dump_json(exclude_unset=True)
        )
    queued = body.request(
        request_id=request_id,
        model=model,
        created_at=now,
        deadline=now + context.settings.request_timeout,
        reply_to=names.reply_subject(context.dispatcher.instance, request_id),
        key=client.name,
    )
    request.state.queued = queued
    return queued, answer(queued, body)


async def _answer(request: Request, context: Context, queued: InferenceRequest, answer: Format) -> Response:
    if queued.stream:
        return EventStream(context, queued, answer, _key(request), early=request.headers.get(EARLY_HEADER) == "early")
    return await _whole(request, context, queued, answer)


async def _whole(request: Request, context: Context, queued: InferenceRequest, answer: WholeFormat) -> Response:
    async with _submitted(context, queued, _key(request)) as reply, _Watching(request.receive, reply):
        deltas = [delta async for some in reply.deltas() for delta in some]
    assert reply.completed is not None
    _log_end(queued, reply.completed)
    return Response(answer.whole(deltas, reply.completed), media_type="application/json")


class EventStream(Response):
    """A streamed answer. Nothing is sent before a worker has begun, so that until then an error is a status.

    With `early`, a client that would rather know its id while it waits gets the headers once it is queued.
    """

    def __init__(
        self, context: Context, queued: InferenceRequest, answer: Format, key: str | None, *, early: bool
    ) -> None:
        self._early = early
        self._key = key
        self._context = context
        self._queued = queued
        self._answer = answer
        self.background = None
        self.status_code = 200
        self.body = b""
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})

    def init_headers(self, headers: Any = None) -> None:
        """As Starlette's, without a content length: how long a stream gets is not known."""
        self.raw_headers = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        async with _submitted(self._context, self._queued, self._key) as reply, _Watching(receive, reply):
            if self._early:
                await self._context.dispatcher.registered(self._queued.id)
            else:
                await reply.started()
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # A client that left or does not read gets no end either.
            with contextlib.suppress(ClientLeft, SlowReader):
                await self._send_events(reply, send)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, reply: PendingAnswer, send: Send) -> None:
        async def write(data: bytes) -> None:
            try:
                async with asyncio.timeout(MAX_WRITE_STALL_S):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except TimeoutError:
                raise SlowReader("the client does not read its stream") from None

        try:
            if self._early:
                await write(b": queued\n\n")
                await reply.started()
            await write(self._answer.opening())
            async for deltas in reply.deltas():
                await write(b"".join(map(self._answer.chunk, deltas)))
        except (ClientLeft, SlowReader):
            raise
        except ApiError as exc:
            # Not the message: it may quote the request.
            code = exc.code or exc.type
            known = about(self._queued, code=code)
            if reply.attempt:
                known["fields"]["attempt"] = reply.attempt
            log.info(
                "%s %s broke off: %s", LOG_PREFIX[self._queued.completion_type], self._queued.id, code, extra=known
            )
            tracing.fail(code)
            await write(error_event(exc))
            return
        assert reply.completed is not None
        await write(self._answer.closing(reply.completed))
        _log_end(self._queued, reply.completed)


def _key(request: Request) -> str | None:
    key = request.headers.get(HEADER)
    return None if key is None else scoped_key(key, request.headers.get("authorization", ""))


def _submitted(
    context: Context, queued: InferenceRequest, key: str | None
) -> contextlib.AbstractAsyncContextManager[PendingAnswer]:
    if key is None:
        return context.dispatcher.submit(queued)
    return context.idempotent.attach(queued, key)


class _Watching:
    """Ends the wait for `reply` as soon as the client closes its connection."""

    __slots__ = ("_watcher",)

    def __init__(self, receive: Receive, reply: PendingAnswer) -> None:
        self._watcher = asyncio.create_task(self._watch(receive, reply))

    async def __aenter__(self) -> None:
        """Watch from here on."""

    async def __aexit__(self, *_: object) -> None:
        """No more."""
        self._watcher.cancel()

    @staticmethod
    async def _watch(receive: Receive, reply: PendingAnswer) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        reply.fail(ClientLeft("the client left"))


def _log_end(queued: InferenceRequest, completed: Completed) -> None:
    usage = completed.usage
    log.info(
        "%s %s completed in %.3f s: %d + %d tokens, attempt %d",
        LOG_PREFIX[queued.completion_type],
        queued.id,
        time.time() - queued.created_at,
        usage.prompt_tokens,
        usage.completion_tokens,
        completed.attempt,
        extra=about(
            queued,
            attempt=completed.attempt,
            outcome=RequestStatus.COMPLETED.value,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        ),
    )


ENDPOINTS: Final = {
    "/v1/chat/completions": create_chat_completion,
    "/v1/completions": create_completion,
    "/v1/embeddings": create_embeddings,
}

# What is no POST gets its 405 here.
routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in ENDPOINTS.items()]


class Completions:
    """Serves the completion routes ahead of the application, which serves the rest.

    FastAPI's layers do nothing for them that is not done here, at a quarter of the CPU and of the memory that a
    request costs the api.
    """

    def __init__(self, app: FastAPI, errors: ErrorAnswers) -> None:
        self._app = app
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        endpoint = ENDPOINTS.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        scope["app"] = self._app
        request = Request(scope, receive, send)
        started = False

        async def noting_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            response = await endpoint(request)
            await response(scope, receive, noting_start)
        except Exception as exc:
            answer = await self._errors.answer(request, exc)
            if started:
                raise
            await answer(scope, receive, send)
