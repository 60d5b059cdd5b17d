"""The body of `POST /v1/embeddings`.

Source: https://platform.openai.com/docs/api-reference/embeddings/create.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from forebay_api.openai.body import Int, Many, RequestBody, ServiceTier, Tokens, as_many
from forebay_contracts.wire.request import InferenceRequest

MAX_INPUTS = 2048
MAX_DIMENSIONS = 65_536

_Text = Annotated[str, Field(min_length=1)]
Input = _Text | Tokens | Annotated[Many[_Text], Field(min_length=1)] | Annotated[Many[Tokens], Field(min_length=1)]


class EmbeddingBody(RequestBody):
    """Turn texts into vectors."""

    input: Input
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[Int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None
    service_tier: ServiceTier | None = None

    @field_validator("input")
    @classmethod
    def _not_too_many(cls, value: Input) -> Input:
        # Not a bound on the union's members: the error would name the faults of the other members too.
        if not isinstance(value, str) and not isinstance(value[0], int) and len(value) > MAX_INPUTS:
            raise PydanticCustomError("too_long", "at most {max_length} inputs", {"max_length": MAX_INPUTS})
        return value

    def request(self, **origin: Any) -> InferenceRequest:
        """The request as it goes into the queue."""
        return InferenceRequest(**origin, prompts=as_many(self.input), dimensions=self.dimensions)
