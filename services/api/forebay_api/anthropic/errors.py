"""Errors in Anthropic's shape.

Source: https://docs.anthropic.com/en/api/errors.
"""

from typing import Any, Final

from pydantic import BaseModel, Field

from forebay_api.http.errors import Shape
from forebay_contracts.wire.errors import AnswerLogFull, ApiError, QueueFull

OVERLOADED: Final = 529

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    OVERLOADED: "overloaded_error",
}


def anthropic_error(error: ApiError, request_id: str) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the body of an error, which is an event of a stream too. A full queue is 529."""
    status = OVERLOADED if error.code in (QueueFull.code, AnswerLogFull.code) else error.status
    kind = _TYPES.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
    told: dict[str, Any] = {"type": kind, "message": error.message}
    if error.code is not None:
        told["details"] = {"error_code": error.code}
    return status, {"type": "error", "error": told, "request_id": request_id}


class ErrorObject(BaseModel):
    """Anthropic's error object. `details` has Forebay's code, if the error has one."""

    type: str
    message: str
    details: dict[str, str] = Field(default_factory=dict)


class AnthropicError(BaseModel):
    """The body of every error."""

    type: str
    error: ErrorObject
    request_id: str


ANTHROPIC: Final = Shape(anthropic_error, AnthropicError, {OVERLOADED: "The queue or the answer log is full"})
"""Errors as Anthropic's SDKs read them."""
