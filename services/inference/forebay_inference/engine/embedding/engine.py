"""The embedding engine: a sentence-transformers model whose forward passes many requests share."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from forebay_inference.engine.embedding.local import LocalEngine, rows_of
from forebay_inference.engine.protocol import LoadedModel
from forebay_inference.engine.tokenizer import LibraryTokenizer


class EmbeddingEngine(LocalEngine):
    """Serves one model. Construct, `start`, `embed` often, `close`.

    The weights keep the precision of the checkpoint: embedding models are small, and what they are compared with
    was computed with these weights.
    """

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """Fetch, load and warm up; see `Engine.start`.

        Raises:
            ConfigurationError: the model or the device cannot be had.
        """
        model = (await self._loaded(SentenceTransformer, _fault, progress)).eval()
        progress("warming up")
        tokenizer = LibraryTokenizer(model.tokenizer)

        def embed(batch: list[Sequence[int]]) -> list[bytes]:
            return _embed(model, batch)

        embed([tokenizer.encode("warm")])
        self._begin(embed)
        return LoadedModel(
            tokenizer,
            model.max_seq_length or model.tokenizer.model_max_length,
            "none",
            str(model.device),
            dimensions=model.get_embedding_dimension() or 0,
            prefix=model.prompts.get(model.default_prompt_name or "", "") or "",
        )

    async def embed(
        self, inputs: Mapping[int, Sequence[int]], dimensions: int | None
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """See `Embedder.embed`; the dimensions are always the model's."""
        async with aclosing(self._computed(inputs)) as passes:
            async for vectors in passes:
                for index, values in vectors:
                    yield index, values


def _fault(folder: Path) -> str | None:
    return None if (folder / "modules.json").is_file() else "is no sentence-transformers model: it has no modules.json"


def _embed(model: SentenceTransformer, batch: list[Sequence[int]]) -> list[bytes]:
    """One forward pass: the vector of each, as little-endian float32."""
    padded = model.tokenizer.pad({"input_ids": batch}, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        vectors = model(dict(padded))["sentence_embedding"]
    return rows_of(vectors)
