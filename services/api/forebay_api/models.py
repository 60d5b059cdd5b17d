"""Which models are served: what live workers say, and DEFAULT_MODEL, whose requests wait until a worker comes."""

from collections.abc import Callable, Iterable

from forebay_contracts.errors import ModelNotFound
from forebay_contracts.messages import WorkerInfo
from forebay_contracts.settings import Settings


class Models:
    """Names and aliases, from the live workers at each question."""

    def __init__(self, settings: Settings, workers: Callable[[], Iterable[WorkerInfo]]) -> None:
        self._settings = settings
        self._workers = workers

    def resolve(self, name: str) -> str:
        """The model that `name` means; raises ModelNotFound."""
        settings = self._settings
        if name == settings.served_model or name in settings.served_aliases:
            return settings.served_model
        for worker in self._workers():
            if name == worker.model or name in worker.aliases:
                return worker.model
        raise ModelNotFound(f"The model `{name}` does not exist or is not served here.", param="model")

    def served(self) -> dict[str, WorkerInfo | None]:
        """Each served model, with one of its workers where one lives."""
        models: dict[str, WorkerInfo | None] = {self._settings.served_model: None}
        for worker in self._workers():
            models[worker.model] = worker
        return models
