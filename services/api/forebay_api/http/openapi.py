"""What the OpenAPI document says beside what FastAPI derives: keys, and the endpoints that queue a request."""

from collections.abc import Iterable
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from fastapi.security import HTTPBearer

from forebay_api.http.documented import errors_of
from forebay_api.routes import Endpoint

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
    router = APIRouter(tags=["completions"], responses={200: {"content": {"text/event-stream": {}}}})
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
            responses=errors_of(endpoint.errors),
            response_description="The answer as OpenAI gives it; server-sent events where `stream` is true",
        )
    return router
