"""Every error in OpenAI's shape, and nothing of the inside in it."""

import contextlib
import logging
import time
from typing import Any, Unpack

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from forebay_api import request_metrics
from forebay_api.clients.keys import Client
from forebay_api.context import Context
from forebay_api.watching.drain_rate import DrainRate
from forebay_contracts.telemetry.logs import Fields, fields
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import (
    ApiError,
    InferenceFailed,
    InvalidRequest,
    KeyLimitReached,
    QueueError,
    QueueFull,
    RequestTimeout,
)
from forebay_contracts.wire.request import InferenceRequest

log = logging.getLogger(__name__)


def error_response(error: ApiError, drain_rate: DrainRate) -> Response:
    """`error` as an answer, telling OpenAI's SDKs by `x-should-retry` whether another try can help."""
    headers: dict[str, str] = {}
    if isinstance(error, QueueError):
        headers["x-should-retry"] = "true"
    if isinstance(error, QueueFull) and (seconds := drain_rate.retry_after_s()) is not None:
        headers["retry-after"] = str(seconds)
    if isinstance(error, KeyLimitReached):
        headers["retry-after"] = str(error.retry_after_s)
    # By themselves the SDKs retry 408 and 500: the load would double when there is least room for it, and a
    # request whose attempts are spent would be given as many again.
    if isinstance(error, RequestTimeout | InferenceFailed) or error.code in (
        RequestTimeout.code,
        InferenceFailed.code,
    ):
        headers["x-should-retry"] = "false"
    return JSONResponse(error.body(), error.status, headers)


def about(queued: InferenceRequest, **more: Unpack[Fields]) -> dict[str, Fields]:
    """For `extra` of a log line about the end of a request that was taken."""
    known = Fields(
        request_id=queued.id,
        model=queued.model,
        type=queued.completion_type.value,
        total_s=time.time() - queued.created_at,
    )
    return {"fields": known | more}


def _key(request: Request) -> str | None:
    """The name of the client's key, where it is known."""
    client: Client | None = getattr(request.state, "client", None)
    return None if client is None else client.name


class ErrorAnswers:
    """Turns every exception that a route raises into an answer, and counts the requests refused at `paths`."""

    def __init__(self, context: Context, paths: frozenset[str]) -> None:
        self._context = context
        self._paths = paths
        request_metrics.rejections()

    def install(self, app: FastAPI) -> None:
        """Have `app` use it."""
        app.add_exception_handler(ApiError, self.answer)
        app.add_exception_handler(HTTPException, self._http_error)
        app.add_exception_handler(RequestValidationError, self._invalid)
        app.add_exception_handler(Exception, self._unexpected)

    async def answer(self, request: Request, exc: Exception) -> Response:
        """What a client gets for `exc`."""
        if not isinstance(exc, ApiError):
            return await self._unexpected(request, exc)
        code = exc.code or exc.type
        request_id, key = request.state.request_id, _key(request)
        queued: InferenceRequest | None = getattr(request.state, "queued", None)
        known = (
            fields(request_id=request_id, code=code, key=key) if queued is None else about(queued, code=code, key=key)
        )
        log.info("[RequestQueue] %s answered %d %s", request_id, exc.status, code, extra=known)
        if request.url.path in self._paths:
            request_metrics.rejected(exc)
        if isinstance(exc, QueueFull):
            await self._sample_drain_rate()
        return error_response(exc, self._context.rates.queue)

    async def _sample_drain_rate(self) -> None:
        rate = self._context.rates.queue
        if not rate.due():
            return
        with contextlib.suppress(Exception):  # only Retry-After depends on it
            state = (await self._context.connection.jetstream.stream_info(names.STREAM)).state
            rate.sample(state.last_seq - state.messages, busy=state.messages > 0)

    async def _http_error(self, request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        error = InvalidRequest(f"{request.method} {request.url.path}: {exc.detail}")
        error.status = exc.status_code
        return JSONResponse(error.body(), exc.status_code, exc.headers)

    async def _invalid(self, request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        first: dict[str, Any] = exc.errors()[0]
        error = InvalidRequest(first["msg"], param=".".join(str(part) for part in first["loc"][1:]) or None)
        return JSONResponse(error.body(), error.status)

    async def _unexpected(self, request: Request, exc: Exception) -> Response:
        log.error("[RequestQueue] %s failed unexpectedly", request.state.request_id, exc_info=exc)
        error = ApiError("an unexpected error occurred; quote the request id to whoever runs this server")
        return JSONResponse(error.body(), 500, {"x-should-retry": "false"})
