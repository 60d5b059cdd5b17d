"""The state of a request: the value in the KV bucket `inference-requests`."""

from enum import StrEnum
from typing import Final, Literal

from forebay_contracts.wire.message import SCHEMA_VERSION, Message

MAX_ATTEMPTS: Final = 10
"""Most past attempts that a state keeps, the newest."""


class Usage(Message):
    """Token counts of one request, over all its choices. The prompt is counted once. Reasoning is a part of the
    completion."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


def used_so_far(prompt_tokens: int, completion_tokens: int) -> Usage | None:
    """The usage of a request that ends before its answer is whole; None if nothing is known of it."""
    if not prompt_tokens and not completion_tokens:
        return None
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)


class RequestStatus(StrEnum):
    """queued → processing → completed | failed, and from either of the first two cancelled or timed_out."""

    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"

    @property
    def final(self) -> bool:
        """Whether no later state may follow."""
        return self not in (RequestStatus.QUEUED, RequestStatus.PROCESSING)


class PastAttempt(Message):
    """An attempt that another one followed. Times: seconds since the epoch.

    `ended_at` None: it ended without a report. `fault` None: it did not fail, but handed the request over or gave way.
    `tokens` are those of the answer that there were at its end, as far as it said so.
    """

    number: int
    worker: str | None
    began_at: float | None
    ended_at: float | None = None
    fault: str | None = None
    tokens: int | None = None


class RequestState(Message):
    """The value in the KV bucket `inference-requests`, its key the request id. Times: seconds since the epoch.

    `error` is what the client got. `fault` says to operators why the last failed attempt failed, with its number and
    its worker. It quotes no request. `started_at` is when the first attempt began. `logged`: the answer goes into the
    answer log, and not to one api. `notify` is the id of the object whose event its end is, for webhooks. `cut`: the
    answer ended at its most tokens. `retryable`: the request is kept, and can be run again. `sequence` is that of its
    message in the stream INFERENCE, and `deferred` the one in the waiting room, while it waits there. `turn` is how
    often it has given way to another request. `tier` None: an older service wrote it. `attempts` are the last
    MAX_ATTEMPTS attempts before the present one, which began at `attempt_at` if it is not the first. `first_token_at`
    and `resumed` are of the attempt that ended the request: when it made its first token, unless it resumed an answer,
    and how many tokens that answer had.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    status: RequestStatus
    completion_type: str
    timestamp: float
    error: str | None = None
    fault: str | None = None
    model: str
    attempt: int = 0
    queued_at: float
    started_at: float | None = None
    finished_at: float | None = None
    deadline: float
    worker: str | None = None
    sequence: int | None = None
    handed_over: int = 0
    usage: Usage | None = None
    key: str | None = None
    logged: bool = False
    deferred: int | None = None
    turn: int = 0
    notify: str | None = None
    cut: bool = False
    retryable: bool = False
    tier: str | None = None
    attempts: tuple[PastAttempt, ...] = ()
    attempt_at: float | None = None
    first_token_at: float | None = None
    resumed: int = 0

    def encode(self) -> bytes:
        """The state as JSON with all fields, for people who read it with `nats kv get`."""
        return self.model_dump_json().encode()
