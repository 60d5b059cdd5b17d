"""The whole system as real processes: nats-server, apis, workers, each to be killed, paused and counted."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
import openai

from forebay_contracts.nats.connection import Connection, connect
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire.state import RequestState, RequestStatus

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60
MODEL = "SmolLM2-135M-Instruct"

_API_READY = re.compile(r"api (\S+) takes requests")
_WORKER_READY = re.compile(r"worker (\S+) serves")
_PORT = re.compile(r"listening on \S+:(\d+)")


class HasUrl(Protocol):
    """A NATS server, a cluster, or a proxy before one."""

    @property
    def url(self) -> str:
        """What NATS_URL must be."""
        ...


class Service:
    """One process of ours, its log lines kept; `id` is the name that it has on NATS."""

    def __init__(self, module: str, ready: re.Pattern[str], env: dict[str, str]) -> None:
        self._module = module
        self._ready = ready
        self._env = env
        self._lines_changed = asyncio.Condition()
        self._reader: asyncio.Task[None] | None = None
        self.log: deque[str] = deque(maxlen=10_000)
        self.id = ""
        self.process: asyncio.subprocess.Process

    async def start(self) -> "Service":
        """Start, and return when it says that it is ready."""
        await self.launch()
        self.id = (await self.logged(self._ready))[1]
        return self

    async def launch(self) -> None:
        """Start without waiting."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            env=self._env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        self._reader = asyncio.create_task(self._read())

    async def logged(self, pattern: str | re.Pattern[str], timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """Wait for a log line, one that is there already included."""
        compiled = re.compile(pattern)

        def found() -> re.Match[str] | None:
            return next((match for line in self.log if (match := compiled.search(line))), None)

        async with asyncio.timeout(timeout_s), self._lines_changed:
            await self._lines_changed.wait_for(lambda: found() or self.process.returncode is not None)
        match = found()
        assert match is not None, f"{self._module} ended with {self.process.returncode}:\n" + "\n".join(self.log)
        return match

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process."""
        self.process.send_signal(number)

    async def stop(self) -> int:
        """SIGTERM; its exit status."""
        if self.process.returncode is None:
            self.process.terminate()
        return await self.ended()

    async def whole_log(self) -> list[str]:
        """All its lines: it is stopped first, since the newest wait a moment before they are written."""
        await self.stop()
        return list(self.log)

    async def kill(self) -> None:
        """SIGKILL."""
        if self.process.returncode is None:
            self.process.kill()
        await self.ended()

    async def ended(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for its end; its exit status."""
        async with asyncio.timeout(timeout_s):
            status = await self.process.wait()
            if self._reader is not None:
                await self._reader
        return status

    async def _read(self) -> None:
        assert self.process.stderr is not None
        # As many lines at a time as have come: one by one they would cost as much as the service itself under load.
        rest = b""
        while piece := await self.process.stderr.read(2**16):
            *lines, rest = (rest + piece).split(b"\n")
            if lines:
                async with self._lines_changed:
                    self.log.extend(line.decode(errors="replace").rstrip() for line in lines)
                    self._lines_changed.notify_all()
        self.log.extend([rest.decode(errors="replace").rstrip()] if rest else [])
        await self.process.wait()
        async with self._lines_changed:
            self._lines_changed.notify_all()


async def first_to_log(pattern: str, *services: Service) -> Service:
    """Wait until one of these has logged such a line; which one."""
    waits = {asyncio.create_task(service.logged(pattern)): service for service in services}
    done, late = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in late:
        wait.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    first = done.pop()
    first.result()
    return waits[first]


class Api(Service):
    """An api process on a port of its own, known once it has started."""

    port = 0

    async def start(self) -> "Api":
        """Start, and learn the port."""
        await super().start()
        self.port = int((await self.logged(_PORT))[1])
        return self

    @property
    def url(self) -> str:
        """Its base address, without /v1."""
        return f"http://127.0.0.1:{self.port}"


class Stack:
    """A nats-server with apis and workers on the simulated engine, unless settings say otherwise."""

    def __init__(self, nats: HasUrl, **settings: Any) -> None:
        self.nats = nats
        self.apis: list[Api] = []
        self.workers: list[Service] = []
        self.clients: list[openai.AsyncOpenAI] = []
        self.http: httpx.AsyncClient
        self.connection: Connection
        self.states: KeyValueStateStore
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
        """Start another api."""
        api = Api("forebay_api", _API_READY, self.env(**settings))
        self.apis.append(api)
        return await api.start()

    async def worker(self, **settings: Any) -> Service:
        """Start another worker."""
        worker = Service("forebay_inference", _WORKER_READY, self.env(**settings))
        self.workers.append(worker)
        return await worker.start()

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
        await self.connection.client.flush()
        try:
            yield decoded()
        finally:
            await subscription.unsubscribe()

    async def state(self, request_id: str) -> RequestState | None:
        """The state in KV."""
        stored = await self.states.get(request_id)
        return stored.state if stored else None

    async def reaches(self, request_id: str, *statuses: RequestStatus, timeout_s: float = 30) -> RequestState:
        """Wait until a request has one of `statuses`, as a KV watch tells."""
        async with asyncio.timeout(timeout_s):
            bucket = await self.connection.jetstream.key_value("inference-requests")
            watcher = await bucket.watch(request_id)
            try:
                async for entry in watcher:
                    if entry is not None and entry.value:
                        state = RequestState.model_validate_json(entry.value)
                        if state.status in statuses:
                            return state
            finally:
                await watcher.stop()
        raise AssertionError("the watch ended")

    async def idle(self, api: int = 0, timeout_s: float = 30) -> None:
        """Wait until nothing is in the stream, and NATS there to say so: an ack leaves no event to wait for."""
        url = f"{self.apis[api].url}/v1/queue/status"
        async with asyncio.timeout(timeout_s):
            while (await self.http.get(url)).json().get("active_requests") != 0:  # noqa: ASYNC110
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
        try:
            for _ in range(apis):
                await stack.api()
            for _ in range(workers):
                await stack.worker()
            await stack.knows_workers()
            stack.connection = await observer()
            stack.states = KeyValueStateStore(stack.connection)
            try:
                yield stack
            finally:
                # Closed while it connects again, a client of NATS leaves a socket behind.
                await stack.connection.wait_connected(10)
                await stack.connection.close()
        finally:
            for client in stack.clients:
                await client.close()
            for service in (*stack.apis, *stack.workers):
                with contextlib.suppress(ProcessLookupError):
                    service.signal(signal.SIGCONT)
            await asyncio.gather(*(service.kill() for service in (*stack.apis, *stack.workers)))


def data_dir() -> Path:
    """Where the real model is kept between runs."""
    return Path(os.environ.get("DATA_DIR", Path.home() / ".cache" / "forebay"))
