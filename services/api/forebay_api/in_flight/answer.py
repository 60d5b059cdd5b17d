"""How an answer ends for its client if it does not complete."""

from forebay_contracts.wire.errors import ApiError, RequestCancelled
from forebay_contracts.wire.frames import Failed


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
