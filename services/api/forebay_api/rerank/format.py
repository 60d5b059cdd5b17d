"""The answer of `POST /v1/rerank`."""

import base64
import struct
from collections.abc import Iterable
from typing import Any

import orjson

from forebay_api.rerank.body import RerankBody
from forebay_contracts.wire.frames import Completed, Delta
from forebay_contracts.wire.request import InferenceRequest


class RerankFormat:
    """The documents with their scores, the most relevant first, at most `top_n`."""

    def __init__(self, request: InferenceRequest, body: RerankBody) -> None:
        self._request = request
        self._body = body

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """The answer."""
        scores = {delta.index: _score(delta.embedding) for delta in deltas if delta.embedding}
        best = sorted(scores, key=lambda index: (-scores[index], index))[: self._body.top_n]
        tokens = completed.usage.prompt_tokens
        return orjson.dumps(
            {
                "id": self._request.id,
                "object": "list",
                "model": self._request.named_model,
                "results": [self._result(index, scores[index]) for index in best],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    def _result(self, index: int, score: float) -> dict[str, Any]:
        result: dict[str, Any] = {"index": index, "relevance_score": score}
        if self._body.return_documents:
            # Behind the query, which is the first.
            result["document"] = {"text": self._request.prompts[1 + index]}
        return result


def _score(encoded: str) -> float:
    score: float = struct.unpack("<f", base64.b64decode(encoded))[0]
    return score
