"""What the routes work with, built by `app`. FastAPI's routes reach it as `request.app.state.context`."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from forebay_api.clients.keys import ApiKeys, Client
from forebay_api.clients.limits import KeyLimits
from forebay_api.in_flight.carried import CarriedRequests
from forebay_api.in_flight.dispatcher import Dispatcher
from forebay_api.in_flight.files import Files
from forebay_api.in_flight.idempotency import IdempotentRequests
from forebay_api.in_flight.mover import Mover
from forebay_api.in_flight.records import Records
from forebay_api.in_flight.retries import Retries
from forebay_api.in_flight.stored import StoredRequests
from forebay_api.openai.batches.stored import Batches
from forebay_api.openai.responses.stored import Responses
from forebay_api.watching.drain_rate import Rates
from forebay_api.watching.exposition import Exposition
from forebay_api.watching.feed import Feed
from forebay_api.watching.history import History
from forebay_api.watching.served_models import Models
from forebay_api.webhooks.endpoints import Endpoints
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.presence import Presence
from forebay_contracts.queueing.failed import FailedRequests
from forebay_contracts.queueing.protocols import AnswerLog, StateStore
from forebay_contracts.queueing.status import QueueStatus
from forebay_contracts.settings import ApiSettings
from forebay_contracts.wire.heartbeats import WorkerInfo


@dataclass(slots=True)
class Context:
    """The parts of a running api."""

    settings: ApiSettings
    connection: Connection
    states: StateStore
    dispatcher: Dispatcher
    stored: StoredRequests
    mover: Mover
    records: Records
    responses: Responses
    carried: CarriedRequests
    files: Files
    batches: Batches
    idempotent: IdempotentRequests
    workers: Presence[WorkerInfo]
    models: Models
    keys: ApiKeys
    limits: KeyLimits
    rates: Rates
    numbers: Callable[[], Awaitable[QueueStatus]]
    feed: Feed
    exposition: Exposition | None
    webhooks: Endpoints
    failed: FailedRequests
    retries: Retries
    answers: AnswerLog
    history: History
    draining: bool = False


# FastAPI would run plain functions in a thread each.
async def context(request: Request) -> Context:
    """The running api that serves `request`."""
    found: Context = request.app.state.context
    return found


Running = Annotated[Context, Depends(context)]


async def caller(request: Request, found: Running) -> Client:
    """The client whose key `request` carries. Raises InvalidApiKey without a valid key."""
    client: Client = found.keys.check(request)
    request.state.client = client
    return client


Caller = Annotated[Client, Depends(caller)]
