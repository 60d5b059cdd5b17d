"""The endpoints that queue a request: one row each.

Routing, the OpenAPI document, log prefixes and metrics follow from this table. To add an endpoint, write a folder with
its body and its answer format, and add a row. What only reads or cancels is a FastAPI router of its own.
"""

from dataclasses import dataclass
from typing import Final

from forebay_api.anthropic.errors import ANTHROPIC
from forebay_api.anthropic.messages.body import CountTokensBody, MessagesBody
from forebay_api.anthropic.messages.create import answer, count
from forebay_api.http.errors import OPENAI, Shape
from forebay_api.openai.body import RequestBody
from forebay_api.openai.chat.body import ChatCompletionBody
from forebay_api.openai.chat.create import complete
from forebay_api.openai.completions.body import CompletionBody
from forebay_api.openai.completions.format import CompletionFormat
from forebay_api.openai.embeddings.body import EmbeddingBody
from forebay_api.openai.embeddings.format import EmbeddingFormat
from forebay_api.openai.responses.body import CompactBody, InputTokensBody, ResponseBody
from forebay_api.openai.responses.create import compact, count_input, respond
from forebay_api.prepare import Prepare, live
from forebay_api.rerank.body import RerankBody, RerankV2Body
from forebay_api.rerank.format import RerankFormat
from forebay_contracts.wire.request import CompletionType

CHAT, COMPLETION, EMBEDDING = CompletionType.CHAT, CompletionType.COMPLETION, CompletionType.EMBEDDING
RERANK = CompletionType.RERANK


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One row. `prepare` makes of a body what goes into the queue, and who writes the answer; `errors` tells errors."""

    method: str
    path: str
    completion_type: CompletionType
    body: type[RequestBody]
    prepare: Prepare
    log_prefix: str
    errors: Shape = OPENAI

    @property
    def summary(self) -> str:
        """What it does: the docstring of its body."""
        return (self.body.__doc__ or "").removesuffix(".")


# fmt: off
ENDPOINTS: Final = (
    Endpoint("POST", "/v1/chat/completions", CHAT, ChatCompletionBody, complete, "[Chat Completions]"),
    Endpoint("POST", "/v1/completions", COMPLETION, CompletionBody, live(CompletionFormat), "[Completions]"),
    Endpoint("POST", "/v1/embeddings", EMBEDDING, EmbeddingBody, live(EmbeddingFormat), "[Embeddings]"),
    Endpoint("POST", "/v1/responses", CHAT, ResponseBody, respond, "[Responses]"),
    Endpoint("POST", "/v1/messages", CHAT, MessagesBody, answer, "[Messages]", ANTHROPIC),
    Endpoint("POST", "/v1/messages/count_tokens", CHAT, CountTokensBody, count, "[Messages]", ANTHROPIC),
    Endpoint("POST", "/v1/responses/input_tokens", CHAT, InputTokensBody, count_input, "[Responses]"),
    Endpoint("POST", "/v1/responses/compact", CHAT, CompactBody, compact, "[Responses]"),
    Endpoint("POST", "/v1/rerank", RERANK, RerankBody, live(RerankFormat), "[Rerank]"),
    Endpoint("POST", "/v2/rerank", RERANK, RerankV2Body, live(RerankFormat), "[Rerank]"),
)
# fmt: on
