"""The OpenAPI document: FastAPI's operations, and those of the table of endpoints."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from forebay_api.routes import Endpoint

_REF = "#/components/schemas/"
_ANSWERS = {
    "200": "The answer as OpenAI gives it; server-sent events where `stream` is true",
    "400": "The body cannot be served",
    "401": "No key, or a wrong one",
    "404": "No such model",
    "408": "Not finished within REQUEST_TIMEOUT",
    "413": "The body is too large",
    "422": "The Idempotency-Key was used with another body",
    "500": "The generation failed",
    "503": "The queue is full or cannot be reached",
}
_ERROR_SCHEMA = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def install(app: FastAPI, endpoints: Sequence[Endpoint], *, keys: bool) -> None:
    """Make `app` serve the document at /openapi.json; `keys`: whether /v1 needs a key."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, bodies = models_json_schema(
                [(endpoint.body, "validation") for endpoint in endpoints], ref_template=_REF + "{model}"
            )
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components.update(bodies["$defs"], Error=_ERROR_SCHEMA)
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    _tell_errors(path, operation["responses"])
            components.pop("HTTPValidationError", None)
            components.pop("ValidationError", None)
            queued = {endpoint.path: {endpoint.method.lower(): _operation(endpoint)} for endpoint in endpoints}
            schema["paths"] = queued | schema["paths"]
            if keys:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, operations in schema["paths"].items():
                    if path.startswith("/v1"):
                        for operation in operations.values():
                            operation["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "tags": ["completions"],
        "summary": endpoint.summary,
        "operationId": f"create_{endpoint.body.__name__}",
        "requestBody": {"required": True, "content": _json({"$ref": _REF + endpoint.body.__name__})},
        "responses": {
            status: {
                "description": description,
                "content": {"text/event-stream": {}, **_json({"type": "object"})}
                if status == "200"
                else _json({"$ref": _REF + "Error"}),
            }
            for status, description in _ANSWERS.items()
        },
    }


def _tell_errors(path: str, responses: dict[str, Any]) -> None:
    """Replace FastAPI's error shape, which is never sent, by ours."""
    responses.pop("422", None)
    if path.startswith("/v1"):
        for status in ("400", "401", "404", "503"):
            description = "No such model or request" if status == "404" else _ANSWERS[status]
            responses[status] = {"description": description, "content": _json({"$ref": _REF + "Error"})}
    else:
        responses["503"] = {"description": "Not ready", "content": _json({"type": "object"})}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
