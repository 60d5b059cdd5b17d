"""Errors in Anthropic's shape.

Source: https://docs.anthropic.com/en/api/errors.
"""

from typing import Any, Final

from forebay_contracts.wire.errors import ApiError, QueueFull

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


def status_of(error: ApiError) -> int:
    """The HTTP status: a full queue is 529, all others are as in OpenAI's shape."""
    return OVERLOADED if error.code == QueueFull.code else error.status


def error_object(error: ApiError, request_id: str) -> dict[str, Any]:
    """The body of an error, which is an event of a stream too. It names the parameter in its message."""
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}
