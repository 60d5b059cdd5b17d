"""The embedding engine: a sentence-transformers model whose forward passes many requests share."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pickle import UnpicklingError

import torch
from sentence_transformers import SentenceTransformer

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError
from forebay_inference.engine.embedding.batch import EmbeddingBatch, Job
from forebay_inference.engine.protocol import EngineFault, EngineStatus, LoadedModel
from forebay_inference.engine.threads import in_daemon_thread
from forebay_inference.engine.tokenizer import LibraryTokenizer
from forebay_inference.engine.transformers.devices import resolve_device, use_cpus
from forebay_inference.models.store import ensure_model

logging.getLogger("sentence_transformers").setLevel(logging.WARNING)


class EmbeddingEngine:
    """Serves one model. Construct, `start`, `embed` often, `close`.

    The weights keep the precision of the checkpoint: embedding models are small, and what they are compared with
    was computed with these weights.
    """

    def __init__(self, settings: InferenceSettings) -> None:
        self._settings = settings
        self._batch: EmbeddingBatch | None = None

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """Fetch, load and warm up; see `Engine.start`.

        Raises:
            ConfigurationError: the model or the device cannot be had.
        """
        refuse_quantization(self._settings)
        model = await in_daemon_thread(lambda: self._load(progress))
        progress("warming up")
        tokenizer = LibraryTokenizer(model.tokenizer)

        def embed(batch: list[Sequence[int]]) -> list[bytes]:
            return _embed(model, batch)

        embed([tokenizer.encode("warm")])
        self._batch = EmbeddingBatch(embed, self._settings.llm_batch_size, asyncio.get_running_loop())
        self._batch.start()
        return LoadedModel(
            tokenizer,
            model.max_seq_length or model.tokenizer.model_max_length,
            "none",
            str(model.device),
            dimensions=model.get_embedding_dimension() or 0,
            prefix=model.prompts.get(model.default_prompt_name or "", "") or "",
        )

    def _load(self, progress: Callable[[str], None]) -> SentenceTransformer:
        settings = self._settings
        folder = ensure_model(settings.default_model, settings.data_dir, progress, settings.hf_token)
        if not (folder / "modules.json").is_file():
            raise ConfigurationError(
                f"DEFAULT_MODEL={settings.default_model} is no sentence-transformers model: it has no modules.json"
            )
        device = resolve_device(settings.model_device)
        use_cpus(device)
        progress(f"loading the weights ({device})")
        try:
            return SentenceTransformer(str(folder), device=str(device), local_files_only=True).eval()
        except UnpicklingError as exc:
            raise ConfigurationError(f"{folder}: its .bin file holds more than weights, and is not loaded") from exc

    async def embed(
        self, inputs: Mapping[int, Sequence[int]], dimensions: int | None
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """See `Embedder.embed`; the dimensions are always the model's."""
        batch = self._batch
        if batch is None:
            raise EngineFault("the engine is not started, or closed")
        job = Job(inputs)
        batch.submit(job)
        try:
            while job.unfinished:
                for index, values in await job.next_vectors():
                    yield index, values
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


def _embed(model: SentenceTransformer, batch: list[Sequence[int]]) -> list[bytes]:
    """One forward pass: the vector of each, as little-endian float32."""
    padded = model.tokenizer.pad({"input_ids": batch}, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        vectors = model(dict(padded))["sentence_embedding"]
    return rows_of(vectors)


def rows_of(vectors: torch.Tensor) -> list[bytes]:
    """Each row as little-endian float32."""
    rows = vectors.to(device="cpu", dtype=torch.float32).numpy().astype("<f4", copy=False)
    return [row.tobytes() for row in rows]


def refuse_quantization(settings: InferenceSettings) -> None:
    """Raises ConfigurationError if MODEL_QUANTIZATION asks for one."""
    if (quantization := settings.model_quantization) not in ("auto", "none"):
        raise ConfigurationError(
            f"MODEL_QUANTIZATION={quantization}: an embedding model keeps its precision; use auto or none"
        )
