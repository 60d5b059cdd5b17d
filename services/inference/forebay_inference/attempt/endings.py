"""How an attempt ends: one table, and the one function that applies it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from forebay_contracts.queueing.protocols import Delivery
from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.state import RequestStatus, Usage

NAK_DELAY_S: Final = 0.5
"""Pause before a request whose attempt failed is tried again."""


class End(Enum):
    """What became of the work on a request."""

    COMPLETED = auto()
    """The answer is whole."""

    REFUSED = auto()
    """The request's own fault: too long, a template that does not take it."""

    FAULT = auto()
    """The engine's fault, and attempts are left."""

    SPENT = auto()
    """The engine's fault, and no attempt is left."""

    TIMED_OUT = auto()
    """Its deadline has passed."""

    CANCELLED = auto()
    """The api, or whoever cancelled it, has said so."""

    ABANDONED = auto()
    """The api that holds its client is gone."""

    NOT_WANTED = auto()
    """The api, asked before anything was generated, says that its client has an end already."""

    HANDED_OVER = auto()
    """The worker has to stop before it is done."""

    ENDED_BEFORE = auto()
    """It had ended when it was claimed: cancelled while it waited, or an attempt died before its ack."""

    UNREADABLE = auto()
    """Its message, or what is stored of it, is of another version."""

    SUPERSEDED = auto()
    """A newer attempt owns it: this one must write and acknowledge nothing."""


class Told(Enum):
    """What the receiver of the answer is told."""

    NOTHING = auto()
    ANSWER = auto()
    ERROR = auto()
    CANCEL = auto()


class Acknowledge(Enum):
    """The verb that ends the delivery."""

    NOTHING = auto()
    ACK = auto()
    NAK = auto()
    TERM = auto()


@dataclass(frozen=True, slots=True)
class Ending:
    """A row: what the client is told, the state that is written (None: as it is), and how the message ends."""

    told: Told
    state: RequestStatus | None
    acknowledge: Acknowledge
    delay_s: float = 0.0


ENDINGS: Final[Mapping[End, Ending]] = {
    End.COMPLETED: Ending(Told.ANSWER, RequestStatus.COMPLETED, Acknowledge.ACK),
    End.REFUSED: Ending(Told.ERROR, RequestStatus.FAILED, Acknowledge.TERM),
    End.FAULT: Ending(Told.NOTHING, RequestStatus.PROCESSING, Acknowledge.NAK, NAK_DELAY_S),
    End.SPENT: Ending(Told.ERROR, RequestStatus.FAILED, Acknowledge.TERM),
    End.TIMED_OUT: Ending(Told.ERROR, RequestStatus.TIMED_OUT, Acknowledge.TERM),
    End.CANCELLED: Ending(Told.NOTHING, RequestStatus.CANCELLED, Acknowledge.TERM),
    End.ABANDONED: Ending(Told.CANCEL, RequestStatus.CANCELLED, Acknowledge.TERM),
    End.NOT_WANTED: Ending(Told.NOTHING, RequestStatus.CANCELLED, Acknowledge.TERM),
    End.HANDED_OVER: Ending(Told.NOTHING, RequestStatus.QUEUED, Acknowledge.NAK),
    End.ENDED_BEFORE: Ending(Told.ERROR, None, Acknowledge.TERM),
    End.UNREADABLE: Ending(Told.ERROR, RequestStatus.FAILED, Acknowledge.TERM),
    End.SUPERSEDED: Ending(Told.NOTHING, None, Acknowledge.NOTHING),
}


@dataclass(frozen=True, slots=True)
class Ended:
    """How the work on one attempt ended.

    `error` is for the client, `reason` what the state says where that is something else, `fault` what went wrong for
    who runs the system. `outcome` is how the request has ended for its client, where the api has said so already.
    """

    how: End
    error: ApiError | None = None
    reason: str | None = None
    fault: str | None = None
    outcome: RequestStatus | None = None
    finish_reasons: Mapping[int, str] | None = None
    usage: Usage | None = None


Tell = Callable[[Told, Ended], Awaitable[RequestStatus | None]]
"""Tells the receiver; how the request ended for its client, None where there is no client to say."""

Record = Callable[[RequestStatus, Ended], Awaitable[None]]
"""Writes the state and counts a final one; raises Superseded."""


async def settle(ended: Ended, delivery: Callable[[], Delivery], tell: Tell, record: Record) -> None:
    """Apply the row of an ending in the order that holds for all: client, state, counter, message.

    What the client got decides the state: an api that confirms says how the request ended for its client. Whatever
    dies in between, the message comes again and finds out what is done already. `delivery` is asked at the end,
    since the message may have been delivered anew meanwhile.

    Raises:
        Superseded: another attempt owns the request; the message is left alone.
        QueueUnavailable, nats.errors.Error, TimeoutError: NATS does not answer; the message comes again.
    """
    row = ENDINGS[ended.how]
    outcome = await tell(row.told, ended)
    if row.state is not None:
        await record(outcome or ended.outcome or row.state, ended)
    match row.acknowledge:
        case Acknowledge.ACK:
            await delivery().ack()
        case Acknowledge.NAK:
            await delivery().nak(row.delay_s)
        case Acknowledge.TERM:
            await delivery().term()
