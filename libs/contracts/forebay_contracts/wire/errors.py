"""The error tree. Every error that a client can get is one of these, and each has its HTTP form.

ForebayError
├── ConfigurationError            conflicting settings, a server that is too old: stops the start
├── QueueError
│   ├── QueueFull                 503 queue_full
│   ├── QueueUnavailable          503 queue_unavailable
│   ├── ApiStopped                503 api_stopped
│   ├── ModelUnavailable          503 model_unavailable
│   ├── QueueConflict             another write came first
│   │   └── AnswerTaken           another attempt, or whoever cancelled it, wrote the answer on
│   ├── AnswerLogFull             503 answer_log_full
│   ├── WaitingRoomFull           503 waiting_room_full
│   └── FileStoreFull             503 file_store_full
├── StateUnreadable               500 state_unreadable
└── RequestError                  ends one request, with an answer for its client
    ├── InvalidRequest            400
    │   └── UnsupportedByModel    400 model_not_supported
    ├── InvalidApiKey             401
    ├── TierNotAllowed            403 service_tier_not_allowed
    ├── SteeringNotAllowed        403 steering_not_allowed
    ├── ModelNotFound             404
    │   └── AdapterNotFound       404
    ├── RequestNotFound           404
    ├── WorkerNotFound            404 worker_not_found
    ├── RequestTimeout            408
    ├── RequestTooLarge           413
    ├── KeyLimitReached           429 rate_limit_exceeded
    │   └── TokenLimitReached     429 rate_limit_exceeded
    │       └── DailyTokensSpent  429 rate_limit_exceeded
    ├── RequestCancelled          499
    ├── TooManyListeners          503 too_many_listeners
    ├── LoopDetected              508 loop_detected
    └── InferenceFailed           500
"""

from collections.abc import Iterable
from typing import Any, Final


class ForebayError(Exception):
    """Root of every error that Forebay raises on purpose."""


class ConfigurationError(ForebayError):
    """The system cannot start as configured. The message says what to change."""


class ApiError(ForebayError):
    """An error with an HTTP form, in the OpenAI error shape.

    `status` is the HTTP status. `type`, `code` and `param` are fields of OpenAI's error object
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
    """The queue did not accept or could not serve a request."""

    status = 503


class QueueFull(QueueError):
    """The queue holds MAX_QUEUE_SIZE unfinished requests. Nothing was accepted."""

    code = "queue_full"


class QueueUnavailable(QueueError):
    """NATS cannot be reached, or did not answer in time. What it stored all the same, a worker cancels unrun."""

    code = "queue_unavailable"


class ModelUnavailable(QueueError):
    """No worker serves the model now, and NO_WORKER_POLICY is `refuse`; or not all serve the adapter. Nothing was
    accepted."""

    code = "model_unavailable"


class ApiStopped(QueueError):
    """The api was stopped, and its DRAIN_TIMEOUT ended before the answer was whole."""

    code = "api_stopped"

    def __init__(self) -> None:
        super().__init__("This api was stopped before the answer was whole.")


class QueueConflict(QueueError):
    """A compare-and-set failed: another write came first."""

    code = "queue_conflict"


class AnswerTaken(QueueConflict):
    """The answer goes on with another record than this writer's."""


class AnswerLogFull(QueueError):
    """The answer log has no room for another answer. Nothing was accepted."""

    code = "answer_log_full"


class WaitingRoomFull(QueueError):
    """The waiting room has no place for another request of this key and model. Nothing was accepted."""

    code = "waiting_room_full"


class FileStoreFull(QueueError):
    """All files together have nine tenths of FILE_STORE_BYTES, or those of one key four times what is free. Nothing was
    stored."""

    code = "file_store_full"


class StateUnreadable(ApiError):
    """Another version of Forebay, or another program, wrote the state of the request."""

    code = "state_unreadable"


class RequestError(ApiError):
    """An error of one request."""


class InvalidRequest(RequestError):
    """The body cannot be served as it is."""

    status = 400
    type = "invalid_request_error"


class UnsupportedByModel(InvalidRequest):
    """The model does not serve this kind of request: a chat with an embedding model, or embeddings of a chat model."""

    code = "model_not_supported"

    def __init__(self, model: str, wanted: str, served: Iterable[str]) -> None:
        kinds = " and ".join(sorted(served))
        super().__init__(f"The model `{model}` serves {kinds} requests, not {wanted}.", param="model")


class InvalidApiKey(RequestError):
    """No key, or a wrong one."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class TierNotAllowed(RequestError):
    """The client's key may not use this service tier."""

    status = 403
    type = "invalid_request_error"
    code = "service_tier_not_allowed"


class SteeringNotAllowed(RequestError):
    """Only operators pause, resume and drain, and only if the NATS user of the api may."""

    status = 403
    type = "invalid_request_error"
    code = "steering_not_allowed"


class ModelNotFound(RequestError):
    """No model of that name is served here."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class AdapterNotFound(ModelNotFound):
    """The model is served here, but has no adapter of that name."""

    def __init__(self, model: str, adapter: str) -> None:
        super().__init__(f"The model `{model}` has no adapter `{adapter}`.", param="model")


class RequestNotFound(RequestError):
    """The id is unknown, or its state has expired."""

    status = 404
    type = "invalid_request_error"
    code = "request_not_found"


class WorkerNotFound(RequestError):
    """No worker answers to this id."""

    status = 404
    type = "invalid_request_error"
    code = "worker_not_found"


class RequestTimeout(RequestError):
    """REQUEST_TIMEOUT passed while the request waited or ran."""

    status = 408
    type = "timeout_error"
    code = "request_timeout"


class RequestTooLarge(RequestError):
    """The body is larger than MAX_REQUEST_BYTES, a file than MAX_FILE_BYTES, or the request than a message of NATS."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class KeyLimitReached(RequestError):
    """The client's key has its full number of unfinished requests or batches. Nothing was accepted.

    `retry_after_s`: seconds until one of them should have ended.
    """

    status = 429
    type = "requests"  # OpenAI's type for a limit on requests, not on tokens
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s: Final = retry_after_s


class TokenLimitReached(KeyLimitReached):
    """The client's key has used the tokens that it may use in a minute. Nothing was accepted.

    `retry_after_s`: seconds until it may use one again.
    """

    type = "tokens"  # OpenAI's


class DailyTokensSpent(TokenLimitReached):
    """The client's key has used the tokens that it may use in a day (UTC). Nothing was accepted."""


class RequestCancelled(RequestError):
    """The request was cancelled by `DELETE`, the page or the command line, while its client waited."""

    status = 499
    type = "invalid_request_error"
    code = "request_cancelled"


class TooManyListeners(RequestError):
    """This api process has its full number of listeners to `/v1/queue/events`. The queue itself is not full."""

    status = 503
    code = "too_many_listeners"


class LoopDetected(RequestError):
    """A worker with INFERENCE_ENGINE=openai asks the Forebay whose request it has, also over others in between.

    The request would wait for itself.
    """

    status = 508
    code = "loop_detected"


class InferenceFailed(RequestError):
    """The generation failed, or all MAX_DELIVERIES attempts failed."""

    status = 500
    code = "inference_failed"
