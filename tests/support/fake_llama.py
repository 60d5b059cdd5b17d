"""A small HTTP server that speaks llama.cpp's dialect and can be told to misbehave."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web

from forebay_inference.engine.protocol import Tokenizer

Behaviour = Callable[[web.StreamResponse], Awaitable[None]]
"""What it sends instead of an answer, after the head of the response."""


class FakeLlama:
    """Answers with a token each `delay_s`, which tells the length of the sequence. Tests change its attributes.

    `statuses` are answered by path instead. `behaviours` replace the next answers. `steps` is what its metrics tell;
    None: they are not answered. `requests` are the bodies of the answers it was asked for, `closed` counts those whose
    client left.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocabulary_size: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.vocabulary_size = vocabulary_size or tokenizer.vocabulary_size
        self.statuses: dict[str, int] = {}
        self.behaviours: list[Behaviour] = []
        self.delay_s = 0.0
        self.steps: int | str | None = 0
        self.requests: list[dict[str, Any]] = []
        self.closed = 0
        self.connections: set[Any] = set()
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["FakeLlama"]:
        """Serve on a free port."""
        app = web.Application(middlewares=[self._status])
        app.router.add_get("/health", self._json({"status": "ok"}))
        app.router.add_get("/v1/models", self._json({"data": [{"meta": {"n_vocab": self.vocabulary_size}}]}))
        settings = {"n_ctx": 512}
        props = {"build_info": "fake", "default_generation_settings": settings, "model_ftype": "F32", "total_slots": 8}
        app.router.add_get("/props", self._json(props))
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/completion", self._completion)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_post("/v1/rerank", self._rerank)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._site = site
        try:
            yield self
        finally:
            await runner.cleanup()

    async def kill(self) -> None:
        """Listen no more, and break off what runs."""
        await self._site.stop()
        for transport in self.connections:
            if transport is not None:
                transport.abort()

    @web.middleware
    async def _status(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.connections.add(request.transport)
        if (status := self.statuses.get(request.path)) is not None:
            return web.json_response({"error": {"code": status, "message": "no"}}, status=status)
        answer: web.StreamResponse = await handler(request)
        return answer

    def _json(self, value: object) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            return web.json_response(value)

        return handle

    async def _metrics(self, request: web.Request) -> web.Response:
        if self.steps is None:
            await asyncio.Event().wait()
        return web.Response(text=f"llamacpp:n_decode_total {self.steps}\n")

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        tokens = self.tokenizer.encode(body["content"], special_tokens=body["add_special"])
        return web.json_response({"tokens": tokens})

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body.get("ignore_eos") and "stream" not in body:
            return web.json_response({"generation_settings/logit_bias": [{"token": 257, "bias": None}]})
        if "7" in body.get("grammar", ""):
            return web.json_response({"content": "7"})
        self.requests.append(body)
        return await self._respond(request, lambda response: self._answer(response, body))

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        """Vectors of two numbers: the first token and the count of tokens; the last one first."""
        body = await request.json()
        self.requests.append(body)

        async def answer(response: web.StreamResponse) -> None:
            await asyncio.sleep(self.delay_s)
            data = [{"index": place, "embedding": [ids[0], len(ids)]} for place, ids in enumerate(body["input"])]
            await response.write(json.dumps({"data": data[::-1]}).encode())

        return await self._respond(request, answer)

    async def _rerank(self, request: web.Request) -> web.StreamResponse:
        """The length of a document less that of the query is its score; a token a character; the last one first."""
        body = await request.json()
        self.requests.append(body)

        async def answer(response: web.StreamResponse) -> None:
            await asyncio.sleep(self.delay_s)
            query, documents = body["query"], body["documents"]
            scored = [
                {"index": place, "relevance_score": len(text) - len(query)} for place, text in enumerate(documents)
            ]
            usage = {"total_tokens": sum(len(query + text) for text in documents)}
            await response.write(json.dumps({"results": scored[::-1], "usage": usage}).encode())

        return await self._respond(request, answer)

    async def _respond(self, request: web.Request, answer: Behaviour) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await (self.behaviours.pop(0) if self.behaviours else answer)(response)
        except (asyncio.CancelledError, ConnectionResetError):
            self.closed += 1
            raise
        return response

    async def _answer(self, response: web.StreamResponse, body: dict[str, Any]) -> None:
        for count in range(1, body["n_predict"] + 1):
            await asyncio.sleep(self.delay_s)
            await send(response, [10 + (len(body["prompt"]) + count) % 200], count)
        await send(response, [], body["n_predict"], stop="limit")


async def send(response: web.StreamResponse, tokens: Sequence[int], count: int, *, stop: str | None = None) -> None:
    """One event, after which `count` tokens are generated."""
    event = {"content": "", "tokens": list(tokens), "tokens_predicted": count, "stop": stop is not None}
    if stop is not None:
        event |= {"stop_type": stop, "timings/cache_n": 3}
    await response.write(b"data: " + web.json_response(event).body + b"\n\n")  # type: ignore[operator]
