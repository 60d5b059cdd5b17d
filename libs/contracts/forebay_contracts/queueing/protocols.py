"""The seams of the queue. Each has an adapter on NATS and an in-memory twin that pass the same tests.

Admission      lets requests in, and takes one out again          the api, `forebay cancel`
Deliveries     hands them out, each with the verbs that end it     the worker
StateStore     what became of each, and the totals                 both
ReplyChannel   carries the frames of one attempt to the receiver   the worker
CancelNotices  tells those concerned that a request is cancelled   the api, `forebay cancel`
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from forebay_contracts.wire.frames import Resume
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus


class Admission(Protocol):
    """The way into the queue, which holds at most MAX_QUEUE_SIZE requests, waiting and processing together."""

    async def publish(self, request: InferenceRequest) -> int:
        """Admit a request; its sequence in the queue. Admitting the same id again returns the same sequence.

        Raises:
            QueueFull, RequestTooLarge: nothing was admitted.
            QueueUnavailable: it is not known whether it was admitted; if it was, its worker learns that nobody waits.
        """
        ...

    async def remove(self, request_id: str, sequence: int) -> bool:
        """Take the request's message out, waiting or delivered; False if `sequence` holds none of this request.

        Raises:
            QueueUnavailable: NATS does not answer.
        """
        ...


class Delivery(Protocol):
    """One delivery of one message. Exactly one of `ack`, `nak` and `term` ends it; `in_progress` keeps it.

    `num_delivered` is JetStream's count (from 1), which a killed server forgets: it is a hint and no attempt's number.
    """

    data: bytes
    headers: Mapping[str, str]
    num_delivered: int
    sequence: int

    async def ack(self) -> None:
        """Done: the message is gone for good once this returns."""
        ...

    async def nak(self, delay_s: float = 0) -> None:
        """Not done: deliver it again, after `delay_s`."""
        ...

    async def term(self) -> None:
        """Never deliver it again."""
        ...

    async def in_progress(self) -> None:
        """Restart the ack wait."""
        ...


class Deliveries(Protocol):
    """The way out of the queue, for the workers of one model."""

    async def pull(self) -> Delivery:
        """The next message; waits for ever."""
        ...

    async def stop(self) -> None:
        """Let no further message be delivered here. Pending pulls are cancelled."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A state as it was read: `revision` is what a change of it must name."""

    state: RequestState
    revision: int


class StateStore(Protocol):
    """States by request id, and a total for each outcome. All raise QueueUnavailable without an answer."""

    async def get(self, request_id: str) -> Stored | None:
        """The state, or None for an id that is unknown or forgotten. Raises StateUnreadable for one that is neither."""
        ...

    async def write(self, state: RequestState, revision: int) -> int:
        """Write over `revision` (0: nothing there); the new revision. Raises QueueConflict if it is not the last."""
        ...

    async def count(self, outcome: RequestStatus, request_id: str) -> None:
        """Add one to the total of `outcome`. Repeated for one request within COUNT_ONCE_S, it is counted once."""
        ...

    async def totals(self) -> Mapping[RequestStatus, int]:
        """The total for each of OUTCOMES."""
        ...


class ReplyChannel(Protocol):
    """Carries encoded frames of one attempt to whoever receives the answer."""

    async def send(self, frame: bytes) -> None:
        """Fire and forget: a frame may be lost, and the receiver notices the gap."""
        ...

    async def ask(self, frame: bytes) -> Resume:
        """Send a frame until the receiver has confirmed it; what it has so far.

        A receiver that is gone wants nothing more, and cannot say how the request ended for its client.
        """
        ...


class CancelNotices(Protocol):
    """Messages about cancelling one request, for `reason`."""

    async def ask(self, request_id: str, reason: str) -> None:
        """Ask the api that holds the client to cancel the request."""
        ...

    async def tell(self, request_id: str, reason: str) -> None:
        """Tell the worker, and the api if it does not know yet, that the request is cancelled."""
        ...
