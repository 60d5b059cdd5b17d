"""What the OpenAPI document says of errors and of bodies that a route reads by itself."""

from typing import Any, Final

from forebay_api.http.errors import OPENAI, Shape

_DESCRIPTIONS: Final = {
    400: "The body cannot be served",
    401: "No key, or a wrong one",
    403: "A page of another site sent it, and the api has no keys",
    404: "No such model or request",
    408: "Not finished within REQUEST_TIMEOUT",
    413: "The body is too large",
    415: "The body is not declared as JSON, and the api has no keys",
    421: "The Host is unknown, and the api has no keys",
    422: "The Idempotency-Key was used with another body",
    500: "The generation failed",
    503: "The queue is full or cannot be reached",
}
_Responses = dict[int | str, dict[str, Any]]


def errors_of(shape: Shape) -> _Responses:
    """Every error, in its shape."""
    described = {**_DESCRIPTIONS, **shape.statuses}
    return {status: {"model": shape.model, "description": text} for status, text in described.items()}


_ERRORS: Final = errors_of(OPENAI)
ERRORS: Final[_Responses] = {status: _ERRORS[status] for status in (400, 401, 403, 404, 421, 503)}
"""The errors of every operation under /v1."""

ERRORS_OF_UPLOADS: Final[_Responses] = {status: _ERRORS[status] for status in (408, 413, 415)}
"""Of a route that reads a form by itself, bounded, and not by FastAPI."""

DECLARED_AS_JSON: Final[_Responses] = {415: _ERRORS[415]}
"""Of a route that needs no body: one that is sent must be declared as JSON."""

TAKES_JSON: Final[dict[str, Any]] = {
    "openapi_extra": {"requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}}},
    "responses": {status: _ERRORS[status] for status in (408, 413, 415)},
}
"""Of a route that reads a JSON body by itself, bounded, and not by FastAPI."""
