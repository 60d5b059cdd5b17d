"""An event for webhooks: one message of the stream `INFERENCE_WEBHOOKS`."""

import hashlib
from typing import Final, Literal, get_args

import orjson

from forebay_contracts.wire.message import SCHEMA_VERSION, Message
from forebay_contracts.wire.state import RequestState, RequestStatus

EventType = Literal[
    "response.completed",
    "response.incomplete",
    "response.failed",
    "response.cancelled",
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
]

EVENT_TYPES: Final[tuple[EventType, ...]] = get_args(EventType)

_OF_STATUS: Final[dict[RequestStatus, EventType]] = {
    RequestStatus.COMPLETED: "response.completed",
    RequestStatus.CANCELLED: "response.cancelled",
}


class Event(Message):
    """How an object ended. `created_at`: seconds since the epoch; `key`: the name of the client's key.

    `endpoint` is the name of the receiver; None: each that wants the event gets a message of its own.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    type: EventType
    object_id: str
    created_at: int
    key: str | None = None
    endpoint: str | None = None

    def body(self) -> bytes:
        """What a receiver gets: OpenAI's event object, https://platform.openai.com/docs/guides/webhooks."""
        return orjson.dumps(
            {
                "id": self.id,
                "object": "event",
                "created_at": self.created_at,
                "type": self.type,
                "data": {"id": self.object_id},
            }
        )


def event(kind: EventType, object_id: str, at: float, key: str | None, run: str | None = None) -> Event:
    """The event that `object_id` ended as `kind` at `at`.

    Its id follows from the object and the kind, so a repeated end has the same. An object that can end twice gives the
    id of each `run`.
    """
    digest = hashlib.sha256(f"{run or object_id} {kind}".encode()).hexdigest()
    return Event(id=f"evt_{digest[:32]}", type=kind, object_id=object_id, created_at=int(at), key=key)


def event_of(state: RequestState) -> Event | None:
    """The event of a request's state; None if it is not final, or nobody is to be told."""
    if state.notify is None or not state.status.final:
        return None
    kind = "response.incomplete" if state.cut else _OF_STATUS.get(state.status, "response.failed")
    return event(kind, state.notify, state.finished_at or state.queued_at, state.key, run=state.id)
