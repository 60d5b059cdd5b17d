"""What is kept of a stored chat completion's request."""

from typing import Any, Final, Literal

from pydantic import Field

from forebay_api.in_flight.records import key_of
from forebay_contracts.wire import names
from forebay_contracts.wire.message import SCHEMA_VERSION, Message
from forebay_contracts.wire.request import CompletionType, InferenceRequest, Sampling, Tier

KIND: Final = "chat"
"""The kind of these records (`forebay_api/in_flight/records.py`)."""


class ChatRecord(Message):
    """A stored completion, without its answer. Times: seconds since the epoch.

    `run` is the id of the request that answers it, once it runs again.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    request_id: str
    key: str | None
    created_at: float
    deadline: float
    model: str
    messages: tuple[dict[str, Any], ...]
    logprobs: int | None
    return_prompt: bool = False
    metadata: dict[str, str] = Field(default_factory=dict)
    tier: Tier = Tier.DEFAULT
    run: str | None = None

    def origin(self) -> InferenceRequest:
        """The request, as far as its answer needs it."""
        identifier = self.run or self.request_id
        return InferenceRequest(
            id=identifier,
            completion_type=CompletionType.CHAT,
            model=self.model,
            created_at=self.created_at,
            deadline=self.deadline,
            reply_to=names.answer_subject(identifier),
            key=self.key,
            record=key_of(KIND, self.key, self.request_id),
            sampling=Sampling(logprobs=self.logprobs),
            return_prompt=self.return_prompt,
            tier=self.tier,
        )
