"""Errors as HTTP answers: OpenAI's shape, and nothing of the inside in it."""

import contextlib
import logging
from typing import Final, NamedTuple, Unpack

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from forebay_api import request_metrics
from forebay_api.clients.keys import Client
from forebay_api.context import Context
from forebay_contracts.nats import clock
from forebay_contracts.telemetry.logs import Fields, fields
from forebay_contracts.telemetry.metrics import bound
from forebay_contracts.wire import errors, names
from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.request import InferenceRequest

UNMEASURED_RETRY_AFTER_S: Final = 1
"""Retry-After of a full queue until its rate has been measured."""

log = logging.getLogger(__name__)


class ErrorAnswer(NamedTuple):
    """How a kind of error is answered, besides its own `status`, `type` and `code`.

    `should_retry` is the header `x-should-retry`, which OpenAI's SDKs obey; None: not sent. `rejection` is the reason
    under which `forebay_requests_rejected` counts the request; None: not counted.
    """

    should_retry: bool | None = None
    rejection: str | None = None


# The SDKs retry 408 and 500 by themselves. A timeout would double the load when it is highest, and a request whose
# attempts are spent would get as many again.
ANSWERS: Final[dict[type[ApiError], ErrorAnswer]] = {
    errors.QueueFull: ErrorAnswer(True, "queue_full"),
    errors.QueueUnavailable: ErrorAnswer(True, "queue_unavailable"),
    errors.ModelUnavailable: ErrorAnswer(True, "model_unavailable"),
    errors.QueueError: ErrorAnswer(True),
    errors.ModelNotFound: ErrorAnswer(None, "model_not_found"),
    errors.InvalidApiKey: ErrorAnswer(None, "invalid_api_key"),
    errors.RequestTooLarge: ErrorAnswer(None, "request_too_large"),
    errors.KeyLimitReached: ErrorAnswer(None, "key_limit_reached"),
    errors.InvalidRequest: ErrorAnswer(None, "invalid_request"),
    errors.RequestTimeout: ErrorAnswer(False),
    errors.InferenceFailed: ErrorAnswer(False),
}
_BY_CODE: Final = {kind.code: answer for kind, answer in ANSWERS.items() if kind.code}


def _answer_of(error: ApiError) -> ErrorAnswer:
    """The row of the error's class or of its nearest base; a worker's error is found by its code."""
    kind = next((kind for kind in type(error).__mro__ if kind in ANSWERS), None)
    return ANSWERS[kind] if kind else _BY_CODE.get(error.code or "", ErrorAnswer())


def about(queued: InferenceRequest, **more: Unpack[Fields]) -> dict[str, Fields]:
    """The `extra` of a log line about the end of an admitted request."""
    known = Fields(
        request_id=queued.id,
        model=queued.model,
        type=queued.completion_type.value,
        total_s=max(clock.now() - queued.created_at, 0.0),
    )
    return {"fields": known | more}


class ErrorAnswers:
    """Turns every exception that a route raises into an answer, and counts rejections at `paths`."""

    def __init__(self, context: Context, paths: frozenset[str]) -> None:
        self._context = context
        self._paths = paths
        # All counters exist from the start: the first rejection of a kind is a change too.
        for row in ANSWERS.values():
            if row.rejection:
                bound(request_metrics.REJECTED, row.rejection)

    async def answer(self, request: Request, exc: Exception) -> Response:
        """What the client gets for `exc`."""
        match exc:
            case ApiError():
                return await self._api_error(request, exc)
            case HTTPException():
                error = errors.InvalidRequest(f"{request.method} {request.scope['path']}: {exc.detail}")
                return JSONResponse(error.body(), exc.status_code, exc.headers)
        log.error("[RequestQueue] %s failed unexpectedly", request.state.request_id, exc_info=exc)
        unexpected = ApiError("an unexpected error occurred; give the request id to the operator of this server")
        return JSONResponse(unexpected.body(), 500, {"x-should-retry": "false"})

    async def _api_error(self, request: Request, error: ApiError) -> Response:
        code, request_id = error.code or error.type, request.state.request_id
        client: Client | None = getattr(request.state, "client", None)
        queued: InferenceRequest | None = getattr(request.state, "queued", None)
        key = client.name if client else None
        known = about(queued, code=code, key=key) if queued else fields(request_id=request_id, code=code, key=key)
        log.info("[RequestQueue] %s answered %d %s", request_id, error.status, code, extra=known)
        row = _answer_of(error)
        if row.rejection and request.scope["path"] in self._paths:
            bound(request_metrics.REJECTED, row.rejection).inc()
        headers: dict[str, str] = {}
        if row.should_retry is not None:
            headers["x-should-retry"] = "true" if row.should_retry else "false"
        if (retry_after_s := await self._retry_after_s(error)) is not None:
            headers["retry-after"] = str(retry_after_s)
        return JSONResponse(error.body(), error.status, headers)

    async def _retry_after_s(self, error: ApiError) -> int | None:
        if isinstance(error, errors.KeyLimitReached):
            return error.retry_after_s
        if not isinstance(error, errors.QueueFull):
            return None
        rate = self._context.rates.queue
        if rate.due():
            with contextlib.suppress(Exception):  # only Retry-After depends on it
                state = (await self._context.connection.jetstream.stream_info(names.STREAM)).state
                rate.sample(state.last_seq - state.messages, busy=state.messages > 0)
        return rate.retry_after_s() or UNMEASURED_RETRY_AFTER_S
