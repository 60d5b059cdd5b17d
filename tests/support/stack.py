"""The whole system as real processes: nats-server, apis, workers, each to be killed, paused and counted."""

import asyncio
import contextlib
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
import openai
from nats.errors import TimeoutError as NatsTimeoutError

from forebay_contracts.nats.connection import Connection, connect
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire import names
from forebay_contracts.wire.state import RequestState, RequestStatus
from support.heartbeats import Heartbeats
from support.nats import flushed
from support.service import START_TIMEOUT_S, Api, Service, Worker

MODEL = "SmolLM2-135M-Instruct"


class HasUrl(Protocol):
    """A NATS server, a cluster, or a proxy before one."""

    @property
    def url(self) -> str:
        """What NATS_URL must be."""
        ...


class Stack:
    """A nats-server with apis and workers on the simulated engine, unless settings say otherwise."""

    def __init__(self, nats: HasUrl, **settings: Any) -> None:
        self.nats = nats
        self.apis: list[Api] = []
        self.workers: list[Worker] = []
        self.clients: list[openai.AsyncOpenAI] = []
        self.http: httpx.AsyncClient
        self.connection: Connection
        self.states: KeyValueStateStore
        self.heartbeats = Heartbeats()
        self.played: list[asyncio.Task[None]] = []
        """Services that a test plays, until the end of the stack."""
        self._starting_api = asyncio.Lock()
        self._settings = {"inference_engine": "simulated", "request_timeout": 60, "ack_wait": 2, **settings}

    def env(self, **settings: Any) -> dict[str, str]:
        """The environment of a service, `settings` over those of the stack."""
        merged = self._settings | {"nats_url": self.nats.url, "api_port": 0} | settings
        return (
            {k: v for k, v in os.environ.items() if k.upper() != k or "_" not in k or k == "DATA_DIR"}
            | {
                "PYTHONWARNINGS": "default",
                "HOME": os.environ.get("HOME", "/"),
            }
            | {name.upper(): str(value) for name, value in merged.items()}
        )

    async def api(self, **settings: Any) -> Api:
        """Start another api, and return when it takes requests."""
        api = Api(self.env(**settings))
        self.apis.append(api)
        async with self._starting_api:  # one at a time: nothing else tells whose heartbeat is whose
            began, known = time.time() + settings.get("clock_ahead_s", 0), frozenset(self.heartbeats.apis)
            await api.launch()
            heard = self.heartbeats.until(lambda: self.heartbeats.api_since(began, known))
            api.id = await api.unless_it_ends(heard)
        return api

    async def worker(self, *, within_s: float = START_TIMEOUT_S, **settings: Any) -> Worker:
        """Start another worker, and return when it serves."""
        worker = await self.launched_worker(**settings)
        await self.serves(worker, within_s)
        return worker

    async def launched_worker(self, **settings: Any) -> Worker:
        """Start another worker without waiting until it serves."""
        worker = Worker(self.env(**settings))
        self.workers.append(worker)
        await worker.launch()
        return worker

    async def serves(self, worker: Worker, within_s: float = START_TIMEOUT_S) -> None:
        """Wait until a worker that was launched says that it is ready."""
        heard = self.heartbeats.until(lambda: self.heartbeats.ready_worker(worker.pid))
        worker.id = await worker.unless_it_ends(heard, within_s)

    async def beats(self, service: Service) -> None:
        """Wait for the next heartbeat of a service: its event loop runs, and it has a connection to NATS."""
        before = self.heartbeats.heard[service.id]
        heard = self.heartbeats.until(lambda: self.heartbeats.heard[service.id] > before or None)
        await service.unless_it_ends(heard)

    async def becomes_idle(self, worker: Worker) -> None:
        """Wait until a worker says that it is at no request."""
        before = self.heartbeats.heard[worker.id]

        def idle() -> bool | None:
            return (self.heartbeats.heard[worker.id] > before and not self.heartbeats.workers[worker.id].busy) or None

        await worker.unless_it_ends(self.heartbeats.until(idle))

    async def loses_nats(self, service: Api | Worker) -> None:
        """Wait until a service says that its connection to NATS is gone; nothing but asking tells."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while (await self.http.get(f"{service.url}/health/ready")).json()["nats"] != "disconnected":  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def makes_tokens(self, worker: Worker, count: int) -> None:
        """Wait until a worker has made `count` more tokens, as its metrics tell, whoever hears of them."""
        enough = await self._tokens(worker) + count
        async with asyncio.timeout(START_TIMEOUT_S):
            while await self._tokens(worker) < enough:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def _tokens(self, worker: Worker) -> float:
        text = (await self.http.get(f"{worker.url}/metrics")).text
        return sum(float(value) for value in re.findall(r"^forebay_inter_token_seconds_count{.*} (.*)$", text, re.M))

    def worker_of(self, state: RequestState) -> Worker:
        """The worker that is at a request."""
        return next(worker for worker in self.workers if worker.id == state.worker)

    def openai(self, api: int = 0, **options: Any) -> openai.AsyncOpenAI:
        """The SDK for an api, without retries of its own."""
        client = openai.AsyncOpenAI(
            base_url=self.apis[api].url + "/v1", **{"api_key": "key", "max_retries": 0, "timeout": 60, **options}
        )
        self.clients.append(client)
        return client

    async def chat(self, text: str, api: int = 0, **fields: Any) -> httpx.Response:
        """A chat request by plain HTTP."""
        return await self.http.post(
            f"{self.apis[api].url}/v1/chat/completions",
            json={"model": MODEL, "messages": [{"role": "user", "content": text}], **fields},
        )

    async def status(self, api: int = 0) -> dict[str, Any]:
        """`GET /v1/queue/status`."""
        answer = await self.http.get(f"{self.apis[api].url}/v1/queue/status")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def knows_workers(self) -> None:
        """Wait until every api has heard that the workers of this stack are ready: heartbeats leave no event here."""
        ready = {worker.id for worker in self.workers}
        async with asyncio.timeout(START_TIMEOUT_S):
            for api in self.apis:
                while ready - await self._ready_workers(api):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

    async def _ready_workers(self, api: Api) -> set[str]:
        answer = await self.http.get(f"{api.url}/health/ready")
        return {worker["id"] for worker in answer.json()["workers"] if worker["status"] == "ready"}

    @contextlib.asynccontextmanager
    async def frames(self, kind: str) -> AsyncIterator[AsyncIterator[Any]]:
        """The frames of this type that workers send from here on, whoever waits for them."""

        async def decoded() -> AsyncIterator[Any]:
            async for msg in subscription.messages:
                frame = json.loads(msg.data)
                if frame.get("type") == kind:
                    yield frame

        subscription = await self.connection.client.subscribe("inference.replies.>")
        await flushed(self.connection.client)
        try:
            yield decoded()
        finally:
            await subscription.unsubscribe()

    async def state(self, request_id: str) -> RequestState | None:
        """The state in KV."""
        stored = await self.states.get(request_id)
        return stored.state if stored else None

    async def reaches(self, request_id: str, *statuses: RequestStatus, timeout_s: float = 30) -> RequestState:
        """Wait until a request has one of `statuses`."""
        return await self._watched(request_id, lambda state: state.status in statuses, timeout_s)

    async def taken(self, nth: int, *statuses: RequestStatus, timeout_s: float = 30) -> RequestState:
        """Wait until the queue has taken its `nth` request, and until it has one of `statuses` if any are named."""
        return await self.becomes(
            lambda state: state.sequence == nth and (not statuses or state.status in statuses), timeout_s
        )

    async def begins(self, attempt: int = 1, timeout_s: float = 30) -> RequestState:
        """Wait until a worker is at its attempt of this number at some request."""
        return await self.becomes(
            lambda state: state.status is RequestStatus.PROCESSING and state.attempt == attempt, timeout_s
        )

    async def becomes(self, wanted: Callable[[RequestState], bool], timeout_s: float = 30) -> RequestState:
        """Wait until some request is as wanted; one that is so already counts."""
        return await self._watched(">", wanted, timeout_s)

    async def _watched(self, keys: str, wanted: Callable[[RequestState], bool], timeout_s: float) -> RequestState:
        async with asyncio.timeout(timeout_s):
            watcher = await self._watcher(keys)
            try:
                async for entry in watcher:
                    if entry is not None and entry.value:
                        state = RequestState.model_validate_json(entry.value)
                        if wanted(state):
                            return state
            finally:
                await watcher.stop()
        raise AssertionError("the watch ended")

    async def _watcher(self, keys: str) -> Any:
        bucket = await self.connection.jetstream.key_value(names.REQUESTS_BUCKET)
        while True:
            # A cluster under load may take its time over the consumer of a watch.
            with contextlib.suppress(NatsTimeoutError):
                return await bucket.watch(keys)

    async def idle(self, api: int = 0, timeout_s: float = 30) -> None:
        """Wait until nothing is in the stream, and NATS there to say so: an ack leaves no event to wait for."""
        url = f"{self.apis[api].url}/v1/queue/status"
        headers = {"x-api-key": str(self._settings.get("api_keys", ""))}
        async with asyncio.timeout(timeout_s):
            while (await self.http.get(url, headers=headers)).json().get("active_requests") != 0:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def all_reach(self, request_ids: list[str], *statuses: RequestStatus, timeout_s: float = 30) -> None:
        """Wait until each of the requests has one of `statuses`."""
        for request_id in request_ids:
            await self.reaches(request_id, *statuses, timeout_s=timeout_s)


AnyStack = TypeVar("AnyStack", bound=Stack)


@contextlib.asynccontextmanager
async def running(nats: HasUrl, *, apis: int = 1, workers: int = 1, **settings: Any) -> AsyncIterator[Stack]:
    """A stack, ended in order when the block is left."""
    observer = load(Settings, nats_url=nats.url, _env_file=None)
    async with started(Stack(nats, **settings), apis, workers, lambda: connect(observer, "forebay-tests")) as stack:
        yield stack


@contextlib.asynccontextmanager
async def started(
    stack: AnyStack, apis: int, workers: int, observer: Callable[[], Awaitable[Connection]]
) -> AsyncIterator[AnyStack]:
    """`stack` with so many processes, looked at over the connection of `observer`."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60, limits=limits) as stack.http:
        stack.connection = await observer()
        stack.states = KeyValueStateStore(stack.connection)
        try:
            await stack.heartbeats.listen(stack.connection)
            for _ in range(apis):
                await stack.api()
            for _ in range(workers):
                await stack.worker()
            await stack.knows_workers()
            try:
                yield stack
            finally:
                for task in stack.played:
                    task.cancel()
                # Closed while it connects again, a client of NATS leaves a socket behind.
                await stack.connection.wait_connected(10)
        finally:
            await stack.connection.close()
            for client in stack.clients:
                await client.close()
            services: list[Service] = [service for service in (*stack.apis, *stack.workers) if service.pid]
            for service in services:
                service.signal(signal.SIGCONT)
            await asyncio.gather(*(service.kill() for service in services))


def data_dir() -> Path:
    """Where the real model is kept between runs."""
    return Path(os.environ.get("DATA_DIR", Path.home() / ".cache" / "forebay"))
