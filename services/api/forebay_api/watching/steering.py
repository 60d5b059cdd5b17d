"""`/v1/queue/pause`, `resume` and `drain`: what `forebay pause`, `resume` and `drain` do, for keys of operators."""

import logging
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request

from forebay_api.clients.keys import Client
from forebay_api.context import Caller, Running
from forebay_api.http.bodies import body_of
from forebay_api.http.documented import TAKES_JSON
from forebay_api.openai.body import StrictModel
from forebay_contracts.queueing import steering
from forebay_contracts.wire.errors import SteeringNotAllowed

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/queue", tags=["queue"])


class ModelBody(StrictModel):
    """A model by its name, an alias, or its consumer."""

    model: Annotated[str, Field(min_length=1, max_length=512)]


class PauseBody(ModelBody):
    """`for_s`: for how many seconds; without it, until the model is resumed."""

    for_s: Annotated[float | None, Field(gt=0, le=steering.MAX_PAUSE_S)] = None


class DrainBody(StrictModel):
    """The id of a worker."""

    worker: Annotated[str, Field(min_length=1, max_length=128)]


@router.post("/pause", **TAKES_JSON)
async def pause_model(request: Request, context: Running, caller: Caller) -> dict[str, Any]:
    """Stop handing out requests of a model. New ones wait, running ones go on."""
    _check(caller)
    body = await body_of(request, PauseBody, context.settings.max_request_bytes)
    done = await steering.pause(context.connection, body.model, body.for_s)
    log.warning("[RequestQueue] %s paused %s until %.0f", caller.name or "a client", done.model, done.paused_until)
    return asdict(done)


@router.post("/resume", **TAKES_JSON)
async def resume_model(request: Request, context: Running, caller: Caller) -> dict[str, Any]:
    """Hand out requests of a paused model again."""
    _check(caller)
    body = await body_of(request, ModelBody, context.settings.max_request_bytes)
    done = await steering.resume(context.connection, body.model)
    log.warning("[RequestQueue] %s resumed %s", caller.name or "a client", done.model)
    return asdict(done)


@router.post("/drain", **TAKES_JSON)
async def drain_worker(request: Request, context: Running, caller: Caller) -> dict[str, Any]:
    """Let one worker finish its running requests and exit, as SIGTERM does."""
    _check(caller)
    body = await body_of(request, DrainBody, context.settings.max_request_bytes)
    running = await steering.drain(context.connection, body.worker)
    log.warning("[RequestQueue] %s drains the worker %s", caller.name or "a client", body.worker)
    return {"worker": body.worker, "running": running}


def _check(caller: Client) -> None:
    if not caller.operator:
        raise SteeringNotAllowed(f"Your key `{caller.name}` is no operator's, so it may not pause, resume or drain.")
