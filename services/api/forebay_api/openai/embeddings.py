"""OpenAI's embeddings: the body of a request, and its answer.

Source: https://platform.openai.com/docs/api-reference/embeddings.
"""

import base64
import sys
from array import array
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from forebay_api.openai.schemas import Int, RequestBody, Token, as_many
from forebay_contracts.wire.frames import Completed, Delta
from forebay_contracts.wire.request import CompletionType, InferenceRequest

MAX_INPUTS = 2048
MAX_DIMENSIONS = 65_536

_Text = Annotated[str, Field(min_length=1)]
_Tokens = Annotated[tuple[Token, ...], Field(min_length=1)]
Input = (
    _Text
    | _Tokens
    | Annotated[tuple[_Text, ...], Field(min_length=1)]
    | Annotated[tuple[_Tokens, ...], Field(min_length=1)]
)


class EmbeddingBody(RequestBody):
    """`POST /v1/embeddings`."""

    completion_type = CompletionType.EMBEDDING

    input: Input
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[Int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None

    @field_validator("input")
    @classmethod
    def _not_too_many(cls, value: Input) -> Input:
        # Not a bound of the union's members: then the others' faults would be told beside it.
        if not isinstance(value, str) and not isinstance(value[0], int) and len(value) > MAX_INPUTS:
            raise PydanticCustomError("too_long", "at most {max_length} inputs", {"max_length": MAX_INPUTS})
        return value

    @property
    def inputs(self) -> tuple[str | tuple[int, ...], ...]:
        """The inputs, one or many, as text or token ids."""
        return as_many(self.input)

    def request(
        self, *, request_id: str, model: str, created_at: float, deadline: float, reply_to: str, key: str | None
    ) -> InferenceRequest:
        """The request as it goes into the queue; `model` is the name that the alias in the body stands for."""
        return InferenceRequest(
            id=request_id,
            completion_type=self.completion_type,
            model=model,
            created_at=created_at,
            deadline=deadline,
            reply_to=reply_to,
            key=key,
            prompts=self.inputs,
            dimensions=self.dimensions,
        )


class EmbeddingFormat:
    """The list of vectors: as lists of numbers, or in base64 as they came from the worker."""

    def __init__(self, request: InferenceRequest, *, base64: bool) -> None:
        self._model = request.model
        self._base64 = base64

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """The answer; the vectors stand in the order of the inputs, whatever order they came in."""
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
        return values.tolist()
