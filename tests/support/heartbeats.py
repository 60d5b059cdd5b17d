"""The heartbeats of the services: events for a start, for a change and for a sign of life."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Set
from typing import TypeVar

from nats.aio.msg import Msg
from pydantic import ValidationError

from forebay_contracts.nats.connection import Connection
from forebay_contracts.wire import names
from forebay_contracts.wire.heartbeats import ApiInfo, WorkerInfo, WorkerStatus
from support.nats import flushed

T = TypeVar("T")


class Heartbeats:
    """The last heartbeat of each service, and how many of each were heard."""

    def __init__(self) -> None:
        self.apis: dict[str, ApiInfo] = {}
        self.workers: dict[str, WorkerInfo] = {}
        self.heard: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    async def listen(self, connection: Connection) -> None:
        """Hear all from now on. There need be no bucket yet: a heartbeat is a message like any other."""
        for bucket in (names.APIS_BUCKET, names.WORKERS_BUCKET):
            await connection.client.subscribe(names.bucket_subjects(bucket), cb=self._hear)
        await flushed(connection.client)

    async def until(self, found: Callable[[], T | None]) -> T:
        """Wait until the heartbeats say something, which `found` looks for after each."""
        async with self._changed:
            while (result := found()) is None:
                await self._changed.wait()
            return result

    def ready_worker(self, pid: int) -> str | None:
        """The id of the worker in this process, if it is ready."""
        for info in self.workers.values():
            if info.status is WorkerStatus.READY and f"-{pid}-" in info.id:
                return info.id
        return None

    def api_since(self, began: float, known: Set[str]) -> str | None:
        """The id of an api that started after `began` and is not among `known`."""
        return next((api for api, info in self.apis.items() if info.started_at >= began and api not in known), None)

    async def _hear(self, msg: Msg) -> None:
        with contextlib.suppress(ValidationError):  # a mark of deletion, or what a test has sent
            if names.APIS_BUCKET in msg.subject:
                api = ApiInfo.model_validate_json(msg.data)
                self.apis[api.id] = api
                self.heard[api.id] += 1
            else:
                worker = WorkerInfo.model_validate_json(msg.data)
                self.workers[worker.id] = worker
                self.heard[worker.id] += 1
        async with self._changed:
            self._changed.notify_all()
