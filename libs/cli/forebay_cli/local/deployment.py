"""The processes of one `forebay up`: which there are, with which settings, and when they are ready."""

import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from forebay_cli import console
from forebay_cli.doctor import machine
from forebay_cli.local import addresses, nats_server
from forebay_cli.local.cards import card_of_worker, visible_cards
from forebay_cli.local.running import Running
from forebay_cli.local.supervisor import Child, Supervisor
from forebay_cli.nats_connection import permission_violations
from forebay_contracts import extras
from forebay_contracts.nats import connection, presence, topology
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.consumers import consumers, model_of
from forebay_contracts.settings import ApiSettings, InferenceSettings, load
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ConfigurationError, ForebayError
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus

READY_POLL_S = 0.2
"""Interval of the readiness checks during start-up. There are none after it."""

DRAIN_POLL_S = 1.0
"""Interval at which `up` looks what still runs while it ends."""

DRAIN_MARGIN_S = 10.0
"""Time beyond DRAIN_TIMEOUT after which a service is killed."""

NATS_STAGE, WORKER_STAGE, API_STAGE = range(3)
"""The last stage ends first: the api stops new requests, then the workers finish, then nobody needs NATS."""

OF_ONE_MODEL = ("model_name", "model_aliases", "model_adapters")
"""The settings that can hold for one model alone."""


class Deployment:
    """The processes of one `forebay up` and their settings.

    `given` are the settings that its options give, `models` what workers load; none: DEFAULT_MODEL. Each model has
    `workers_each` workers.
    """

    def __init__(self, given: Mapping[str, Any], models: Sequence[str], workers_each: int, *, verbose: bool) -> None:
        first = {"default_model": models[0]} if models else {}
        self.api = load(ApiSettings, **given, **first)
        if self.api.nats_url is None and (self.api.nats_credentials or self.api.nats_nkey_seed):
            raise ConfigurationError(
                "NATS_CREDENTIALS and NATS_NKEY_SEED need NATS_URL: the server of `forebay up` has a user of its own"
            )
        # Wrong settings of a worker stop the start here.
        of_models = [load(InferenceSettings, **given, default_model=model) for model in models]
        self.workers = [one for one in of_models or [load(InferenceSettings, **given)] for _ in range(workers_each)]
        _check_models(of_models)
        own_nats = [extras.NATS_SERVER] if self.api.nats_url is None else []
        extras.require("api", *(worker.inference_engine for worker in self.workers), *own_nats)
        self.data_dir = self.api.data_dir.resolve()
        self.port = self.api.api_port or addresses.free_port("127.0.0.1")
        self.supervisor = Supervisor(self.data_dir / "logs", console.say_of_child, verbose=verbose)
        # In the children the environment overrides `.env`, and so do the options.
        self.env = os.environ | {name.upper(): str(value) for name, value in {**given, **first}.items()}
        self.env |= {"API_PORT": str(self.port), "DATA_DIR": str(self.data_dir), "PYTHONUNBUFFERED": "1"}
        self.settings = self.api
        """How a client connects, once there is a NATS server."""
        self.nats = ""
        """The URL of the NATS server, without user and password."""
        self.ready: list[WorkerInfo] = []
        """Its workers, once all are ready."""
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
        for finding in machine.disk(self.data_dir):
            if finding.severity == "problem":
                console.say(f"{finding.message}: NATS and models may find no room; {finding.fix}")
        try:
            if self.api.nats_url is None:
                self.settings = self.api.model_copy(update=await self._start_nats())
            Running.of(self.url, self.settings).write(self.data_dir)
            async with connection.connected(self.settings, "forebay up") as link:
                self.nats = link.server
                await self._start_services(link)
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

    async def _start_services(self, link: Connection) -> None:
        await topology.ensure(link, self.settings, self.settings.served_model)
        workers: presence.Presence[WorkerInfo] = presence.Presence(link, names.WORKERS_BUCKET, WorkerInfo)
        await workers.start()
        # On the NATS of NATS_URL, workers of other machines may be alive already. Ours are the ones that come.
        others = {worker.id for worker in workers.alive()}
        start, python = self.supervisor.start, [sys.executable, "-m"]
        # A worker alone may use all cards, for an engine that spreads a model over them.
        chosen = self.workers[0].model_device in ("auto", "cuda") and len(self.workers) > 1
        cards = await asyncio.to_thread(visible_cards, self.env) if chosen else []
        for number, worker in enumerate(self.workers, 1):
            # `forebay drain` may end a worker. The others go on; with none left, requests wait.
            env = self.env | {"DEFAULT_MODEL": worker.default_model} | card_of_worker(number, cards)
            command = [*python, "forebay_inference"]
            await start(f"worker {number}", command, env, stage=WORKER_STAGE, may_leave=True)
        await start("api", [*python, "forebay_api"], self.env, stage=API_STAGE)
        try:
            self.ready = await self._until_ready(workers, others)
        finally:
            await workers.stop()

    async def _until_ready(self, workers: presence.Presence[WorkerInfo], others: set[str]) -> list[WorkerInfo]:
        async with httpx.AsyncClient(timeout=2, trust_env=False) as client:
            while True:
                ours = [worker for worker in workers.alive() if worker.id not in others]
                waiting = [
                    f"worker {worker.id}: {worker.progress or worker.status.value}"
                    for worker in ours
                    if worker.status is not WorkerStatus.READY
                ]
                waiting += ["a worker to start"] * (len(self.workers) - len(ours))
                if not waiting and await self._api_is_ready(client):
                    return ours
                self._progress.show("waiting for " + (", ".join(dict.fromkeys(waiting)) or "the api"))
                await asyncio.sleep(READY_POLL_S)

    async def _api_is_ready(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.url}/health/ready")).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    async def drain(self) -> list[str]:
        """Let what runs finish, and end all processes; a sentence for each fault."""
        telling = asyncio.create_task(self._tell_what_runs())
        try:
            return await self.supervisor.drain(self._patience_s)
        finally:
            telling.cancel()
            await asyncio.wait([telling])
            self._progress.stop()

    async def _tell_what_runs(self) -> None:
        """Show what still runs, as long as NATS is there, and how long it may take."""
        api, worker = self.api, self.workers[0]
        end = time.monotonic() + api.shutdown_delay + api.drain_timeout + worker.drain_timeout
        while not self.supervisor.killed:
            try:
                running = await self._what_runs() if self.nats else ""
            except (ForebayError, TimeoutError):
                running = ""
            left = max(0, end - time.monotonic())
            self._progress.show(f"draining: {running}at most {left:.0f} s more; Ctrl-C again stops at once")
            await asyncio.sleep(DRAIN_POLL_S)

    async def _what_runs(self) -> str:
        ids, models = {worker.id for worker in self.ready}, {worker.served_model for worker in self.workers}
        # Nobody is told that this connection ends with NATS.
        with permission_violations():
            async with asyncio.timeout(DRAIN_POLL_S), connection.connected(self.settings, "forebay up") as link:
                workers = await presence.read(link, names.WORKERS_BUCKET, WorkerInfo)
                lines = await consumers(link)
        of_models = [line for line in lines if model_of(line) in models]
        waiting = sum(line.num_pending or 0 for line in of_models)
        # What NATS has handed out is exact. On a shared one it is other workers' too, and heartbeats are a second old.
        ours = sum(worker.busy for worker in workers if worker.id in ids)
        running = sum(line.num_ack_pending or 0 for line in of_models) if self.api.nats_url is None else ours
        return f"{running} request{'' if running == 1 else 's'} running, {waiting} waiting; "

    def _patience_s(self, child: Child) -> float:
        """How long `child` may take to end."""
        return DRAIN_MARGIN_S + (0 if child.name == "nats-server" else self.api.drain_timeout + self.api.shutdown_delay)


def _check_models(of_models: Sequence[InferenceSettings]) -> None:
    """Raise ConfigurationError where several models cannot be told apart."""
    if len(of_models) < 2:
        return
    for name in OF_ONE_MODEL:
        if getattr(of_models[0], name):
            raise ConfigurationError(f"{name.upper()} is of one model, and --model is given {len(of_models)} times")
    served = [one.served_model for one in of_models]
    for model in served:
        same = [other for other in served if names.model_token(other) == names.model_token(model)]
        if len(same) > 1:
            raise ConfigurationError(f"--model is given twice for what is {model} to clients ({', '.join(same)})")
