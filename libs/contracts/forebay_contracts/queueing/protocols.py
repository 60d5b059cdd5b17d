"""The seams of the queue. Each has an adapter on NATS and an in-memory twin. Both pass the same tests.

seam           does                                                used by
Admission      puts requests into the queue, and removes one       the api, `forebay cancel`; a worker puts back
Room           moves requests that may wait into the queue         the api
Precedence     lets deferred requests give way to others           the worker
Deliveries     hands requests out, with the verbs that end each    the worker
StateStore     holds each request's state, the totals, the usage    both
ReplyChannel   carries the frames of one attempt to the receiver   the worker
AnswerLog      keeps the answers that outlive their connection     both
CancelNotices  tells api and worker that a request is cancelled    the api, `forebay cancel`
"""

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from forebay_contracts.queueing.usage import UsageRow
from forebay_contracts.wire.frames import Resume
from forebay_contracts.wire.heartbeats import Used
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus


class Admission(Protocol):
    """The entry of the queue. It holds at most MAX_QUEUE_SIZE requests, waiting and processing together.

    A `deferred` request goes into the waiting room before it, which holds KEY_MAX_DEFERRED of each key and model.
    """

    async def publish(self, request: InferenceRequest) -> int:
        """Admit a request; returns its sequence. The same id again returns the same sequence.

        Raises:
            QueueFull, WaitingRoomFull, RequestTooLarge: nothing was admitted.
            QueueUnavailable: the outcome is unknown. If it was admitted, its worker learns that nobody waits.
        """

    async def put_back(self, request: InferenceRequest, turn: int, trace: Mapping[str, str]) -> int:
        """Put a request that has given way `turn` times into the waiting room, before those that have not begun.

        The same id and turn again change nothing. The headers `trace` name its trace. Raises as `publish`.
        """

    async def holds(self, request_id: str, sequence: int, *, deferred: bool = False) -> bool:
        """Whether the message at `sequence` of the queue, or of the waiting room, is this request's.

        Raises:
            QueueUnavailable: NATS does not answer.
        """

    async def remove(self, request_id: str, sequence: int, *, deferred: bool = False) -> bool:
        """Remove the request's message, waiting or delivered; False if `sequence` holds no message of this request.

        Raises:
            QueueUnavailable: NATS does not answer.
        """


@dataclass(frozen=True, slots=True)
class Waiting:
    """A message in the waiting room."""

    sequence: int
    subject: str
    headers: Mapping[str, str]
    data: bytes


class Room(Protocol):
    """The waiting room, for the apis. Without an answer each method raises QueueUnavailable.

    `model` is a model's token, `key` the name of a client's key.
    """

    async def idle(self, model: str, slots: int) -> int:
        """For how many of the `slots` of its workers nothing waits or runs. MAX_CONCURRENT_REQUESTS bounds it."""

    async def backlog(self, model: str) -> Mapping[str | None, int]:
        """How many requests of each key wait."""

    async def first(self, model: str, key: str | None) -> Waiting | None:
        """The next one of a key. Those that gave way go first."""

    async def move(self, waiting: Waiting) -> None:
        """Move it into the queue, where it has its own Nats-Msg-Id: a repetition changes nothing. Raises QueueFull."""

    async def drop(self, waiting: Waiting) -> None:
        """Remove it."""


class Line(NamedTuple):
    """Where the deliveries of a model are: the last sequence `delivered`, and how many wait. `full`: none of them is
    delivered until another one ends."""

    delivered: int
    waiting: int
    full: bool


class Precedence(Protocol):
    """What a worker hears of requests that go before its deferred ones, and what it says of its slots."""

    async def hear(self, admitted: Callable[[int], None]) -> None:
        """Call `admitted` with the sequence of each request that is not deferred, unless another worker hears it."""

    async def pass_on(self, sequences: Iterable[int]) -> None:
        """Hear nothing more, and let another worker hear of these."""

    async def line(self) -> Line:
        """Raises QueueUnavailable."""

    async def awaiting_redelivery(self) -> int:
        """How many requests this worker should make way for that wait to be delivered again, and find no idle slot.

        Their workers died, or handed them over. They have their places in the queue still, so `line` does not tell of
        them. Raises QueueUnavailable.
        """

    async def say_idle(self, used: Used | None = None) -> None:
        """Tell all apis, of which one acts, that a slot is idle, and what a deferred attempt has used."""


class Delivery(Protocol):
    """One delivery of one message. Exactly one of `ack`, `nak` and `term` ends it. `in_progress` keeps it.

    `num_delivered` is JetStream's count, from 1. A killed server forgets it, so it is only a hint at the attempt.
    """

    data: bytes
    headers: Mapping[str, str]
    num_delivered: int
    sequence: int

    async def ack(self) -> None:
        """Done: once this returns, the message is removed."""

    async def nak(self, delay_s: float = 0) -> None:
        """Not done: have it redelivered after `delay_s`."""

    async def term(self) -> None:
        """Failed for good: have it never delivered again."""

    async def in_progress(self) -> None:
        """Restart the ack wait."""


class Deliveries(Protocol):
    """The exit of the queue, for the workers of one model."""

    async def pull(self) -> Delivery:
        """The next message; waits for ever."""

    async def stop(self) -> None:
        """End deliveries here. Pending and later pulls raise CancelledError."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A state as it was read. A change of it must name `revision`."""

    state: RequestState
    revision: int


class StateStore(Protocol):
    """States by request id, a total for each outcome, and what keys used of models a day. Without an answer each method
    raises QueueUnavailable."""

    async def get(self, request_id: str) -> Stored | None:
        """The state, or None if the id is unknown or expired. Raises StateUnreadable if another version wrote it."""

    async def write(self, state: RequestState, revision: int) -> int:
        """Replace `revision` (0: none); returns the new one. Raises QueueConflict if `revision` is not the last.

        Before a final state with `notify`, its event is published: a state that is final has been announced.
        """

    async def count(self, outcome: RequestStatus, request_id: str, state: RequestState | None = None) -> None:
        """Add one to the total of `outcome`, and what the request used, as its final `state` says, to the usage.

        A repetition for one request within DUPLICATE_WINDOW_S adds nothing.
        """

    async def totals(self) -> Mapping[RequestStatus, int]:
        """The total for each of OUTCOMES."""

    async def usage(self, days: Collection[str], keys: Collection[str | None] | None = None) -> list[UsageRow]:
        """What was used on `days`, as `2026-11-30`, with `keys` (None in it: without a key), or with all."""


class Superseded(Exception):
    """Another attempt owns the request now. This one must not write or acknowledge anything."""


class ReplyChannel(Protocol):
    """Carries encoded frames of one attempt to the receiver of the answer. `lossless`: no frame is ever missing."""

    lossless: bool

    async def send(self, frame: bytes) -> None:
        """Send without a confirmation. A frame may be lost; the receiver notices the gap.

        Raises:
            Superseded: another attempt answers the request. Only a lossless channel notices it here.
        """

    async def flush(self) -> None:
        """Let nothing that was sent wait here. Raises as `send`."""

    async def ask(self, frame: bytes) -> Resume:
        """Send a frame until the receiver confirms it; returns what the receiver has so far.

        For a receiver that is gone the answer is not wanted, and has no outcome.

        Raises:
            Superseded: as `send`.
        """


PAGE: Final = 500
"""Most records of an answer that are read at once."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of an answer: encoded frames, in order. `at` is when it was stored, by the server's clock (s)."""

    sequence: int
    frames: Sequence[bytes]
    at: float


class AnswerLog(Protocol):
    """Answers as records by request id, in order. Without an answer each method raises QueueUnavailable."""

    async def append(self, request_id: str, frames: Sequence[bytes], last: int, name: str) -> int:
        """Add a record after sequence `last` (0: it is the first); returns its sequence.

        `name` is the record's own. So a record whose confirmation was lost can be appended again and is stored once.

        Raises:
            AnswerTaken: another record follows `last`.
            AnswerLogFull: nothing was stored.
        """

    async def read(self, request_id: str, after: int = 0, most: int | None = None) -> list[Record]:
        """At most `most` records with a sequence above `after`. A replica that lags behind may lack the newest."""

    def follow(
        self, request_id: str, *, fresh: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[list[Record]]]:
        """For a block: all records, at most PAGE at a time, then those that come. It never ends by itself.

        An empty list says that the log was read, and has nothing more.
        After an outage, and at any other time, it may begin again with the first record.
        `fresh`: the answer has no records yet, so none are read.
        """

    async def has_room(self) -> bool:
        """Whether new answers may begin. What is left then is for those under way."""

    async def purge(self, request_id: str, keep: int = 0) -> None:
        """Remove the records of an answer but the last `keep`."""


class CancelNotices(Protocol):
    """Messages that a request is to be cancelled, or is cancelled, for `reason`."""

    async def ask(self, request_id: str, reason: str) -> None:
        """Ask the api that holds the client to cancel the request."""

    async def tell(self, request_id: str, reason: str) -> None:
        """Tell the worker and the api that the request is cancelled."""
