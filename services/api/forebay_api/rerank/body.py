"""The bodies of `POST /v1/rerank`, as Jina, Cohere and the inference servers have it, and of Cohere's `/v2/rerank`.

Sources: https://api.jina.ai/docs#tag/rerank, https://docs.cohere.com/v1/reference/rerank,
https://docs.cohere.com/reference/rerank.
"""

from typing import Annotated, Any, Final

from pydantic import Field

from forebay_api.openai.body import Bool, Int, LenientModel, Many, RequestBody
from forebay_contracts.wire.request import InferenceRequest

MAX_DOCUMENTS: Final = 2048

_Text = Annotated[str, Field(min_length=1)]


class TextDocument(LenientModel):
    """A document as an object."""

    text: _Text


class RerankBody(RequestBody):
    """Sort documents by their relevance to a query."""

    query: _Text
    documents: Annotated[Many[_Text | TextDocument], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Annotated[Int, Field(ge=1)] | None = None
    return_documents: Bool = True

    @property
    def texts(self) -> tuple[str, ...]:
        """The documents."""
        return tuple(one if isinstance(one, str) else one.text for one in self.documents)

    def request(self, **origin: Any) -> InferenceRequest:
        """The request as it goes into the queue."""
        return InferenceRequest(**origin, prompts=(self.query, *self.texts))


class RerankV2Body(RerankBody):
    """Sort documents by their relevance to a query, in the second form of Cohere."""

    return_documents: Bool = False
