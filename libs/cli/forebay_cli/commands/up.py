"""`forebay up`: everything on this machine, one process each, in order up and in order down."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from forebay_cli import console
from forebay_cli.local import nats_server
from forebay_cli.local.supervisor import Child, ChildDied, Supervisor
from forebay_contracts.nats import connection, presence, topology
from forebay_contracts.nats.connection import Connection
from forebay_contracts.settings import ApiSettings, InferenceSettings, load
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus

LOOK_INTERVAL_S = 0.2
"""How often a start is looked at. Nothing is looked at any more once everything is ready."""

DRAIN_MARGIN_S = 10.0
"""How much longer than DRAIN_TIMEOUT a service may take to end, before it is killed."""

NATS_STAGE, WORKER_STAGE, API_STAGE = range(3)
"""Ended the last first: no new requests, then no running ones, then nothing that is still needed."""

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Options:
    """The options of `forebay up`; None: as the settings say."""

    host: str | None = None
    port: int | None = None
    workers: int = 1
    engine: str | None = None
    data_dir: Path | None = None
    verbose: bool = False

    def overrides(self) -> dict[str, Any]:
        """The options as settings by name."""
        data_dir = self.data_dir.expanduser().resolve() if self.data_dir else None
        given = {"api_host": self.host, "api_port": self.port, "inference_engine": self.engine, "data_dir": data_dir}
        return {name: value for name, value in given.items() if value is not None}


class Deployment:
    """The processes of one `forebay up`, and the settings that they share."""

    def __init__(self, options: Options) -> None:
        overrides = options.overrides()
        self.api = load(ApiSettings, **overrides)
        self.inference = load(InferenceSettings, **overrides)
        self.workers = options.workers
        self.data_dir = self.api.data_dir.expanduser().resolve()
        self.port = self.api.api_port or nats_server.free_port("127.0.0.1")
        self.supervisor = Supervisor(self.data_dir / "logs", console.say_of_child, verbose=options.verbose)
        # The environment is stronger than `.env`, so what was given here holds for the children.
        self.env = os.environ | {name.upper(): str(value) for name, value in overrides.items()}
        self.env |= {"API_PORT": str(self.port), "DATA_DIR": str(self.data_dir), "PYTHONUNBUFFERED": "1"}
        self._progress = console.Progress()

    @property
    def url(self) -> str:
        """Where the api answers, as seen from this machine."""
        return url_of(self.api.api_host, self.port)

    def check_port(self) -> None:
        """Refuse a port that is taken, before anything is started."""
        if fault := nats_server.why_not_listen(self.api.api_host, self.port):
            raise ConfigurationError(
                f"the api cannot listen on {self.api.api_host}:{self.port} ({fault}): give another --port or --host"
            )

    async def bring_up(self) -> None:
        """Start everything; return when all workers and the api are ready."""
        try:
            settings = self.api.model_copy(update={"nats_url": await self._nats_url()})
            self.env["NATS_URL"] = str(settings.nats_url)
            link = await connection.connect(settings, "forebay up")
            try:
                await self._start_services(link, settings)
            finally:
                await link.close()
        finally:
            self._progress.stop()

    async def drain(self) -> list[str]:
        """End everything in order; a sentence for each fault."""
        return await self.supervisor.drain(self._patience_s)

    async def _nats_url(self) -> str:
        if self.api.nats_url is not None:
            nats_server.forget_url(self.data_dir)
            return self.api.nats_url
        self._progress.show("starting nats-server")
        embedded = nats_server.prepare(self.data_dir, self.api.max_request_bytes)
        child = await self.supervisor.start("nats-server", embedded.command, self.env, stage=NATS_STAGE)
        await child.said(nats_server.READY_LINE)
        self._progress.show(f"nats-server on {embedded.url}, its store in {self.data_dir / 'nats'}")
        return embedded.url

    async def _start_services(self, link: Connection, settings: ApiSettings) -> None:
        await topology.ensure(link, settings, settings.served_model)
        workers: presence.Presence[WorkerInfo] = presence.Presence(link, names.WORKERS_BUCKET, WorkerInfo)
        await workers.start()
        # With a NATS of one's own, workers of other machines may be there already: ours are those to come.
        others = {worker.id for worker in workers.alive()}
        for number in range(1, self.workers + 1):
            # A worker that `forebay drain` ended is no crash: the others go on, and with none left, requests wait.
            await self._start_service(f"worker {number}", "forebay_inference", WORKER_STAGE, may_leave=True)
        await self._start_service("api", "forebay_api", API_STAGE)
        try:
            await self._until_ready(workers, others)
        finally:
            await workers.stop()

    async def _until_ready(self, workers: presence.Presence[WorkerInfo], others: set[str]) -> None:
        async with httpx.AsyncClient(timeout=2, trust_env=False) as client:
            while True:
                ours = [worker for worker in workers.alive() if worker.id not in others]
                waiting = [_waiting_for(worker) for worker in ours if worker.status is not WorkerStatus.READY]
                waiting += ["a worker to start"] * (self.workers - len(ours))
                if not waiting and await self._api_is_ready(client):
                    return
                self._progress.show("waiting for " + (", ".join(dict.fromkeys(waiting)) or "the api"))
                await asyncio.sleep(LOOK_INTERVAL_S)

    async def _start_service(self, name: str, module: str, stage: int, *, may_leave: bool = False) -> None:
        await self.supervisor.start(name, [sys.executable, "-m", module], self.env, stage=stage, may_leave=may_leave)

    async def _api_is_ready(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.url}/health/ready")).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _patience_s(self, child: Child) -> float:
        return DRAIN_MARGIN_S + (0 if child.name == "nats-server" else self.api.drain_timeout + self.api.shutdown_delay)


async def run(options: Options) -> int:
    """Bring everything up, say that it is ready, and take it down on SIGINT or SIGTERM; the exit code."""
    deployment = Deployment(options)
    deployment.check_port()
    with nats_server.exclusive(deployment.data_dir):
        stopped = _stop_on_signals(deployment.supervisor)
        code = 0
        try:
            if not await _first(stopped.wait(), deployment.supervisor.failure(), deployment.bring_up()):
                console.stdout.print(f"ready {deployment.url}", markup=False)
                await _first(stopped.wait(), deployment.supervisor.failure())
            console.say("draining; once more to stop at once")
        except ChildDied as exc:
            console.fail(f"{exc}\nforebay: draining the others")
            code = 1
        finally:
            faults = await deployment.drain()
        for fault in faults:
            console.fail(fault)
        return 1 if faults else code


def _stop_on_signals(supervisor: Supervisor) -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets; any further one kills."""
    stopped = asyncio.Event()

    def on_signal() -> None:
        if stopped.is_set():
            supervisor.kill()
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stopped


async def _first(*coroutines: Coroutine[Any, Any, Any]) -> Any:
    """The result of the first that ends, or its error; the others are cancelled."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def url_of(host: str, port: int) -> str:
    """Where an api that listens on `host` answers, as seen from its own machine."""
    host = _WILDCARDS.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _waiting_for(worker: WorkerInfo) -> str:
    return f"worker {worker.id}: {worker.progress or worker.status.value}"
