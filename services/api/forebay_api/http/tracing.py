"""The span of an HTTP request, by an ASGI middleware that is installed only where traces are on."""

from collections.abc import Awaitable
from typing import Final

from opentelemetry.trace import Span
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forebay_contracts.telemetry import tracing

_CONTEXT: Final = {b"traceparent": "traceparent", b"tracestate": "tracestate"}


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
        context = {_CONTEXT[name]: value.decode("latin-1") for name, value in scope["headers"] if name in _CONTEXT}
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
