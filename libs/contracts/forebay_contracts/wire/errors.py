"""The error tree. Every error a client can see is one of these, and each knows its HTTP form.

ForebayError
├── ConfigurationError            settings that cannot hold, a server too old: refused at start
├── QueueError
│   ├── QueueFull                 503 queue_full
│   ├── QueueUnavailable          503 queue_unavailable
│   ├── ModelUnavailable          503 model_unavailable
│   └── QueueConflict             a name, revision or topology that is already taken
└── RequestError                  ends one request, with an answer for its client
    ├── InvalidRequest            400
    │   └── UnsupportedByModel    400 model_not_supported
    ├── InvalidApiKey             401
    ├── ModelNotFound             404
    ├── RequestNotFound           404
    ├── RequestTimeout            408
    ├── RequestTooLarge           413
    ├── KeyLimitReached           429 rate_limit_exceeded
    ├── RequestCancelled          499
    ├── TooManyListeners          503 too_many_listeners
    └── InferenceFailed           500
"""

from collections.abc import Iterable
from typing import Any, Final


class ForebayError(Exception):
    """Root of every error that Forebay raises on purpose."""


class ConfigurationError(ForebayError):
    """The system cannot start as configured; the message says what to change."""


class ApiError(ForebayError):
    """An error with an HTTP form, in the OpenAI error shape.

    `status` is the HTTP status, `type`, `code` and `param` are the fields of OpenAI's error object
    (https://platform.openai.com/docs/guides/error-codes).
    """

    status: int = 500
    type: str = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message: Final = message
        self.param: Final = param
        if code is not None:
            self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON object that a client gets."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


class QueueError(ApiError):
    """The queue did not take or could not serve a request."""

    status = 503


class QueueFull(QueueError):
    """The stream holds MAX_QUEUE_SIZE requests already."""

    code = "queue_full"


class QueueUnavailable(QueueError):
    """NATS cannot be reached, or did not answer in time: nothing was accepted."""

    code = "queue_unavailable"


class ModelUnavailable(QueueError):
    """The model is known, but no worker serves it now, and NO_WORKER_POLICY is to refuse: nothing was accepted."""

    code = "model_unavailable"


class QueueConflict(QueueError):
    """A compare-and-set lost: somebody else wrote first."""

    code = "queue_conflict"


class StateUnreadable(ApiError):
    """What is stored of a request is no state that this version knows."""

    code = "state_unreadable"


class RequestError(ApiError):
    """One request ends here."""


class InvalidRequest(RequestError):
    """The body cannot be served as it stands."""

    status = 400
    type = "invalid_request_error"


class UnsupportedByModel(InvalidRequest):
    """The model is served, but not for this: a chat with an embedding model, embeddings of a chat model."""

    code = "model_not_supported"

    def __init__(self, model: str, wanted: str, served: Iterable[str]) -> None:
        kinds = " and ".join(sorted(served))
        super().__init__(f"The model `{model}` serves {kinds} requests, not {wanted}.", param="model")


class InvalidApiKey(RequestError):
    """No key, or a wrong one."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class ModelNotFound(RequestError):
    """No model of that name is served here."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RequestNotFound(RequestError):
    """No request of that id is known (any more)."""

    status = 404
    type = "invalid_request_error"
    code = "request_not_found"


class RequestTimeout(RequestError):
    """REQUEST_TIMEOUT passed, waiting or running."""

    status = 408
    type = "timeout_error"
    code = "request_timeout"


class RequestTooLarge(RequestError):
    """The body is larger than MAX_REQUEST_BYTES."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class KeyLimitReached(RequestError):
    """The client's key has as many requests admitted and unfinished as it may have: nothing was accepted.

    `retry_after_s` is when one of them should have ended.
    """

    status = 429
    type = "requests"  # OpenAI's type for a limit on requests, not on tokens
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s: Final = retry_after_s


class RequestCancelled(RequestError):
    """Cancelled through the queue's own interface while a client still waited."""

    status = 499
    type = "invalid_request_error"
    code = "request_cancelled"


class TooManyListeners(RequestError):
    """This api process tells as many listeners of the queue as it may; the queue itself is not full."""

    status = 503
    code = "too_many_listeners"


class InferenceFailed(RequestError):
    """Generation failed, or its attempts are spent."""

    status = 500
    code = "inference_failed"
