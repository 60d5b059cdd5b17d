"""The HTTP of every peer: OpenAI's chat completions over something that answers. As little as serves the load."""

import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

Whole = Callable[[bytes], Awaitable[str]]
Stream = Callable[[bytes], AsyncIterator[str]]
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def serve(port: int, whole: Whole, stream: Stream | None = None, lifespan: Lifespan | None = None) -> None:
    """Serve until the process is ended."""

    async def chat(request: Request) -> Response:
        raw = await request.body()
        body = orjson.loads(raw)
        head = {"id": f"chatcmpl-{uuid.uuid4()}", "created": int(time.time()), "model": body["model"]}
        if body.get("stream"):
            assert stream is not None, "this one does not stream"
            counted = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(events(head, stream(raw), counted), media_type="text/event-stream")
        message = {"role": "assistant", "content": await whole(raw)}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        return Response(orjson.dumps(answer), media_type="application/json")

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])], lifespan=lifespan)
    uvicorn.run(app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", log_level="error", access_log=False)


async def events(head: dict[str, Any], texts: AsyncIterator[str], counted: bool) -> AsyncIterator[bytes]:
    """Server-sent events of a stream; `counted` adds the usage as their last."""
    head, tokens = {**head, "object": "chat.completion.chunk"}, 0

    def event(delta: dict[str, str], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return b"data: " + orjson.dumps({**head, "choices": [choice]}) + b"\n\n"

    yield event({"role": "assistant", "content": ""})
    async for text in texts:
        tokens += 1
        yield event({"content": text})
    yield event({}, "stop")
    if counted:
        usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
        yield b"data: " + orjson.dumps({**head, "choices": [], "usage": usage}) + b"\n\n"
    yield b"data: [DONE]\n\n"


def port() -> int:
    """The first argument of every peer."""
    return int(sys.argv[1])
