"""How an attempt ends: one table, and one function that applies it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from forebay_contracts.queueing.protocols import Delivery
from forebay_contracts.wire.errors import ApiError, RequestCancelled
from forebay_contracts.wire.frames import Resume
from forebay_contracts.wire.state import RequestStatus, Usage

NAK_DELAY_S: Final = 0.5
"""Pause before a request whose attempt failed is tried again."""


class End(Enum):
    """How the work on a request ended."""

    COMPLETED = auto()
    """The answer is whole."""

    REFUSED = auto()
    """The request cannot be served: it is too long, or the chat template refuses it."""

    FAULT = auto()
    """The engine failed, and attempts are left."""

    SPENT = auto()
    """The engine failed, and no attempt is left."""

    TIMED_OUT = auto()
    """Its deadline has passed."""

    CANCELLED = auto()
    """The request was cancelled."""

    ABANDONED = auto()
    """The api that holds its client seems to be gone. If it lives after all, it says how the request ended."""

    NOT_WANTED = auto()
    """The api said that nobody waits any more."""

    HANDED_OVER = auto()
    """The worker has to stop before the answer is whole."""

    YIELDED = auto()
    """A deferred attempt gives way to a request that may not wait."""

    MOVED_ON = auto()
    """The message is of an earlier turn: the request has given way, and goes on by a later message."""

    ENDED_BEFORE = auto()
    """The request had ended before the claim: it was cancelled, or an attempt died before its ack."""

    UNREADABLE = auto()
    """Another version wrote its message or its state."""

    SUPERSEDED = auto()
    """A newer attempt owns the request. This one must write and acknowledge nothing."""


class Told(Enum):
    """What the receiver of the answer gets."""

    NOTHING = auto()
    SO_FAR = auto()
    ANSWER = auto()
    ERROR = auto()


class Acknowledge(Enum):
    """The verb that ends the delivery."""

    NOTHING = auto()
    ACK = auto()
    NAK = auto()
    TERM = auto()


@dataclass(frozen=True, slots=True)
class Ending:
    """A row: what the client gets, which state is written (None: it stays), and how the message is acknowledged."""

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
    End.ABANDONED: Ending(Told.ERROR, RequestStatus.CANCELLED, Acknowledge.TERM),
    End.NOT_WANTED: Ending(Told.NOTHING, RequestStatus.CANCELLED, Acknowledge.TERM),
    End.HANDED_OVER: Ending(Told.NOTHING, RequestStatus.QUEUED, Acknowledge.NAK),
    End.YIELDED: Ending(Told.SO_FAR, RequestStatus.QUEUED, Acknowledge.TERM),
    End.MOVED_ON: Ending(Told.NOTHING, None, Acknowledge.TERM),
    End.ENDED_BEFORE: Ending(Told.ERROR, None, Acknowledge.TERM),
    End.UNREADABLE: Ending(Told.ERROR, RequestStatus.FAILED, Acknowledge.TERM),
    End.SUPERSEDED: Ending(Told.NOTHING, None, Acknowledge.NOTHING),
}


@dataclass(frozen=True, slots=True)
class Ended:
    """How the work on one attempt ended.

    `error` is for the client. `reason` is for the state and the log; without it, the error is. `fault` tells operators
    what failed. `outcome` is how the request ended for its client, if the api has said so already. `cut`: the answer
    ended at its most tokens.
    """

    how: End
    error: ApiError | None = None
    reason: str | None = None
    fault: str | None = None
    outcome: RequestStatus | None = None
    usage: Usage | None = None
    cut: bool = False


def abandoned() -> Ended:
    """The end of a request whose api seems to be gone."""
    reason = "the api that took it is gone"
    return Ended(End.ABANDONED, error=RequestCancelled(f"the request was cancelled: {reason}"), reason=reason)


def not_wanted(have: Resume) -> Ended:
    """The end of a request for which nobody waits, as the api says."""
    return Ended(End.NOT_WANTED, reason="nobody waits for it", outcome=have.outcome, usage=have.usage, cut=have.cut)


Tell = Callable[[Told, Ended], Awaitable[RequestStatus | None]]
"""Tells the receiver. Returns how the request ended for its client, None if no client says so."""

Record = Callable[[RequestStatus, Ended], Awaitable[None]]
"""Writes the state and counts a final one. Raises Superseded."""


async def settle(ended: Ended, delivery: Callable[[], Delivery], tell: Tell, record: Record) -> None:
    """Apply the row of an ending, always in this order: client, state, counter, message.

    What the client got decides the state: the api confirms with how the request ended for its client. If a process dies
    in between, the message is redelivered, and the next attempt finds what is done already. `delivery` is called last,
    since the message may have been redelivered meanwhile.

    Raises:
        Superseded: another attempt owns the request. The message is left alone.
        QueueUnavailable, nats.errors.Error, TimeoutError: NATS does not answer. The message is redelivered.
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
