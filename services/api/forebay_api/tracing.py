"""The span of an HTTP request: an ASGI middleware, there only where traces are sent."""

from typing import Final

from opentelemetry.trace import StatusCode
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forebay_contracts import tracing


class TraceMiddleware:
    """Begins the trace of each request to `paths`, or goes on with the one that its `traceparent` names."""

    def __init__(self, app: ASGIApp, paths: frozenset[str]) -> None:
        self._app: Final = app
        self._paths: Final = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        span = tracing.serve(
            f"{scope['method']} {scope['path']}",
            Headers(scope=scope),
            {
                "http.request.method": scope["method"],
                "url.path": scope["path"],
                "forebay.request_id": scope["state"]["request_id"],
            },
        )
        if not span.is_recording():
            await self._app(scope, receive, send)
            return

        async def noting_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        with tracing.current(span):
            await self._app(scope, receive, noting_status)
