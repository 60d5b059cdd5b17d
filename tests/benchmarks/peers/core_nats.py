"""`core_nats.py PORT NATS_URL [worker]`: request and reply over core NATS. Nothing is stored, and nobody is counted.

With `worker`, the one who answers; otherwise the HTTP before it. A stream is one message a token on a reply subject,
as Forebay has it, and an empty one at its end.
"""

import asyncio
import contextlib
import json
import sys
import uuid
from collections.abc import AsyncIterator

import nats
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg
from starlette.applications import Starlette

from benchmarks.peers import http_app, simulated

_URL = sys.argv[2]
_PREFIX = f"peer.replies.{uuid.uuid4().hex}"
_client = Client()
_waiting: dict[str, asyncio.Queue[bytes]] = {}


async def whole(body: bytes) -> str:
    """One request, one reply."""
    return (await _client.request("peer.whole", body, timeout=60)).data.decode()


async def stream(body: bytes) -> AsyncIterator[str]:
    """One request, a reply for each token."""
    key = uuid.uuid4().hex
    pieces = _waiting[key] = asyncio.Queue()
    try:
        await _client.publish("peer.stream", body, reply=f"{_PREFIX}.{key}")
        while piece := await pieces.get():
            yield piece.decode()
    finally:
        del _waiting[key]


@contextlib.asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """Connected."""
    await _client.connect(_URL)

    async def replied(msg: Msg) -> None:
        _waiting[msg.subject.rpartition(".")[2]].put_nowait(msg.data)

    await _client.subscribe(f"{_PREFIX}.*", cb=replied)
    yield
    await _client.close()


async def work() -> None:
    """Answer, as many at once as come."""
    client = await nats.connect(_URL)
    tasks: set[asyncio.Task[None]] = set()

    async def answered(msg: Msg) -> None:
        await msg.respond((await simulated.answer(msg.data)).encode())

    async def streamed(msg: Msg) -> None:
        async for piece in simulated.pieces(json.loads(msg.data)):
            await msg.respond(piece.encode())
        await msg.respond(b"")

    for subject, handle in (("peer.whole", answered), ("peer.stream", streamed)):

        async def begin(msg: Msg, handle: object = handle) -> None:
            task = asyncio.create_task(handle(msg))  # type: ignore[operator]
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        await client.subscribe(subject, queue="workers", cb=begin)
    await client.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    if "worker" in sys.argv:
        uvloop.run(work())
    else:
        http_app.serve(http_app.port(), whole, stream, lifespan)
