"""Which models there are: those that live workers serve, and those that requests can wait for.

A model is *known* if it is DEFAULT_MODEL, if a live worker serves it, or if it has a consumer on NATS, which its first
worker creates and which stays. Any other name is a 404. NO_WORKER_POLICY says whether a request for a known model
without a worker waits for one or is refused.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

from forebay_contracts.settings import ApiSettings
from forebay_contracts.wire.errors import ModelNotFound, ModelUnavailable, UnsupportedByModel
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus
from forebay_contracts.wire.request import CompletionType

KNOWN_MODELS_AGE_S = 1.0
"""Least time between two questions to NATS for known models, however many unknown names come."""

_BY_READINESS = (WorkerStatus.READY, WorkerStatus.LOADING, WorkerStatus.DRAINING)


class Models:
    """Names and aliases of models. `known` asks NATS for the models that have a consumer, with their aliases."""

    def __init__(
        self,
        settings: ApiSettings,
        workers: Callable[[], Iterable[WorkerInfo]],
        known: Callable[[], Awaitable[Mapping[str, tuple[str, ...]]]],
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._ask_known = known
        self._known: Mapping[str, tuple[str, ...]] = {}
        self._known_at = -float("inf")
        self._asking = asyncio.Lock()

    async def resolve(self, name: str) -> str:
        """The model that `name` means. A name goes before an alias, and DEFAULT_MODEL before others.

        Raises:
            ModelNotFound: no model has this name or alias.
            QueueUnavailable: no live worker serves it, and NATS does not answer.
        """
        settings = self._settings
        if name == settings.served_model:
            return name
        served = {settings.served_model: settings.served_aliases}
        for worker in self._workers():
            served[worker.model] = served.get(worker.model, ()) + worker.aliases
        found = _meant(name, served) or _meant(name, await self._known_models())
        if found is None:
            raise ModelNotFound(f"The model `{name}` does not exist or is not served here.", param="model")
        return found

    async def admit(self, name: str, completion_type: CompletionType) -> str:
        """The model that a request of `completion_type` for `name` is queued for.

        Raises:
            ModelNotFound, QueueUnavailable: see `resolve`.
            UnsupportedByModel: its workers serve other types of requests.
            ModelUnavailable: no worker serves or loads it, and NO_WORKER_POLICY is `refuse`.
        """
        model = await self.resolve(name)
        workers = [worker for worker in self._workers() if worker.model == model]
        types = {served for worker in workers for served in worker.completion_types}
        if types and completion_type not in types:
            raise UnsupportedByModel(model, completion_type, types)
        if self._settings.no_worker_policy == "refuse" and all(w.status is WorkerStatus.DRAINING for w in workers):
            raise ModelUnavailable(f"The model `{model}` has no worker at the moment, try again later.", param="model")
        return model

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

    async def _known_models(self) -> Mapping[str, tuple[str, ...]]:
        async with self._asking:
            if time.monotonic() - self._known_at > KNOWN_MODELS_AGE_S:
                self._known = await self._ask_known()
                self._known_at = time.monotonic()
        return self._known


def _meant(name: str, aliases: Mapping[str, tuple[str, ...]]) -> str | None:
    if name in aliases:
        return name
    return next((model for model, others in aliases.items() if name in others), None)
