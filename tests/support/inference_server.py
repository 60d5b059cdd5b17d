"""An inference server that answers what a test tells it to."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

Events = Iterable[Any]
"""What is streamed as server-sent events. A number is a pause in seconds; `...` breaks the connection off."""


class Raw(bytes):
    """An event as it stands on the wire."""


class InferenceServer:
    """`answers` holds by path a JSON value, a `web.Response`, or a function of the body that returns one of these or
    Events, as a generator or a list. `asked` are the bodies that came, with their paths, and `headers` those of the
    last one; `left` is set once a client has left a stream."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = dict(answers)
        self.asked: list[tuple[str, Any]] = []
        self.headers: Mapping[str, str] = {}
        self.left = asyncio.Event()
        self.url = ""

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.path, body))
        self.headers = request.headers
        answer = self.answers.get(request.path, web.Response(status=404))
        if isinstance(answer, Callable):  # type: ignore[arg-type]
            answer = answer(body)
        if isinstance(answer, web.StreamResponse):
            return answer
        if isinstance(answer, bytes):
            return web.Response(body=answer)
        if isinstance(answer, dict):
            return web.json_response(answer)
        return await self._stream(request, answer)

    async def _stream(self, request: web.Request, events: Events) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for event in events:
                if isinstance(event, int | float):
                    await asyncio.sleep(event)
                elif event is ...:
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                elif isinstance(event, Raw):
                    await response.write(event)
                else:
                    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionResetError, asyncio.CancelledError):
            self.left.set()
            raise
        return response


@asynccontextmanager
async def inference_server(answers: Mapping[str, Any]) -> AsyncIterator[InferenceServer]:
    """A server on a free port of this machine."""
    server = InferenceServer(answers)
    app = web.Application(client_max_size=1 << 26)
    app.router.add_route("*", "/{path:.*}", server._answer)
    listening = TestServer(app)
    await listening.start_server()
    server.url = str(listening.make_url("")).rstrip("/")
    try:
        yield server
    finally:
        await listening.close()
