"""The endpoints that queue a request: one row each.

Routing, the OpenAPI document, log prefixes and metrics follow from this table. To add an endpoint, write a folder with
its body and its answer format, and add a row. What only reads or cancels is a FastAPI router of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from forebay_api.openai.body import RequestBody
from forebay_api.openai.chat.body import ChatCompletionBody
from forebay_api.openai.chat.format import ChatFormat
from forebay_api.openai.completions.body import CompletionBody
from forebay_api.openai.completions.format import CompletionFormat
from forebay_api.openai.embeddings.body import EmbeddingBody
from forebay_api.openai.embeddings.format import EmbeddingFormat
from forebay_api.openai.format import Format
from forebay_contracts.wire.request import CompletionType, InferenceRequest


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One row. `format` makes the writer of one answer from the request and its body."""

    method: str
    path: str
    completion_type: CompletionType
    body: type[RequestBody]
    format: Callable[[InferenceRequest, Any], Format]
    log_prefix: str

    @property
    def summary(self) -> str:
        """What it does: the docstring of its body."""
        return (self.body.__doc__ or "").removesuffix(".")


ENDPOINTS: Final = (
    Endpoint("POST", "/v1/chat/completions", CompletionType.CHAT, ChatCompletionBody, ChatFormat, "[Chat Completions]"),
    Endpoint("POST", "/v1/completions", CompletionType.COMPLETION, CompletionBody, CompletionFormat, "[Completions]"),
    Endpoint("POST", "/v1/embeddings", CompletionType.EMBEDDING, EmbeddingBody, EmbeddingFormat, "[Embeddings]"),
)
