"""What is kept of a response's request: with the frames of the answer, all that a client sees follows from it."""

from typing import Any, Final, Literal

from forebay_api.in_flight.records import key_of
from forebay_contracts.wire import names
from forebay_contracts.wire.message import SCHEMA_VERSION, Message
from forebay_contracts.wire.request import CompletionType, InferenceRequest

KIND: Final = "resp"
"""The kind of these records (`forebay_api/in_flight/records.py`)."""


def item_id(prefix: str, response_id: str, place: int, *, of_input: bool = False) -> str:
    """The id of an item of a response, from its place in the input or in the output. No two responses share one."""
    return f"{prefix}_{response_id.removeprefix(names.RESPONSE_PREFIX)}_{'in' if of_input else ''}{place}"


def response_of(item_id: str) -> str | None:
    """The id of the response that an item belongs to, or None if the id is not one of ours."""
    parts = item_id.split("_")
    return names.RESPONSE_PREFIX + parts[1] if len(parts) == 3 else None


class ResponseRecord(Message):
    """A response as its request describes it. `created_at` and `deadline`: seconds since the epoch.

    `input` holds the request's own items, with ids; what was before them is in `previous_response_id` or
    `conversation`. `parameters` are the members of the response object that repeat the request. `key` is the name of
    the client's key. `run` is the id of the request that answers it, once it runs again. With `notify`, its end is an
    event for webhooks.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    key: str | None = None
    created_at: float
    deadline: float
    model: str
    input: tuple[dict[str, Any], ...]
    previous_response_id: str | None = None
    conversation: str | None = None
    background: bool = False
    store: bool = True
    stream: bool = False
    logprobs: bool = False
    parameters: dict[str, Any]
    run: str | None = None
    notify: bool = False

    def encode(self) -> bytes:
        """The record as JSON, every field written out."""
        return self.model_dump_json().encode()

    def origin(self) -> InferenceRequest:
        """The request, as far as its answer needs it."""
        identifier = self.run or names.request_id(self.id)
        return InferenceRequest(
            id=identifier,
            completion_type=CompletionType.CHAT,
            model=self.model,
            created_at=self.created_at,
            deadline=self.deadline,
            reply_to=names.answer_subject(identifier),
            key=self.key,
            record=key_of(KIND, self.key, self.id),
            notify=self.notify,
        )
