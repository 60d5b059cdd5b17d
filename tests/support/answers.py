"""Bodies to send, and what all error answers have in common."""

from typing import Any

import httpx

from support.stack import MODEL


def user(text: str) -> list[Any]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def chat_body(text: str, **fields: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": MODEL, "messages": user(text), **fields}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, with what all of them have in common checked."""
    assert response.headers["content-type"] == "application/json"
    assert len(response.headers["x-request-id"]) == 36
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"]
    for inside in ("Traceback", ".py", "forebay_", "nats://"):
        assert inside not in error["message"]
    return error


def summary(response: httpx.Response) -> tuple[int, str, str | None, str | None]:
    """Status, type, code and the SDKs' retry header."""
    error = error_of(response)
    return response.status_code, error["type"], error["code"], response.headers.get("x-should-retry")
