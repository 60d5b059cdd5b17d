"""The worker: slots that pull requests, the ack waits and the heartbeat that keep both alive."""

import asyncio
import contextlib
import functools
import json
import logging
import time

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from pydantic import ValidationError

from forebay_contracts.nats import clock, topology
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.limits import Watch
from forebay_contracts.nats.presence import Heartbeat, Presence
from forebay_contracts.process import calm_collector
from forebay_contracts.queueing.protocols import Deliveries
from forebay_contracts.settings import InferenceSettings
from forebay_contracts.telemetry import logs
from forebay_contracts.version import VERSION
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import InferenceFailed
from forebay_contracts.wire.frames import Resume
from forebay_contracts.wire.heartbeats import ApiInfo, WorkerInfo, WorkerStatus
from forebay_inference.attempt.endings import End, Ended, abandoned, not_wanted
from forebay_inference.attempt.runner import AttemptRunner
from forebay_inference.engine.model import Model, ModelFacts
from forebay_inference.engine.protocol import LoadedModel
from forebay_inference.handover import Handover
from forebay_inference.health import CHECK_INTERVAL_S, EngineWatch, Health
from forebay_inference.idle import IdleSlots
from forebay_inference.worker_metrics import watch

KEEP_ALIVE_FRACTION = 3
"""How often the ack wait is restarted within its own length."""

log = logging.getLogger(__name__)


class Worker:
    """Serves one model with one engine and a number of slots."""

    def __init__(
        self,
        worker_id: str,
        settings: InferenceSettings,
        connection: Connection,
        engine: Model,
        deliveries: Deliveries,
        runner: AttemptRunner,
        apis: Presence[ApiInfo],
        idle: IdleSlots,
        handover: Handover,
    ) -> None:
        self.id = worker_id
        self._settings = settings
        self._connection = connection
        self._engine = engine
        self._deliveries = deliveries
        self._runner = runner
        self._apis = apis
        self._idle = idle
        self._handover = handover
        self._heartbeat = Heartbeat(connection, names.WORKERS_BUCKET, self._describe)
        watch(settings.slots, lambda: len(runner.running), engine)
        self._watch = EngineWatch(engine, settings.engine_stall_timeout)
        self._started_at = time.time()
        self._shared = Watch(functools.partial(topology.live_limits, connection, settings, settings.served_model))
        self._status = WorkerStatus.LOADING
        self._progress: str | None = None
        self._model: LoadedModel | ModelFacts | None = None
        self._broken = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Load, serve until `stop` is set, drain.

        Raises:
            ForebayError: it could not start, or its engine or a task of its own broke. Another should be started.
        """
        settings = self._settings
        await topology.ensure(
            self._connection, settings, settings.served_model, settings.served_aliases, settings.model_adapters
        )
        await self._shared.look()
        await clock.measure(self._connection.requests)
        await self._apis.start()
        await self._heartbeat.start()
        await self._listen_for_drain(stop)
        try:
            async with self._shared.followed():
                if not await self._load(stop):
                    return
                await self._serve(stop)
            if (fault := self._watch.fault()) is not None:
                raise InferenceFailed(f"the engine broke: {fault}")
        finally:
            await self._heartbeat.stop()
            await self._apis.stop()
            await self._engine.close()

    async def _listen_for_drain(self, stop: asyncio.Event) -> None:
        async def asked(msg: Msg) -> None:
            log.info("[RequestQueue] worker %s is told to drain", self.id)
            stop.set()
            if msg.reply:
                with contextlib.suppress(NatsError):
                    await msg.respond(json.dumps({"draining": self.id, "running": len(self._runner.running)}).encode())

        await self._connection.client.subscribe(names.drain_subject(self.id), cb=asked)

    async def _load(self, stop: asyncio.Event) -> bool:
        """Start the engine; False if the worker was stopped meanwhile."""
        loop = asyncio.get_running_loop()

        def progress(line: str) -> None:
            loop.call_soon_threadsafe(self._progressed, line)

        loading = asyncio.create_task(self._engine.start(progress))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            loading.cancel()
            return False
        self._model = await loading
        calm_collector()
        self._set_status(WorkerStatus.READY)
        log.info(
            "[RequestQueue] worker %s serves %s (%s, %s) with %d slots",
            self.id,
            self._settings.served_model,
            self._model.quantization,
            self._model.device,
            self._settings.slots,
        )
        logs.write_out()  # the first request may kill the process
        return True

    async def _serve(self, stop: asyncio.Event) -> None:
        client = self._connection.client
        await client.subscribe(names.cancel_subject("*"), cb=self._cancelled)
        await client.subscribe(names.resend_subject("*"), cb=self._resend_asked)
        await self._handover.start()
        slots = [asyncio.create_task(self._slot()) for _ in range(self._settings.slots)]
        keepers = [asyncio.create_task(self._keep_alive()), asyncio.create_task(self._watch_engine())]
        ends = [asyncio.create_task(event.wait()) for event in (stop, self._broken)]
        try:
            await asyncio.wait([*ends, *slots, *keepers], return_when=asyncio.FIRST_COMPLETED)
            await self._drain(slots)
        finally:
            for task in (*slots, *keepers, *ends):
                task.cancel()
        for result in await asyncio.gather(*slots, *keepers, return_exceptions=True):
            if isinstance(result, Exception):
                log.error("[RequestQueue] a task of the worker broke", exc_info=result)
                raise InferenceFailed(f"a task of the worker broke: {result!r}") from result

    async def _slot(self) -> None:
        """Pull one request at a time: a slot asks for work only while it is free."""
        while self._status is WorkerStatus.READY:
            with self._idle.waits():
                delivery = await self._deliveries.pull()
            await self._runner.run(delivery)
            if self._engine.status().fault is not None:
                self._broken.set()

    async def _drain(self, slots: list[asyncio.Task[None]]) -> None:
        """Stop pulling, let requests finish within DRAIN_TIMEOUT, and hand the rest over to other workers."""
        self._set_status(WorkerStatus.DRAINING)
        await self._deliveries.stop()
        patience_s = 0 if self._broken.is_set() else self._settings.drain_timeout
        _, late = await asyncio.wait(slots, timeout=patience_s)
        fault = self._watch.fault()
        for attempt in list(self._runner.running.values()):
            # This request may have broken the engine, so unlike a hand-over that counts as an attempt.
            attempt.stop(Ended(End.HANDED_OVER) if fault is None else Ended(End.FAULT, fault=fault))
        if late:
            await asyncio.wait(late, timeout=self._ack_wait_s)

    @property
    def _ack_wait_s(self) -> float:
        """What holds on NATS. Another process may have been told otherwise than this one."""
        return self._shared.limits.live.get("ack_wait", self._settings.ack_wait)

    async def _keep_alive(self) -> None:
        """Restart the ack wait of every running request, and stop those whose api is gone."""
        while True:
            await asyncio.sleep(self._ack_wait_s / KEEP_ALIVE_FRACTION)
            for attempt in list(self._runner.running.values()):
                api = names.api_of(attempt.request.reply_to)
                if api and not self._apis.is_alive(api):
                    attempt.stop(abandoned())
                    continue
                try:
                    await attempt.delivery.in_progress()
                except NatsError as exc:
                    log.debug("%s: ack wait not restarted: %r", attempt.request.id, exc)

    async def _watch_engine(self) -> None:
        """End the worker when its engine is broken or stuck, also while no request runs."""
        while self._watch.fault() is None:
            await asyncio.sleep(CHECK_INTERVAL_S)
            self._watch.look()
        self._broken.set()

    def health(self) -> Health:
        """How the worker is now. Call it in the event loop's thread."""
        closed = "the connection to NATS is closed" if self._connection.client.is_closed else None
        return Health(self._status, self._connection.connected, self._watch.fault() or closed)

    async def _cancelled(self, msg: Msg) -> None:
        if names.HEADER_CANCEL in (msg.headers or {}):
            return  # asks the api that holds the client, which decides
        attempt = self._runner.running.get(msg.subject.rsplit(".", 1)[1])
        if attempt is not None:
            attempt.stop(Ended(End.CANCELLED, reason=msg.data.decode(errors="replace")[:200]))

    async def _resend_asked(self, msg: Msg) -> None:
        attempt = self._runner.running.get(msg.subject.rsplit(".", 1)[1])
        if attempt is None:
            return
        try:
            have = Resume.model_validate_json(msg.data)
        except ValidationError:
            log.warning("[RequestQueue] %s: a resend order that cannot be read", attempt.request.id)
            return
        if have.wanted:
            await attempt.reply.resend(have)
        else:
            attempt.stop(not_wanted(have))

    def _progressed(self, line: str) -> None:
        if line != self._progress:
            self._progress = line
            log.info("[RequestQueue] worker %s: %s", self.id, line)
            self._heartbeat.beat()

    def _set_status(self, status: WorkerStatus) -> None:
        self._status = status
        self._progress = None
        self._heartbeat.beat()

    def _describe(self) -> WorkerInfo:
        model = self._model
        return WorkerInfo(
            id=self.id,
            version=VERSION,
            started_at=self._started_at,
            heartbeat_at=time.time(),
            model=self._settings.served_model,
            limits=dict(self._shared.limits.told),
            aliases=self._settings.served_aliases,
            adapters=tuple(self._settings.model_adapters),
            status=self._status,
            progress=self._progress,
            slots=self._settings.slots,
            busy=len(self._runner.running),
            context_length=model.context_length if model else None,
            quantization=model.quantization if model else None,
            device=model.device if model else None,
            engine=self._settings.inference_engine,
            completion_types=self._engine.completion_types,
        )
