"""What the OpenAPI document says beside what FastAPI derives: errors, keys, and the endpoints that queue a request."""

from collections.abc import Iterable
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from forebay_api.routes import Endpoint


class ErrorObject(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The body of every error."""

    error: ErrorObject


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
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": Error, "description": description} for status, description in _DESCRIPTIONS.items()
}
ERRORS: Final[dict[int | str, dict[str, Any]]] = {status: _ERRORS[status] for status in (400, 401, 403, 404, 421, 503)}
"""The errors of every operation under /v1."""

KEY: Final = HTTPBearer(scheme_name="key", auto_error=False)
"""Says that an operation needs a key. `context.caller` checks it."""


class Api(FastAPI):
    """FastAPI, without its own error 422 in the document: it is never sent."""

    def openapi(self) -> dict[str, Any]:
        """The document."""
        schema = super().openapi()
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        for path in schema["paths"].values():
            for operation in path.values():
                if operation["responses"].get("422", {}).get("description") == "Validation Error":
                    del operation["responses"]["422"]
        return schema


def described(endpoints: Iterable[Endpoint]) -> APIRouter:
    """Routes that only describe `endpoints`: their requests do not come to FastAPI."""
    router = APIRouter(tags=["completions"], responses={200: {"content": {"text/event-stream": {}}}, **_ERRORS})
    for endpoint in endpoints:

        async def create(body: Any) -> dict[str, Any]:
            raise NotImplementedError

        create.__annotations__["body"] = endpoint.body
        router.add_api_route(
            endpoint.path,
            create,
            methods=[endpoint.method],
            summary=endpoint.summary,
            operation_id=f"create_{endpoint.body.__name__}",
            response_description="The answer as OpenAI gives it; server-sent events where `stream` is true",
        )
    return router
