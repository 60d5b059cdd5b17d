"""Finds the route of a request, and answers its errors."""

import asyncio
from collections.abc import Mapping
from typing import Final

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forebay_api.http.errors import ErrorAnswers
from forebay_contracts.wire.errors import ApiError, ApiStopped

_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")


WEBSOCKET: Final = "WEBSOCKET"
"""Stands for the method of the connections that become WebSockets."""


class Routes:
    """Serves `routes`, by method and path, and by FastAPI every other path.

    The routes that carry the load do without FastAPI's layers, which cost each request three times the CPU and memory.
    They also do without Starlette's router: three coroutines more for each request that waits, and 3 us.
    """

    def __init__(self, routes: Mapping[tuple[str, str], ASGIApp], rest: FastAPI, errors: ErrorAnswers) -> None:
        self._routes = routes
        self._rest = rest
        self._errors = errors
        for kind in (ApiError, HTTPException, RequestValidationError, Exception):
            rest.add_exception_handler(kind, self._answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if route := self._routes.get((scope.get("method", WEBSOCKET), scope["path"])):
            try:
                await route(scope, receive, send)
            except (Exception, asyncio.CancelledError) as exc:
                if scope["type"] != "http":
                    raise
                # uvicorn cancels what runs at the end of DRAIN_TIMEOUT.
                error = ApiStopped() if isinstance(exc, asyncio.CancelledError) else exc
                answer = await self._answer(Request(scope), error)
                # If an answer has begun, uvicorn refuses a second one and closes the connection.
                await answer(scope, receive, send)
        elif scope["method"] == "HEAD":
            await self._rest({**scope, "method": "GET"}, receive, _head_of(send))
        else:
            await self._rest(scope, receive, send)

    async def _answer(self, request: Request, exc: Exception) -> Response:
        if isinstance(exc, HTTPException) and exc.status_code == 405:
            exc.headers = {"allow": ", ".join(self._methods_of(request.scope))}
        if isinstance(exc, HTTPException) and exc.status_code == 404:
            in_v1 = {**request.scope, "path": "/v1" + request.scope["path"]}
            if self._methods_of(in_v1):
                exc.detail += "; the base URL of an OpenAI client ends in /v1"
        return await self._errors.answer(request, exc)

    def _methods_of(self, scope: Scope) -> list[str]:
        """Every method that the path of `scope` has a route for. Starlette names those of one route alone."""
        found = [
            method
            for method in _METHODS
            if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in self._rest.routes)
        ]
        return ["HEAD", *found] if "GET" in found else found


def _head_of(send: Send) -> Send:
    """Ends the answer after its headers: uvicorn sends no body to HEAD, but would wait for the end of a stream."""

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body"})

    return send_head
