"""What a route sees of a request's answer, whether it is made now, for several clients, or was made before."""

from collections.abc import AsyncIterator
from typing import Protocol

from forebay_contracts.wire.errors import ApiError, RequestCancelled
from forebay_contracts.wire.frames import Completed, Delta, Failed


class Answer(Protocol):
    """The answer to one request as far as it has come; `attempt` is the number of the one that makes it."""

    attempt: int

    @property
    def completed(self) -> Completed | None:
        """The end, once all of the answer is there."""
        ...

    async def started(self) -> None:
        """Wait until a worker has begun; raises how the request ended if it ended before that."""
        ...

    def deltas(self) -> AsyncIterator[list[Delta]]:
        """All deltas in order, as many at a time as have come; raises how the request ended, if not well."""
        ...

    def fail(self, error: ApiError) -> None:
        """End the wait of this client with `error`, unless the answer has ended."""
        ...


class SlowReader(ApiError):
    """The client does not read its stream: nobody will see this."""

    status = 499
    code = "slow_reader"


class ClientLeft(ApiError):
    """The client closed its connection: nobody will see this."""

    status = 499
    code = "client_left"


class Cancelled(RequestCancelled):
    """Somebody cancelled the request while its client still waited, for `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the request was cancelled: {reason}")
        self.reason = reason


class WorkerError(ApiError):
    """An error as a worker reported it."""

    def __init__(self, frame: Failed) -> None:
        super().__init__(frame.message, param=frame.param, code=frame.code)
        self.status = frame.status
        self.type = frame.error_type
