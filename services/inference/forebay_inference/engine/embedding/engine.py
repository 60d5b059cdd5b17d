"""The embedding engine: a sentence-transformers model whose forward passes many requests share."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError, InvalidRequest
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_inference.engine.embedding.batch import EmbeddingBatch, Job
from forebay_inference.engine.protocol import (
    Accepted,
    EngineEvent,
    EngineFault,
    EngineLoad,
    Finished,
    ModelInfo,
    ResumeTokens,
    Vector,
)
from forebay_inference.engine.threads import in_daemon_thread
from forebay_inference.engine.transformers.loading import resolve_device, usable_cpus
from forebay_inference.models.store import ensure_model

logging.getLogger("sentence_transformers").setLevel(logging.WARNING)


class EmbeddingEngine:
    """Serves one model. Construct, `start`, `generate` often, `close`.

    The weights keep the precision of the checkpoint: embedding models are small, and what they are compared with
    was computed with these weights. Tokens are counted as the model sees them, those that the tokenizer adds included.
    """

    completion_types: tuple[CompletionType, ...] = (CompletionType.EMBEDDING,)

    def __init__(
        self, *, model: str, served_name: str, data_dir: Path, quantization: str, device: str, max_batch_tokens: int
    ) -> None:
        self._model_source = model
        self._served_name = served_name
        self._data_dir = data_dir
        self._quantization = quantization
        self._device_name = device
        self._max_batch_tokens = max_batch_tokens
        self._encoder: Encoder | None = None
        self._batch: EmbeddingBatch | None = None
        # Tokenizing many long inputs takes a while; one thread keeps it off the event loop.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    @classmethod
    def from_settings(cls, settings: InferenceSettings) -> "EmbeddingEngine":
        """The engine that `settings` ask for; reads and loads nothing yet."""
        return cls(
            model=settings.default_model,
            served_name=settings.served_model,
            data_dir=settings.data_dir,
            quantization=settings.model_quantization,
            device=settings.model_device,
            max_batch_tokens=settings.llm_batch_size,
        )

    async def start(self, progress: Callable[[str], None]) -> ModelInfo:
        """Fetch, load and warm up; see `Engine.start`.

        Raises:
            ConfigurationError: the model or the device cannot be had.
        """
        if self._quantization not in ("auto", "none"):
            raise ConfigurationError(
                f"MODEL_QUANTIZATION={self._quantization}: an embedding model keeps its precision; use auto or none"
            )
        encoder = await in_daemon_thread(lambda: self._load(progress))
        progress("warming up")
        encoder.embed([encoder.encode("warm", 0)])
        batch = EmbeddingBatch(encoder.embed, self._max_batch_tokens, asyncio.get_running_loop())
        batch.start()
        self._encoder, self._batch = encoder, batch
        return ModelInfo(self._served_name, encoder.context_length, "none", str(encoder.device))

    def _load(self, progress: Callable[[str], None]) -> "Encoder":
        folder = ensure_model(self._model_source, self._data_dir, progress)
        if not (folder / "modules.json").is_file():
            raise ConfigurationError(
                f"DEFAULT_MODEL={self._model_source} is no sentence-transformers model: it has no modules.json"
            )
        device = resolve_device(self._device_name)
        if device.type == "cpu":
            torch.set_num_threads(usable_cpus())
        progress(f"loading the weights ({device})")
        return Encoder(SentenceTransformer(str(folder), device=str(device), local_files_only=True), device)

    async def generate(self, request: InferenceRequest, resume: ResumeTokens) -> AsyncGenerator[EngineEvent, None]:
        """See `Engine.generate`."""
        if self._encoder is None or self._batch is None:
            raise EngineFault("the engine is not started, or closed")
        encoder = self._encoder
        encoded = await asyncio.get_running_loop().run_in_executor(self._preparing, encoder.prepare, request)
        yield Accepted(sum(map(len, encoded)))
        for index in resume:
            yield Finished(index, "stop")
        job = Job({index: tokens for index, tokens in enumerate(encoded) if index not in resume})
        self._batch.submit(job)
        try:
            while job.unfinished:
                for index, values in await job.next_vectors():
                    yield Vector(index, values)
                    yield Finished(index, "stop")
        finally:
            self._batch.cancel(job)

    @property
    def forward_passes(self) -> int:
        """How many passes have been computed."""
        return 0 if self._batch is None else self._batch.passes

    def fault(self) -> str | None:
        """See `Engine.fault`."""
        return None if self._batch is None else self._batch.fault()

    def load(self) -> EngineLoad:
        """See `Engine.load`."""
        return EngineLoad(0, 0) if self._batch is None else EngineLoad(self._batch.rows, self._batch.passes)

    async def close(self) -> None:
        """See `Engine.close`."""
        batch, self._batch, self._encoder = self._batch, None, None
        self._preparing.shutdown(wait=False, cancel_futures=True)
        if batch is not None:
            await in_daemon_thread(batch.stop)


class Encoder:
    """The model with its tokenizer: inputs to token ids, token ids to vectors."""

    def __init__(self, model: SentenceTransformer, device: torch.device) -> None:
        self._model = model.eval()
        self._tokenizer: Any = model.tokenizer
        self._prompt: str = model.prompts.get(model.default_prompt_name or "", "") or ""
        self.device = device
        self.context_length: int = model.max_seq_length or self._tokenizer.model_max_length
        self.dimensions: int = model.get_embedding_dimension() or 0
        self._before, self._after = self._added_tokens()

    def prepare(self, request: InferenceRequest) -> list[list[int]]:
        """The token ids of every input.

        Raises:
            InvalidRequest: an input is too long, or no input of this model; or it cannot have so few dimensions.
        """
        if request.dimensions not in (None, self.dimensions):
            raise InvalidRequest(
                f"This model's embeddings have {self.dimensions} dimensions, which cannot be changed.",
                param="dimensions",
            )
        return [self.encode(given, index) for index, given in enumerate(request.prompts)]

    def encode(self, given: str | tuple[int, ...], index: int) -> list[int]:
        """The token ids of one input, those included that the tokenizer adds; raises InvalidRequest."""
        if isinstance(given, str):
            text = self._prompt + given
            tokens: list[int] = self._tokenizer(text, truncation=False, verbose=False).input_ids
        else:
            if max(given) >= len(self._tokenizer):
                raise InvalidRequest(f"{max(given)} is no token of this model.", param=f"input[{index}]")
            tokens = [*self._before, *given, *self._after]
        if len(tokens) > self.context_length:
            raise InvalidRequest(
                f"This model's maximum context length is {self.context_length} tokens. However, input {index} "
                f"resulted in {len(tokens)} tokens. Please reduce its length.",
                param="input",
                code="context_length_exceeded",
            )
        return tokens

    def embed(self, batch: list[list[int]]) -> list[bytes]:
        """One forward pass: the vector of each, as little-endian float32."""
        padded = self._tokenizer.pad({"input_ids": batch}, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            vectors = self._model(dict(padded))["sentence_embedding"]
        rows = vectors.to(device="cpu", dtype=torch.float32).numpy().astype("<f4", copy=False)
        return [row.tobytes() for row in rows]

    def _added_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after an input (`[CLS]` and `[SEP]` for instance)."""
        whole: list[int] = self._tokenizer("a").input_ids
        bare: list[int] = self._tokenizer("a", add_special_tokens=False).input_ids
        start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]
