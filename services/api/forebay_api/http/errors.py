"""Errors as HTTP answers: OpenAI's shape, and nothing of the inside in it."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Unpack

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
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

LOG_RETRY_AFTER_S: Final = 60
"""Retry-After of a full answer log, which gets room as answers reach RESPONSE_TTL or are deleted, and of a full waiting
room."""

log = logging.getLogger(__name__)


class ErrorAnswer(NamedTuple):
    """How a kind of error is answered, besides its own `status`, `type` and `code`.

    `should_retry` is the header `x-should-retry`, which the SDKs obey; None: not sent. `rejection` is the reason
    under which `forebay_requests_rejected` counts the request; None: not counted.
    """

    should_retry: bool | None = None
    rejection: str | None = None


# The SDKs retry 408 and 500 by themselves. A timeout would double the load when it is highest, and a request whose
# attempts are spent would get as many again. Claude Code asks ten times with a key that is wrong.
ANSWERS: Final[dict[type[ApiError], ErrorAnswer]] = {
    errors.QueueFull: ErrorAnswer(True, "queue_full"),
    errors.QueueUnavailable: ErrorAnswer(True, "queue_unavailable"),
    errors.ModelUnavailable: ErrorAnswer(True, "model_unavailable"),
    errors.AnswerLogFull: ErrorAnswer(True, "answer_log_full"),
    errors.WaitingRoomFull: ErrorAnswer(True, "waiting_room_full"),
    errors.FileStoreFull: ErrorAnswer(False),
    errors.QueueError: ErrorAnswer(True),
    errors.ModelNotFound: ErrorAnswer(None, "model_not_found"),
    errors.InvalidApiKey: ErrorAnswer(False, "invalid_api_key"),
    errors.RequestTooLarge: ErrorAnswer(None, "request_too_large"),
    errors.KeyLimitReached: ErrorAnswer(None, "key_limit_reached"),
    errors.TokenLimitReached: ErrorAnswer(None, "token_limit_reached"),
    errors.DailyTokensSpent: ErrorAnswer(False, "token_limit_reached"),
    errors.InvalidRequest: ErrorAnswer(None, "invalid_request"),
    errors.RequestTimeout: ErrorAnswer(False),
    errors.InferenceFailed: ErrorAnswer(False),
    errors.LoopDetected: ErrorAnswer(False),
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


def _of_query(exc: RequestValidationError) -> errors.InvalidRequest:
    """The first fault of a query."""
    fault = exc.errors()[0]
    param = next(part for part in reversed(fault["loc"]) if isinstance(part, str))  # of a list: not the place in it
    return errors.InvalidRequest(f"Invalid '{param}': {fault['msg']}.", param=param, code="invalid_value")


class ErrorObject(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The body of every error."""

    error: ErrorObject


@dataclass(frozen=True, slots=True)
class Shape:
    """How an api tells errors: `write` gives the HTTP status and the body for an error of the request with this id.

    `model` is the schema of the bodies. `statuses` holds HTTP statuses, with their meaning, that are its own.
    """

    write: Callable[[ApiError, str], tuple[int, dict[str, Any]]]
    model: type[BaseModel]
    statuses: Mapping[int, str] = field(default_factory=dict)


OPENAI: Final = Shape(lambda error, _: (error.status, error.body()), Error)


class ErrorAnswers:
    """Turns every exception that a route raises into an answer, in the shape of its path.

    `shapes` holds those of the paths at which rejections are counted.
    """

    def __init__(self, context: Context, shapes: Mapping[str, Shape]) -> None:
        self._context = context
        self._shapes = shapes
        # All counters exist from the start: the first rejection of a kind is a change too.
        for row in ANSWERS.values():
            if row.rejection:
                bound(request_metrics.REJECTED, row.rejection)

    async def answer(self, request: Request, exc: Exception) -> Response:
        """What the client gets for `exc`."""
        match exc:
            case ApiError():
                return await self._api_error(request, exc)
            case RequestValidationError():
                return await self._api_error(request, _of_query(exc))
            case HTTPException():
                error = errors.InvalidRequest(f"{request.method} {request.scope['path']}: {exc.detail}")
                error.status = exc.status_code
                return self._shaped(request, error, dict(exc.headers or {}))
        log.error("[RequestQueue] %s failed unexpectedly", request.state.request_id, exc_info=exc)
        unexpected = ApiError("an unexpected error occurred; give the request id to the operator of this server")
        return self._shaped(request, unexpected, {"x-should-retry": "false"})

    def _shaped(self, request: Request, error: ApiError, headers: Mapping[str, str]) -> Response:
        shape = self._shapes.get(request.scope["path"], OPENAI)
        status, body = shape.write(error, request.state.request_id)
        return JSONResponse(body, status, headers)

    async def _api_error(self, request: Request, error: ApiError) -> Response:
        code, request_id = error.code or error.type, request.state.request_id
        client: Client | None = getattr(request.state, "client", None)
        queued: InferenceRequest | None = getattr(request.state, "queued", None)
        key = client.name if client else None
        known = about(queued, code=code, key=key) if queued else fields(request_id=request_id, code=code, key=key)
        log.info("[RequestQueue] %s answered %d %s", request_id, error.status, code, extra=known)
        row = _answer_of(error)
        if row.rejection and request.scope["path"] in self._shapes:
            bound(request_metrics.REJECTED, row.rejection).inc()
        headers: dict[str, str] = {}
        if row.should_retry is not None:
            headers["x-should-retry"] = "true" if row.should_retry else "false"
        if (retry_after_s := await self._retry_after_s(error)) is not None:
            headers["retry-after"] = str(retry_after_s)
        return self._shaped(request, error, headers)

    async def _retry_after_s(self, error: ApiError) -> int | None:
        if isinstance(error, errors.KeyLimitReached):
            return error.retry_after_s
        if isinstance(error, errors.AnswerLogFull | errors.WaitingRoomFull):
            return LOG_RETRY_AFTER_S
        if not isinstance(error, errors.QueueFull):
            return None
        rate = self._context.rates.queue
        if rate.due():
            with contextlib.suppress(Exception):  # only Retry-After depends on it
                state = (await self._context.connection.jetstream.stream_info(names.STREAM)).state
                rate.sample(state.last_seq - state.messages, busy=state.messages > 0)
        return rate.retry_after_s() or UNMEASURED_RETRY_AFTER_S
