"""Everything is replaced, one after the other, under load: no client sees an error."""

import asyncio

import httpx
import openai

from support.nats import NatsServer
from support.service import Api
from support.stack import MODEL, Stack, running

EXPECTED = " ".join(f"t{token}" for token in range(10))


class Balancer:
    """Chooses among ready apis as a load balancer does: by asking each whether it is ready.

    Where none is, it keeps to those that were, as a balancer's panic mode does: while NATS restarts every
    api is unready at once, and each still takes requests and holds them until NATS is back.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._turn = 0
        self._clients: dict[int, openai.AsyncOpenAI] = {}
        self.ready: list[int] = []

    async def probe(self) -> None:
        """Look once who is ready."""
        ready = []
        for index, api in enumerate(self._stack.apis):
            if api.id and api.returncode is None and await self._is_ready(api):
                ready.append(index)
        self.ready = ready or self.ready

    async def probe_until(self, stop: asyncio.Event) -> None:
        """Look every 100 ms."""
        while not stop.is_set():
            await self.probe()
            await asyncio.sleep(0.1)

    def pick(self) -> openai.AsyncOpenAI:
        """A client of the next ready api."""
        self._turn += 1
        index = self.ready[self._turn % len(self.ready)]
        if index not in self._clients:
            self._clients[index] = self._stack.openai(index)
        return self._clients[index]

    async def _is_ready(self, api: Api) -> bool:
        try:
            return (await self._stack.http.get(f"{api.url}/health/ready", timeout=2)).status_code == 200
        except httpx.HTTPError:
            return False


async def test_rolling_restart_of_everything_fails_nothing(nats_server: NatsServer) -> None:
    limits = {"max_concurrent_requests": 16, "worker_slots": 8}
    async with running(nats_server, apis=2, workers=2, shutdown_delay=3, admission_patience=60, **limits) as stack:
        balancer, stop = Balancer(stack), asyncio.Event()
        await balancer.probe()
        probing = asyncio.create_task(balancer.probe_until(stop))

        async def client(stream: bool) -> int:
            answered = 0
            while not stop.is_set():
                sdk = balancer.pick()
                messages = [{"role": "user", "content": "[[tokens=10 delay_ms=20]]"}]
                answer = await sdk.chat.completions.create(model=MODEL, messages=messages, stream=stream)
                if stream:
                    text = "".join([chunk.choices[0].delta.content or "" async for chunk in answer])
                else:
                    text = answer.choices[0].message.content
                assert text == EXPECTED
                answered += 1
            return answered

        clients = [asyncio.create_task(client(stream=bool(n % 2))) for n in range(8)]
        for old in list(stack.workers):
            await stack.worker()
            assert await old.stop() == 0
        for old_api in list(stack.apis):
            await stack.api()
            await balancer.probe()
            assert await old_api.stop() == 0
        await asyncio.to_thread(nats_server.restart)
        await stack.beats(stack.apis[-1])
        stop.set()
        assert sum(await asyncio.gather(*clients)) > 20
        await probing
        await stack.idle(api=3)
        status = await stack.status(api=3)
        assert status["total_failed"] == status["total_cancelled"] == 0
        assert status["total_processed"] == status["total_queued"]
