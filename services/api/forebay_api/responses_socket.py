"""Responses over a WebSocket: each message of the client creates one, and its events are the messages back.

Sources: https://www.openresponses.org/specification, "WebSocket Transport", and
https://platform.openai.com/docs/guides/websocket-mode.
"""

import asyncio
import contextlib
import uuid
from functools import partial
from typing import Final, Literal

import orjson
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from forebay_api.context import Context
from forebay_api.create import Create
from forebay_api.http.errors import ErrorAnswers
from forebay_api.http.peer import Peer
from forebay_api.in_flight.idempotency import HEADER
from forebay_api.openai.responses.body import ResponseBody
from forebay_api.openai.responses.create import respond
from forebay_api.openai.responses.last import Last
from forebay_api.routes import Endpoint
from forebay_contracts.wire.errors import ApiError, ApiStopped, InvalidRequest
from forebay_contracts.wire.request import CompletionType

MAX_AGE_S: Final = 3_600.0
"""A connection takes no more messages after so long, as the specification has it."""

TOO_OLD, BROKEN, STOPPED = 1000, 1011, 1012
"""The codes with which it is closed: at MAX_AGE_S, if the client does not read, and when the api stops."""


class CreateEvent(ResponseBody):
    """A client's message: a response to create. Its stream is this connection."""

    type: Literal["response.create"]
    stream: Literal[True] = True
    background: Literal[False] = False


class ConnectionTooOld(InvalidRequest):
    """A WebSocket takes no more messages: it is an hour old."""

    code = "websocket_connection_limit_reached"


class ResponsesSocket:
    """The ASGI application of these connections."""

    def __init__(self, context: Context, errors: ErrorAnswers) -> None:
        self._context = context
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection. One without a valid key, or of another site's page, gets the error of a request."""
        # An Idempotency-Key of the connection cannot be that of each of its responses.
        headers = [header for header in scope["headers"] if header[0] != HEADER.encode()]
        asked = {**scope, "type": "http", "method": "POST", "headers": headers}
        await receive()
        try:
            self._context.keys.check(Request(asked))
        except ApiError as exc:
            refusal = await self._errors.answer(Request(asked), exc)
            head = {"type": "websocket.http.response.start", "status": refusal.status_code}
            await send(head | {"headers": refusal.raw_headers})
            await send({"type": "websocket.http.response.body", "body": refusal.body})
            return
        await send({"type": "websocket.accept"})
        await _Connection(asked, self._context, self._errors, send).serve(receive)


class _Connection:
    """Serves one message after the other, each as a POST of its own."""

    def __init__(self, scope: Scope, context: Context, errors: ErrorAnswers, send: Send) -> None:
        self._scope = scope
        self._errors = errors
        self._send = send
        self._peer = Peer()
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        prepare = partial(respond, last=Last())
        self._create = Create(
            Endpoint("POST", scope["path"], CompletionType.CHAT, CreateEvent, prepare, "[Responses]"), context
        )

    async def serve(self, receive: Receive) -> None:
        """Until the client leaves, the api stops, or the connection is too old."""
        reading = asyncio.create_task(self._read(receive))
        ends_at = asyncio.get_running_loop().time() + MAX_AGE_S
        code = STOPPED
        try:
            while (data := await self._next(ends_at)) is not None and not self._peer.left:
                if not await self._turn(data):
                    code = BROKEN
                    break
        except TimeoutError:
            await self._refuse(self._turns_scope(), ConnectionTooOld("Open a new connection: this one is an hour old."))
            code = TOO_OLD
        finally:
            reading.cancel()
        with contextlib.suppress(OSError):
            await self._send({"type": "websocket.close", "code": code})

    async def _next(self, ends_at: float) -> bytes | None:
        async with asyncio.timeout_at(ends_at):
            return await self._messages.get()

    async def _read(self, receive: Receive) -> None:
        while (message := await receive())["type"] == "websocket.receive":
            text = message.get("text")
            await self._messages.put(message["bytes"] if text is None else text.encode())
        if message["type"] == "websocket.disconnect":
            self._peer.leave()
        await self._messages.put(None)

    def _turns_scope(self) -> Scope:
        scope = {**self._scope, "state": {"request_id": str(uuid.uuid4())}}
        self._peer.extend(scope)
        return scope

    async def _turn(self, data: bytes) -> bool:
        """Create one response; whether all of it was sent."""
        scope, ended = self._turns_scope(), False

        async def receive() -> Message:
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.body":
                for event in message["body"].split(b"\n\n")[:-1]:
                    await self._say(event.partition(b"\ndata: ")[2])
                ended = not message["more_body"]

        try:
            await self._create(scope, receive, send)
        except (Exception, asyncio.CancelledError) as exc:
            # uvicorn cancels what runs at the end of DRAIN_TIMEOUT.
            await self._refuse(scope, ApiStopped() if isinstance(exc, asyncio.CancelledError) else exc)
            return True
        return ended

    async def _refuse(self, scope: Scope, exc: Exception) -> None:
        refusal = await self._errors.answer(Request(scope), exc)
        error = orjson.loads(refusal.body)["error"]
        error["code"] = error["code"] or error["type"]  # which the specification requires
        await self._say(orjson.dumps({"type": "error", "status": refusal.status_code, "error": error}))

    async def _say(self, event: bytes) -> None:
        with contextlib.suppress(OSError):  # the client has left, as its peer tells
            await self._send({"type": "websocket.send", "text": event.decode()})
