"""What surrounds every request: the headers of its answer, and its span where traces are on."""

import uuid
from collections.abc import Awaitable
from typing import Final

from opentelemetry.trace import Span
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forebay_api.context import Context
from forebay_contracts.telemetry import tracing

_TRACE_CONTEXT: Final = (b"traceparent", b"tracestate")

REQUEST_ID_HEADER: Final = b"x-request-id"

_NO_SNIFFING: Final = (b"x-content-type-options", b"nosniff")
"""Keeps browsers from taking an answer for a script or a page."""


class HeadersMiddleware:
    """Gives each request an id (`request.state.request_id`) and returns it as `x-request-id`."""

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        state = scope.setdefault("state", {})
        state["request_id"] = str(uuid.uuid4())

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (REQUEST_ID_HEADER, state["request_id"].encode()), _NO_SNIFFING]
                if (client := state.get("client")) is not None and client.limited:
                    headers += self._context.limits.headers(client)
                if self._context.draining:
                    # The client's next connection reaches another api.
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        await self._app(scope, receive, send_with_headers)


class TraceMiddleware:
    """Begins the trace of each request to `paths`, or continues the trace of its `traceparent`."""

    def __init__(self, app: ASGIApp, paths: frozenset[str]) -> None:
        self._app: Final = app
        # Name and attributes of the span by path, made once and not for each request.
        self._spans: Final = {
            path: (f"POST {path}", {"http.request.method": "POST", "url.path": path}) for path in paths
        }

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """The ASGI call."""
        served = self._spans.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if served is None:
            return self._app(scope, receive, send)
        context = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _TRACE_CONTEXT}
        span = tracing.serve(*served, context)
        if not span.is_recording():
            return self._app(scope, receive, send)
        span.set_attribute("forebay.request_id", scope["state"]["request_id"])
        return self._recorded(span, scope, receive, send)

    async def _recorded(self, span: Span, scope: Scope, receive: Receive, send: Send) -> None:
        async def noting_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    tracing.fail(span=span)
            await send(message)

        with tracing.current(span):
            await self._app(scope, receive, noting_status)
