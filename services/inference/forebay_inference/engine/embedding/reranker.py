"""The engine of cross-encoders: a sentence-transformers model that scores pairs, whose passes many requests share."""

import asyncio
import json
import struct
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import cast

import torch
from sentence_transformers import CrossEncoder

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import ConfigurationError, InvalidRequest
from forebay_inference.engine.embedding.batch import EmbeddingBatch, Job
from forebay_inference.engine.embedding.engine import refuse_quantization, rows_of
from forebay_inference.engine.protocol import EngineFault, EngineStatus, LoadedModel
from forebay_inference.engine.threads import in_daemon_thread
from forebay_inference.engine.tokenizer import LibraryTokenizer
from forebay_inference.engine.transformers.devices import resolve_device, use_cpus
from forebay_inference.models.store import ensure_model


class _Pair(list[int]):
    """The token ids of a query and a document. `types` tells the two apart, None for a model without."""

    types: list[int] | None = None


class CrossEncoderEngine:
    """Serves one model. Construct, `start`, `rerank` often, `close`. A score is what `CrossEncoder.predict` gives."""

    def __init__(self, settings: InferenceSettings) -> None:
        self._settings = settings
        self._model: CrossEncoder | None = None
        self._batch: EmbeddingBatch | None = None

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """Fetch, load and warm up; see `Engine.start`.

        Raises:
            ConfigurationError: the model or the device cannot be had.
        """
        refuse_quantization(self._settings)
        self._model = model = await in_daemon_thread(lambda: self._load(progress))
        progress("warming up")

        def score(batch: list[Sequence[int]]) -> list[bytes]:
            return _score(model, batch)

        score([self._pair("warm", "up")])
        self._batch = EmbeddingBatch(score, self._settings.llm_batch_size, asyncio.get_running_loop())
        self._batch.start()
        return LoadedModel(LibraryTokenizer(model.tokenizer), self._longest(model), "none", str(model.device))

    def _load(self, progress: Callable[[str], None]) -> CrossEncoder:
        settings = self._settings
        folder = ensure_model(settings.default_model, settings.data_dir, progress, settings.hf_token)
        if not _is_cross_encoder(folder):
            # The library would load it, with a head of random weights.
            raise ConfigurationError(
                f"DEFAULT_MODEL={settings.default_model} is no cross-encoder: config.json names no "
                "...ForSequenceClassification of one label"
            )
        device = resolve_device(settings.model_device)
        use_cpus(device)
        progress(f"loading the weights ({device})")
        try:
            return CrossEncoder(str(folder), device=str(device), local_files_only=True).eval()
        except UnpicklingError as exc:
            raise ConfigurationError(f"{folder}: its .bin file holds more than weights, and is not loaded") from exc

    @staticmethod
    def _longest(model: CrossEncoder) -> int:
        return int(model.max_seq_length or model.tokenizer.model_max_length)

    def _pair(self, query: str, document: str) -> _Pair:
        model = self._model
        assert model is not None
        cut = model.tokenizer(query, document, truncation=False, verbose=False)
        pair = _Pair(cut.input_ids)
        pair.types = cut.get("token_type_ids")
        return pair

    def _pairs(self, query: str, documents: Mapping[int, str]) -> dict[int, _Pair]:
        """The pairs, by index; raises InvalidRequest for one that is too long."""
        assert self._model is not None
        longest = self._longest(self._model)
        pairs: dict[int, _Pair] = {}
        for index, document in documents.items():
            pairs[index] = pair = self._pair(query, document)
            if len(pair) > longest:
                raise InvalidRequest(
                    f"This model's maximum context length is {longest} tokens. However, the query and document {index} "
                    f"resulted in {len(pair)} tokens. Please reduce their length.",
                    param="documents",
                    code="context_length_exceeded",
                )
        return pairs

    async def rerank(
        self, query: str, documents: Mapping[int, str]
    ) -> AsyncGenerator[tuple[Mapping[int, float], int], None]:
        """See `Reranker.rerank`."""
        batch = self._batch
        if batch is None:
            raise EngineFault("the engine is not started, or closed")
        pairs = await asyncio.to_thread(self._pairs, query, documents)
        job = Job(pairs)
        batch.submit(job)
        try:
            while job.unfinished:
                found = await job.next_vectors()
                scores = {index: struct.unpack("<f", values)[0] for index, values in found}
                yield scores, sum(len(pairs[index]) for index in scores)
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


def _is_cross_encoder(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text())
    labels = config.get("num_labels") or len(config.get("id2label") or ())
    return "ForSequenceClassification" in str(config.get("architectures")) and labels == 1


def _score(model: CrossEncoder, batch: list[Sequence[int]]) -> list[bytes]:
    """One forward pass: the score of each pair, as little-endian float32."""
    pairs = cast(list[_Pair], batch)
    fields = {"input_ids": [list(pair) for pair in pairs]}
    if types := [pair.types for pair in pairs if pair.types is not None]:
        fields["token_type_ids"] = types
    padded = model.tokenizer.pad(fields, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        return rows_of(model.activation_fn(model(dict(padded))["scores"].float()).reshape(-1, 1))
