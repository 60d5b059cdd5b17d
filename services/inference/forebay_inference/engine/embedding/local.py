"""What the engines of sentence-transformers have in common: how a model is loaded, and the batch that computes."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

import torch

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.embedding.batch import EmbeddingBatch, Job, Vectors
from forebay_inference.engine.protocol import EngineFault, EngineStatus
from forebay_inference.engine.threads import in_daemon_thread
from forebay_inference.engine.transformers.devices import resolve_device, use_cpus
from forebay_inference.models.store import ensure_model

Loaded = TypeVar("Loaded")

logging.getLogger("sentence_transformers").setLevel(logging.WARNING)


class LocalEngine:
    """Has a model in this process, and a batch for it from `start` to `close`."""

    def __init__(self, settings: InferenceSettings) -> None:
        self._settings = settings
        self._batch: EmbeddingBatch | None = None

    async def _loaded(
        self, kind: Callable[..., Loaded], fault: Callable[[Path], str | None], progress: Callable[[str], None]
    ) -> Loaded:
        """Fetch the model and load it as `kind`, in a thread.

        Raises:
            ConfigurationError: the model or the device cannot be had, or `fault` says why its folder is the wrong one.
        """
        return await in_daemon_thread(lambda: self._load(kind, fault, progress))

    def _load(
        self, kind: Callable[..., Loaded], fault: Callable[[Path], str | None], progress: Callable[[str], None]
    ) -> Loaded:
        settings = self._settings
        if (quantization := settings.model_quantization) not in ("auto", "none"):
            raise ConfigurationError(
                f"MODEL_QUANTIZATION={quantization}: an embedding model keeps its precision; use auto or none"
            )
        folder = ensure_model(settings.default_model, settings.data_dir, progress, settings.hf_token)
        if (wrong := fault(folder)) is not None:
            raise ConfigurationError(f"DEFAULT_MODEL={settings.default_model} {wrong}")
        device = resolve_device(settings.model_device)
        use_cpus(device)
        progress(f"loading the weights ({device})")
        try:
            return kind(str(folder), device=str(device), local_files_only=True)
        except UnpicklingError as exc:
            raise ConfigurationError(f"{folder}: its .bin file holds more than weights, and is not loaded") from exc

    def _begin(self, compute: Callable[[list[Sequence[int]]], list[bytes]]) -> None:
        """Have `compute` run the forward passes from now on."""
        self._batch = EmbeddingBatch(compute, self._settings.llm_batch_size, asyncio.get_running_loop())
        self._batch.start()

    async def _computed(self, inputs: Mapping[int, Sequence[int]]) -> AsyncGenerator[Vectors, None]:
        """What each pass brings of `inputs`. Closing the generator takes out what was not computed yet."""
        if (batch := self._batch) is None:
            raise EngineFault("the engine is not started, or closed")
        job = Job(inputs)
        batch.submit(job)
        try:
            while job.unfinished:
                yield await job.next_vectors()
        finally:
            batch.cancel(job)

    def status(self) -> EngineStatus:
        """See `Engine.status`."""
        return EngineStatus(None, 0, 0) if self._batch is None else self._batch.status()

    async def close(self) -> None:
        """See `Engine.close`."""
        batch, self._batch = self._batch, None
        if batch is not None:
            await in_daemon_thread(batch.stop)


def rows_of(vectors: torch.Tensor) -> list[bytes]:
    """Each row as little-endian float32."""
    rows = vectors.to(device="cpu", dtype=torch.float32).numpy().astype("<f4", copy=False)
    return [row.tobytes() for row in rows]
