"""`forebay up`: nats-server, api and workers on this machine, one process each."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from forebay_cli import console
from forebay_cli.declarations import synchronous
from forebay_cli.local import addresses, nats_server
from forebay_cli.local.cards import card_of_worker, visible_cards
from forebay_cli.local.running import Running, exclusive
from forebay_cli.local.supervisor import Child, ChildDied, Supervisor
from forebay_contracts.nats import connection, presence, topology
from forebay_contracts.nats.connection import Connection
from forebay_contracts.settings import ApiSettings, InferenceSettings, load
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus

READY_POLL_S = 0.2
"""Interval of the readiness checks during start-up. There are none after it."""

DRAIN_MARGIN_S = 10.0
"""Time beyond DRAIN_TIMEOUT after which a service is killed."""

NATS_STAGE, WORKER_STAGE, API_STAGE = range(3)
"""The last stage ends first: the api stops new requests, then the workers finish, then nobody needs NATS."""


@synchronous
async def up(
    host: Annotated[str | None, typer.Option(help="Address of the api (API_HOST).", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the api (API_PORT).", show_default="8091", min=0, max=65_535)
    ] = None,
    workers: Annotated[int, typer.Option(help="Worker processes.", min=1, max=64)] = 1,
    engine: Annotated[
        str | None,
        typer.Option(
            help="transformers, llamacpp, vllm, sglang, openai, embedding, simulated (INFERENCE_ENGINE).",
            show_default="transformers",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Models, the NATS store, logs (DATA_DIR).", show_default="~/.cache/forebay"),
    ] = None,
    nats_url: Annotated[
        str | None, typer.Option(help="A NATS server that runs already (NATS_URL).", show_default="one of its own")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every log line of every process.")] = False,
) -> None:
    """Start nats-server (unless NATS_URL is set), the api and workers on this machine.

    Prints `ready http://HOST:PORT` once requests are answered. SIGINT and SIGTERM let running requests finish.
    """
    options = {
        "api_host": host,
        "api_port": port,
        "inference_engine": engine,
        "data_dir": data_dir,
        "nats_url": nats_url,
    }
    given = {name: value for name, value in options.items() if value is not None}
    raise typer.Exit(await _run(Deployment(given, workers, verbose=verbose)))


class Deployment:
    """The processes of one `forebay up` and their settings; `given` are the ones from its options."""

    def __init__(self, given: Mapping[str, Any], workers: int, *, verbose: bool) -> None:
        self.api = load(ApiSettings, **given)
        self.worker = load(InferenceSettings, **given)  # Wrong settings of a worker stop the start here.
        if self.api.nats_url is None and (self.api.nats_credentials or self.api.nats_nkey_seed):
            raise ConfigurationError(
                "NATS_CREDENTIALS and NATS_NKEY_SEED need NATS_URL: the server of `forebay up` has a user of its own"
            )
        self.workers = workers
        self.data_dir = self.api.data_dir.resolve()
        self.port = self.api.api_port or addresses.free_port("127.0.0.1")
        self.supervisor = Supervisor(self.data_dir / "logs", console.say_of_child, verbose=verbose)
        # In the children the environment overrides `.env`, and so do the options.
        self.env = os.environ | {name.upper(): str(value) for name, value in given.items()}
        self.env |= {"API_PORT": str(self.port), "DATA_DIR": str(self.data_dir), "PYTHONUNBUFFERED": "1"}
        self._progress = console.Progress()

    @property
    def url(self) -> str:
        """The api's address on this machine."""
        return addresses.url_of(self.api.api_host, self.port)

    def check_port(self) -> None:
        """Raise ConfigurationError where the api's port is taken."""
        if fault := addresses.why_not_listen(self.api.api_host, self.port):
            raise ConfigurationError(
                f"the api cannot listen on {self.api.api_host}:{self.port} ({fault}): give another --port or --host"
            )

    async def bring_up(self) -> None:
        """Start everything; return when all workers and the api are ready."""
        try:
            settings = self.api
            if settings.nats_url is None:
                settings = settings.model_copy(update=await self._start_nats())
            Running.of(self.url, settings).write(self.data_dir)
            async with connection.connected(settings, "forebay up") as link:
                await self._start_services(link, settings)
        finally:
            self._progress.stop()

    async def _start_nats(self) -> dict[str, Any]:
        """Start the embedded server; returns the settings with which a client connects, and gives them to children."""
        self._progress.show("starting nats-server")
        command, access = nats_server.prepare(self.data_dir, self.api.max_request_bytes)
        child = await self.supervisor.start("nats-server", command, self.env, stage=NATS_STAGE)
        await child.said(nats_server.READY_LINE)
        self._progress.show(f"nats-server on {access['nats_url']}, its store in {self.data_dir / 'nats'}")
        # The seed itself is in no environment, only the path of its file.
        self.env |= {name.upper(): str(value) for name, value in access.items() if value is not None}
        return access

    async def _start_services(self, link: Connection, settings: ApiSettings) -> None:
        await topology.ensure(link, settings, settings.served_model)
        workers: presence.Presence[WorkerInfo] = presence.Presence(link, names.WORKERS_BUCKET, WorkerInfo)
        await workers.start()
        # On the NATS of NATS_URL, workers of other machines may be alive already. Ours are the ones that come.
        others = {worker.id for worker in workers.alive()}
        start, python = self.supervisor.start, [sys.executable, "-m"]
        # A worker alone may use all cards, for an engine that spreads a model over them.
        chosen = self.worker.model_device in ("auto", "cuda") and self.workers > 1
        cards = await asyncio.to_thread(visible_cards, self.env) if chosen else []
        for number in range(1, self.workers + 1):
            # `forebay drain` may end a worker. The others go on; with none left, requests wait.
            command, env = [*python, "forebay_inference"], self.env | card_of_worker(number, cards)
            await start(f"worker {number}", command, env, stage=WORKER_STAGE, may_leave=True)
        await start("api", [*python, "forebay_api"], self.env, stage=API_STAGE)
        try:
            await self._until_ready(workers, others)
        finally:
            await workers.stop()

    async def _until_ready(self, workers: presence.Presence[WorkerInfo], others: set[str]) -> None:
        async with httpx.AsyncClient(timeout=2, trust_env=False) as client:
            while True:
                ours = [worker for worker in workers.alive() if worker.id not in others]
                waiting = [
                    f"worker {worker.id}: {worker.progress or worker.status.value}"
                    for worker in ours
                    if worker.status is not WorkerStatus.READY
                ]
                waiting += ["a worker to start"] * (self.workers - len(ours))
                if not waiting and await self._api_is_ready(client):
                    return
                self._progress.show("waiting for " + (", ".join(dict.fromkeys(waiting)) or "the api"))
                await asyncio.sleep(READY_POLL_S)

    async def _api_is_ready(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.url}/health/ready")).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def patience_s(self, child: Child) -> float:
        """How long `child` may take to end."""
        return DRAIN_MARGIN_S + (0 if child.name == "nats-server" else self.api.drain_timeout + self.api.shutdown_delay)


async def _run(deployment: Deployment) -> int:
    """Start everything, print the ready line, and end everything on SIGINT or SIGTERM; returns the exit code."""
    deployment.check_port()
    with exclusive(deployment.data_dir):
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
            faults = await deployment.supervisor.drain(deployment.patience_s)
        for fault in faults:
            console.fail(fault)
        return 1 if faults else code


def _stop_on_signals(supervisor: Supervisor) -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets. The second one kills all children."""
    stopped = asyncio.Event()

    def on_signal() -> None:
        if stopped.is_set():
            supervisor.kill()
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stopped


async def _first(*coroutines: Coroutine[Any, Any, Any]) -> Any:
    """The result or the error of the first that ends; the others are cancelled."""
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
