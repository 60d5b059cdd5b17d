"""The engine of cross-encoders: a sentence-transformers model that scores pairs, whose passes many requests share."""

import asyncio
import json
import struct
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import cast

import torch
from sentence_transformers import CrossEncoder

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.embedding.local import LocalEngine, rows_of
from forebay_inference.engine.protocol import LoadedModel
from forebay_inference.engine.tokenizer import LibraryTokenizer


class _Pair(list[int]):
    """The token ids of a query and a document. `types` tells the two apart, None for a model without."""

    types: list[int] | None = None


class CrossEncoderEngine(LocalEngine):
    """Serves one model. Construct, `start`, `rerank` often, `close`. A score is what `CrossEncoder.predict` gives."""

    def __init__(self, settings: InferenceSettings) -> None:
        super().__init__(settings)
        self._model: CrossEncoder | None = None

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """Fetch, load and warm up; see `Engine.start`.

        Raises:
            ConfigurationError: the model or the device cannot be had.
        """
        self._model = model = (await self._loaded(CrossEncoder, _fault, progress)).eval()
        progress("warming up")

        def score(batch: list[Sequence[int]]) -> list[bytes]:
            return _score(model, batch)

        score([self._pair("warm", "up")])
        self._begin(score)
        return LoadedModel(LibraryTokenizer(model.tokenizer), self._longest(model), "none", str(model.device))

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
        pairs = await asyncio.to_thread(self._pairs, query, documents)
        async with aclosing(self._computed(pairs)) as passes:
            async for found in passes:
                scores = {index: struct.unpack("<f", values)[0] for index, values in found}
                yield scores, sum(len(pairs[index]) for index in scores)


def _fault(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text())
    labels = config.get("num_labels") or len(config.get("id2label") or ())
    if "ForSequenceClassification" in str(config.get("architectures")) and labels == 1:
        return None
    # The library would load it, with a head of random weights.
    return "is no cross-encoder: config.json names no ...ForSequenceClassification of one label"


def _score(model: CrossEncoder, batch: list[Sequence[int]]) -> list[bytes]:
    """One forward pass: the score of each pair, as little-endian float32."""
    pairs = cast(list[_Pair], batch)
    fields = {"input_ids": [list(pair) for pair in pairs]}
    if types := [pair.types for pair in pairs if pair.types is not None]:
        fields["token_type_ids"] = types
    padded = model.tokenizer.pad(fields, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        return rows_of(model.activation_fn(model(dict(padded))["scores"].float()).reshape(-1, 1))
