"""Headers of every answer: an ASGI middleware, so that errors and streams carry them too."""

import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forebay_api.context import Context

REQUEST_ID_HEADER = "x-request-id"


class HeadersMiddleware:
    """Gives each HTTP request an id (`request.state.request_id`) and returns it as `x-request-id`.

    An api that is about to leave asks its clients to connect anew: by then they reach another.
    """

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                # A browser takes an answer for what its content type says, and for no script or page.
                headers["x-content-type-options"] = "nosniff"
                if self._context.draining:
                    headers["connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_with_id)
