"""Headers of every answer, errors and streams included."""

import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forebay_api.context import Context

REQUEST_ID_HEADER = "x-request-id"


class HeadersMiddleware:
    """Gives each request an id (`request.state.request_id`) and returns it as `x-request-id`."""

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        request_id = str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                # Keeps browsers from taking an answer for a script or a page.
                headers["x-content-type-options"] = "nosniff"
                if self._context.draining:
                    # The client's next connection reaches another api.
                    headers["connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_with_headers)
