"""The answer of `POST /v1/embeddings`.

Source: https://platform.openai.com/docs/api-reference/embeddings/object.
"""

import base64
import sys
from array import array
from collections.abc import Iterable
from typing import Any

import orjson

from forebay_api.openai.embeddings.body import EmbeddingBody
from forebay_contracts.wire.frames import Completed, Delta
from forebay_contracts.wire.request import InferenceRequest


class EmbeddingFormat:
    """A list of vectors: each a list of numbers, or base64 as it came from the worker."""

    def __init__(self, request: InferenceRequest, body: EmbeddingBody) -> None:
        self._model = request.named_model
        self._tier = request.service_tier
        self._base64 = body.encoding_format == "base64"

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """The answer, with the vectors in the order of the inputs."""
        vectors = sorted((delta for delta in deltas if delta.embedding), key=lambda delta: delta.index)
        tokens = completed.usage.prompt_tokens
        return orjson.dumps(
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": delta.index, "embedding": self._vector(delta.embedding)}
                    for delta in vectors
                ],
                "model": self._model,
                "service_tier": self._tier,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    def _vector(self, encoded: str) -> Any:
        if self._base64:
            return encoded
        values = array("f")
        values.frombytes(base64.b64decode(encoded))
        if sys.byteorder == "big":
            values.byteswap()
        # Each vector by itself: the event loop runs in between, while a thread writes thousands of them.
        return orjson.Fragment(orjson.dumps(values.tolist()))
