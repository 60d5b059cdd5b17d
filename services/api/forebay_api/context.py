"""What the routes work with: built by `app`, reached as `request.app.state.context`."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from forebay_api.auth import ApiKeys, Client
from forebay_api.dispatcher import Dispatcher
from forebay_api.drain_rate import Rates
from forebay_api.exposition import Exposition
from forebay_api.feed import Feed
from forebay_api.idempotency import IdempotentRequests
from forebay_api.models import Models
from forebay_contracts.connection import Connection
from forebay_contracts.messages import WorkerInfo
from forebay_contracts.presence import Presence
from forebay_contracts.settings import ApiSettings
from forebay_contracts.states import StateStore


@dataclass(slots=True)
class Context:
    """The parts of a running api."""

    settings: ApiSettings
    connection: Connection
    states: StateStore
    dispatcher: Dispatcher
    idempotent: IdempotentRequests
    workers: Presence[WorkerInfo]
    models: Models
    keys: ApiKeys
    rates: Rates
    feed: Feed
    exposition: Exposition | None
    draining: bool = False


# Coroutines, though they await nothing: FastAPI would run plain functions in a thread each.
async def context(request: Request) -> Context:
    """The running api that serves `request`."""
    found: Context = request.app.state.context
    return found


async def authorized(request: Request) -> Context:
    """The same, for clients with a valid key only."""
    found = await context(request)
    request.state.client = found.keys.check(request)
    return found


async def caller(request: Request) -> Client:
    """Whose key `request` carries."""
    return (await context(request)).keys.check(request)


Open = Annotated[Context, Depends(context)]
Authorized = Annotated[Context, Depends(authorized)]
Caller = Annotated[Client, Depends(caller)]
