"""A receiver of webhooks: a real HTTP server that verifies each post with the OpenAI SDK."""

import asyncio
import base64
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import openai
from aiohttp import web

from support.ports import port_of

SECRET = "whsec_" + base64.b64encode(b"a secret of Standard Webhooks").decode()


@functools.cache
def sdk() -> openai.OpenAI:
    """The SDK. It asks nobody."""
    return openai.OpenAI(api_key="none")


class Receiver:
    """Takes posts at `url`. `answer` gives the status of the next post; `posts` holds the ids of all posts."""

    def __init__(self) -> None:
        self.port = port_of(self)
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self.answer: Callable[[], Awaitable[int]] = self.take
        self.posts: list[str] = []
        self.taken: list[Any] = []
        """The events that were answered with 200, as the SDK has made them."""
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    async def take(self) -> int:
        """Say 200."""
        return 200

    async def start(self) -> None:
        """Listen."""
        app = web.Application()
        app.router.add_post("/hook", self._posted)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def receives(self, count: int, timeout_s: float = 30) -> list[Any]:
        """Wait until so many events are taken. One that was posted again counts once, and is given as often."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: len({event.id for event in self.taken}) >= count)
        return self.taken

    async def _posted(self, request: web.Request) -> web.Response:
        body = await request.text()
        event = sdk().webhooks.unwrap(body, request.headers, secret=SECRET)
        self.posts.append(event.id)
        status = await self.answer()
        if status == 200:
            async with self._changed:
                self.taken.append(event)
                self._changed.notify_all()
        return web.Response(status=status, headers={"location": self.url})


@contextlib.asynccontextmanager
async def receivers(*names: str, down: tuple[str, ...] = ()) -> AsyncIterator[dict[str, Receiver]]:
    """Receivers by name, which listen, except those that are `down`."""
    made = {name: Receiver() for name in names}
    try:
        for name, receiver in made.items():
            if name not in down:
                await receiver.start()
        yield made
    finally:
        await asyncio.gather(*(receiver.stop() for receiver in made.values()))


def written(made: dict[str, Receiver], **fields: str) -> str:
    """WEBHOOKS_FILE for these; `fields` are lines of each."""
    lines = "".join(f"{name} = {value}\n" for name, value in fields.items())
    return "\n".join(f'[{name}]\nurl = "{one.url}"\nsecret = "{SECRET}"\n{lines}' for name, one in made.items())
