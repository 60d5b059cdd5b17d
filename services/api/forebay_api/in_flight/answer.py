"""A request's answer as a route sees it: generated now, shared by several clients, or kept from before."""

from collections.abc import AsyncIterator
from typing import Protocol

from forebay_contracts.wire.errors import ApiError, RequestCancelled
from forebay_contracts.wire.frames import Completed, Delta, Failed


class Answer(Protocol):
    """The answer to one request, as far as it has come. `attempt` is the number of the attempt that generates it."""

    attempt: int

    @property
    def completed(self) -> Completed | None:
        """The last frame, once the answer is whole."""

    async def started(self) -> None:
        """Wait until a worker has begun. Raises the request's error if it ends before that."""

    def deltas(self) -> AsyncIterator[list[Delta]]:
        """All deltas in order, as many at a time as have come. Raises the request's error if it fails."""

    def fail(self, error: ApiError) -> None:
        """End this client's wait with `error`, unless the answer has ended."""


class SlowReader(ApiError):
    """The client does not read its stream. Nobody sees this error."""

    status = 499
    code = "slow_reader"


class ClientLeft(ApiError):
    """The client closed its connection. Nobody sees this error."""

    status = 499
    code = "client_left"


class Cancelled(RequestCancelled):
    """Somebody cancelled the request while its client still waited, for `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the request was cancelled: {reason}")
        self.reason = reason


class WorkerError(ApiError):
    """An error that a worker reported."""

    def __init__(self, frame: Failed) -> None:
        super().__init__(frame.message, param=frame.param, code=frame.code)
        self.status = frame.status
        self.type = frame.error_type
