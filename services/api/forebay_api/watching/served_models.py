"""Which models there are: those that live workers serve, and those that requests can wait for.

A model is *known* if it is DEFAULT_MODEL, if a live worker serves it, or if it has a consumer on NATS, which its first
worker creates and which stays. Any other name is a 404. NO_WORKER_POLICY says whether a request for a known model
without a worker waits for one or is refused. `MODEL:ADAPTER` is served while all workers of the model have the adapter:
any of them may get the request.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple

from forebay_contracts.nats.consumers import KnownModel
from forebay_contracts.settings import ApiSettings
from forebay_contracts.wire.errors import AdapterNotFound, ModelNotFound, ModelUnavailable, UnsupportedByModel
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus
from forebay_contracts.wire.request import CompletionType

KNOWN_MODELS_AGE_S = 1.0
"""Least time between two questions to NATS for known models, however many unknown names come."""

_BY_READINESS = (WorkerStatus.READY, WorkerStatus.LOADING, WorkerStatus.DRAINING)


class Asked(NamedTuple):
    """What a client's `model` means: a model by its full name, and one of its adapters if it names one."""

    model: str
    adapter: str | None = None


class Models:
    """Names and aliases of models. `known` asks NATS for the models that have a consumer."""

    def __init__(
        self,
        settings: ApiSettings,
        workers: Callable[[], Iterable[WorkerInfo]],
        known: Callable[[], Awaitable[Mapping[str, KnownModel]]],
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._ask_known = known
        self._known: Mapping[str, KnownModel] = {}
        self._known_at = -float("inf")
        self._asking = asyncio.Lock()

    async def resolve(self, name: str) -> Asked:
        """What `name` means. A name goes before an alias, DEFAULT_MODEL before others, and each before MODEL:ADAPTER.

        Raises:
            ModelNotFound: no model has this name or alias.
            AdapterNotFound: no worker of the model has the adapter; without a worker, its newest one had none.
            ModelUnavailable: not all of its workers have it.
            QueueUnavailable: no live worker serves it, and NATS does not answer.
        """
        if name == self._settings.served_model:
            return Asked(name)
        if (model := await self._found(name)) is not None:
            return Asked(model)
        base, _, adapter = name.rpartition(":")  # see `names.adapter_model`
        if not base or not adapter or (model := await self._found(base)) is None:
            raise ModelNotFound(f"The model `{name}` does not exist or is not served here.", param="model")
        having = {adapter in worker.adapters for worker in self._taking(model)}
        if not having and model in (known := await self._known_models()):
            having = {adapter in known[model].adapters}
        if True not in having:
            raise AdapterNotFound(model, adapter)
        if False in having:
            where = "is not on every worker at the moment, try again later"
            raise ModelUnavailable(f"The adapter `{adapter}` of `{model}` {where}.", param="model")
        return Asked(model, adapter)

    def adapters(self, model: str) -> list[str]:
        """The adapters that every worker of `model` has that takes requests or will."""
        taking = self._taking(model)
        return [name for name in (taking[0].adapters if taking else ()) if all(name in one.adapters for one in taking)]

    def _taking(self, model: str) -> list[WorkerInfo]:
        return [one for one in self._workers() if one.model == model and one.status is not WorkerStatus.DRAINING]

    async def _found(self, name: str) -> str | None:
        settings = self._settings
        served = {settings.served_model: settings.served_aliases}
        for worker in self._workers():
            served[worker.model] = served.get(worker.model, ()) + worker.aliases
        found = _meant(name, served)
        return found or _meant(name, {model: known.aliases for model, known in (await self._known_models()).items()})

    async def admit(self, name: str, completion_type: CompletionType) -> Asked:
        """The model that a request of `completion_type` for `name` is queued for, and its adapter.

        Raises:
            ModelNotFound, AdapterNotFound, QueueUnavailable: see `resolve`.
            UnsupportedByModel: its workers serve other types of requests.
            ModelUnavailable: see `resolve`; or no worker serves or loads it, and NO_WORKER_POLICY is `refuse`.
        """
        asked = await self.resolve(name)
        model = asked.model
        workers = [worker for worker in self._workers() if worker.model == model]
        types = {served for worker in workers for served in worker.completion_types}
        if types and completion_type not in types:
            raise UnsupportedByModel(model, completion_type, types)
        if self._settings.no_worker_policy == "refuse" and all(w.status is WorkerStatus.DRAINING for w in workers):
            raise ModelUnavailable(f"The model `{model}` has no worker at the moment, try again later.", param="model")
        return asked

    def served(self) -> dict[str, list[WorkerInfo]]:
        """The live workers of each model, DEFAULT_MODEL first, with or without one.

        The first worker of a model speaks for it: ready ones come first, and of those the oldest.
        """
        by_model: dict[str, list[WorkerInfo]] = {self._settings.served_model: []}
        for worker in sorted(
            self._workers(), key=lambda one: (one.model, _BY_READINESS.index(one.status), one.started_at)
        ):
            by_model.setdefault(worker.model, []).append(worker)
        return by_model

    async def _known_models(self) -> Mapping[str, KnownModel]:
        async with self._asking:
            if time.monotonic() - self._known_at > KNOWN_MODELS_AGE_S:
                self._known = await self._ask_known()
                self._known_at = time.monotonic()
        return self._known


def _meant(name: str, aliases: Mapping[str, tuple[str, ...]]) -> str | None:
    if name in aliases:
        return name
    return next((model for model, others in aliases.items() if name in others), None)
