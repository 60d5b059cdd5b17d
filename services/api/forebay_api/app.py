"""The application: builds the parts in order, and stops them again."""

import asyncio
import contextlib
import functools
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import Depends
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from forebay_api.batches.queue import BatchQueue
from forebay_api.clients import limit_headers, usage_history
from forebay_api.clients.keys import ApiKeys
from forebay_api.clients.limits import KeyLimits
from forebay_api.clients.token_limits import TokenLimits
from forebay_api.context import Context, caller
from forebay_api.create import Create
from forebay_api.http.documented import ERRORS
from forebay_api.http.errors import ErrorAnswers
from forebay_api.http.middleware import REQUEST_ID_HEADER, HeadersMiddleware, TraceMiddleware
from forebay_api.http.openapi import KEY, Api, described
from forebay_api.http.routing import WEBSOCKET, Routes
from forebay_api.in_flight.carried import CarriedRequests
from forebay_api.in_flight.dispatcher import Dispatcher
from forebay_api.in_flight.files import Files
from forebay_api.in_flight.idempotency import IdempotentRequests
from forebay_api.in_flight.listener import Listener
from forebay_api.in_flight.mover import Mover
from forebay_api.in_flight.overdue import Overdue, waiting
from forebay_api.in_flight.records import Records
from forebay_api.in_flight.retries import Retries
from forebay_api.in_flight.stored import StoredRequests
from forebay_api.openai import models
from forebay_api.openai.batches import routes as batches
from forebay_api.openai.batches.stored import Batches
from forebay_api.openai.chat import routes as chat
from forebay_api.openai.files import routes as files
from forebay_api.openai.responses import conversation_routes as conversations
from forebay_api.openai.responses import routes as responses
from forebay_api.openai.responses.stored import Responses
from forebay_api.responses_socket import ResponsesSocket
from forebay_api.routes import ENDPOINTS
from forebay_api.watching import health, page, queue, requests, steering, usage
from forebay_api.watching.drain_rate import Rates
from forebay_api.watching.exposition import Exposition
from forebay_api.watching.feed import Feed
from forebay_api.watching.history import History
from forebay_api.watching.served_models import Models
from forebay_api.webhooks.endpoints import Endpoints
from forebay_contracts.nats import clock, topology
from forebay_contracts.nats.connection import Connection, connected
from forebay_contracts.nats.consumers import known_models
from forebay_contracts.nats.limits import Watch
from forebay_contracts.nats.presence import Heartbeat, Presence
from forebay_contracts.queueing.admission import JetStreamAdmission
from forebay_contracts.queueing.answer_log import JetStreamAnswerLog
from forebay_contracts.queueing.cancellation import Cancellation, NatsCancelNotices
from forebay_contracts.queueing.deliveries import JetStreamDeliveries
from forebay_contracts.queueing.events import publish_event
from forebay_contracts.queueing.failed import FailedRequests
from forebay_contracts.queueing.room import JetStreamRoom
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.queueing.status import QueueStatus, queue_status
from forebay_contracts.queueing.usage import last_days
from forebay_contracts.settings import ApiSettings
from forebay_contracts.telemetry import tracing
from forebay_contracts.version import VERSION
from forebay_contracts.wire import names
from forebay_contracts.wire.heartbeats import ApiInfo, WorkerInfo

if TYPE_CHECKING:
    from forebay_api.webhooks.delivery import Deliverer

log = logging.getLogger(__name__)


def create_app(context: Context) -> ASGIApp:
    """The HTTP side of a running api."""
    rest = Api(title="Forebay", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False)
    rest.state.context = context
    keyed = [Depends(caller)]
    if context.settings.api_keys or context.settings.api_keys_file:
        keyed.append(Depends(KEY))
    for router in (
        described(ENDPOINTS),
        models.router,
        chat.router,
        responses.router,
        conversations.router,
        files.router,
        batches.router,
        queue.router,
        requests.router,
        steering.router,
        usage.router,
    ):
        rest.include_router(router, dependencies=keyed, responses=ERRORS)
    for router in (health.router, page.router):
        rest.include_router(router)
    paths = frozenset(endpoint.path for endpoint in ENDPOINTS)
    shapes = {endpoint.path: endpoint.errors for endpoint in ENDPOINTS}
    routes: dict[tuple[str, str], ASGIApp]
    routes = {(endpoint.method, endpoint.path): Create(endpoint, context) for endpoint in ENDPOINTS}
    errors = ErrorAnswers(context, shapes)
    routes[WEBSOCKET, "/v1/responses"] = ResponsesSocket(context, errors)
    served: ASGIApp = Routes(routes, rest, errors)
    if tracing.enabled():
        served = TraceMiddleware(served, paths)
    served = HeadersMiddleware(served, context)
    if context.settings.cors_origins:
        served = CORSMiddleware(
            served,
            allow_origins=context.settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER.decode(), "retry-after", "x-should-retry", *limit_headers.NAMES],
        )
    return served


@contextlib.asynccontextmanager
async def running(settings: ApiSettings) -> AsyncIterator[Context]:
    """The parts of an api, connected and listening to NATS, for as long as the block lasts."""
    keys = ApiKeys(settings)
    connecting = connected(settings, "forebay-api", "api")
    endpoints = Endpoints(settings.webhooks_file)
    async with keys.followed(), endpoints.followed(), connecting as connection, clock.followed(connection.requests):
        await topology.ensure(connection, settings, settings.served_model)
        shared = Watch(functools.partial(topology.live_limits, connection, settings, settings.served_model))
        await clock.measure(connection.requests)
        instance = f"api-{uuid.uuid4().hex[:12]}"
        apis = Presence(connection, names.APIS_BUCKET, ApiInfo)
        states = KeyValueStateStore(connection)
        tokens = TokenLimits(keys.with_token_limits, states.usage)
        others = lambda: (api for api in apis.alive() if api.id != instance)  # noqa: E731
        limits = KeyLimits(keys, others, tokens, defers=settings.key_overflow == "defer")
        started_at = time.time()

        def describe() -> ApiInfo:
            return ApiInfo(
                id=instance,
                version=VERSION,
                started_at=started_at,
                heartbeat_at=time.time(),
                model=settings.served_model,
                limits=dict(shared.limits.told),
                unfinished=limits.unfinished,
            )

        heartbeat = Heartbeat(connection, names.APIS_BUCKET, describe)
        context = _built(settings, connection, states, instance, keys, limits, heartbeat, endpoints, apis, shared)
        await shared.look()
        deliverer = _deliverer(context) if settings.webhooks_file is not None else None
        await context.workers.start()
        await apis.start()
        await Listener(connection, context.dispatcher, context.stored, context.mover).start()
        await heartbeat.start()
        context.mover.look_at_all()
        overdue = Overdue(functools.partial(waiting, connection), context.stored)
        if deliverer is not None:
            overdue.look()
            apis.on_lost.append(overdue.look)
        running_batches = BatchQueue(context)
        running_batches.start()
        delivering = asyncio.create_task(deliverer.run()) if deliverer is not None else None
        thinning = asyncio.create_task(usage_history.follow(connection))
        log.info("[RequestQueue] api %s takes requests for %s", instance, settings.served_model)
        try:
            async with tokens.followed(), shared.followed(), context.history.followed():
                yield context
        finally:
            thinning.cancel()
            apis.on_lost.clear()
            overdue.close()
            await running_batches.close()
            if delivering is not None:
                delivering.cancel()
                await asyncio.wait([delivering])
            await context.stored.close()
            await context.dispatcher.close()
            await context.mover.close()  # last, since every other notice of an idle slot still comes here
            await context.workers.stop()
            await apis.stop()
            await heartbeat.stop()


def _deliverer(context: Context) -> "Deliverer":
    """Posts the events of webhooks. Raises ConfigurationError."""
    # Imported here, since HTTP clients take 10 MB of memory.
    from forebay_api.webhooks.delivery import Deliverer

    connection, settings = context.connection, context.settings
    deliveries = JetStreamDeliveries(connection, names.WEBHOOKS_CONSUMER, names.WEBHOOKS)
    publish = functools.partial(publish_event, connection.requests)
    timeout_s, longest_pause_s = settings.webhook_timeout, settings.webhook_retry_max
    return Deliverer(context.webhooks, deliveries, publish, timeout_s, longest_pause_s)


def _built(
    settings: ApiSettings,
    connection: Connection,
    states: KeyValueStateStore,
    instance: str,
    keys: ApiKeys,
    limits: KeyLimits,
    heartbeat: Heartbeat[ApiInfo],
    endpoints: Endpoints,
    apis: Presence[ApiInfo],
    shared: Watch,
) -> Context:
    """The parts, before any of them has started."""
    admission = JetStreamAdmission(connection, patience_s=settings.admission_patience)
    answers = JetStreamAnswerLog(connection)
    cancellation = Cancellation(states, admission, NatsCancelNotices(connection), answers)
    dispatcher = Dispatcher(instance, admission, states, cancellation, limits.one_more, lambda: heartbeat.lapsed)
    records = Records(connection)
    failed = FailedRequests(connection)
    stored = StoredRequests(
        dispatcher,
        admission,
        states,
        cancellation,
        answers,
        records,
        limits.one_more,
        failed,
        settings.request_state_ttl,
    )
    workers = Presence(connection, names.WORKERS_BUCKET, WorkerInfo)
    rates = Rates()
    room = JetStreamRoom(connection, admission)
    mover = Mover(room, states, workers.alive, keys.weight, limits.has_tokens)

    async def numbers() -> QueueStatus:
        live = shared.limits.live
        status = await queue_status(connection, states, settings, workers.alive(), apis.alive(), live)
        rates.sample(status)
        return status

    all_batches = Batches(connection)
    today = lambda: states.usage(last_days(1))  # noqa: E731
    exposition = Exposition(connection, numbers, answers.size, workers.alive, today, all_batches.counts)
    return Context(
        settings=settings,
        connection=connection,
        states=states,
        dispatcher=dispatcher,
        stored=stored,
        mover=mover,
        records=records,
        responses=Responses(records, stored),
        carried=CarriedRequests(dispatcher, stored, states, answers),
        files=Files(connection),
        batches=all_batches,
        idempotent=IdempotentRequests(connection, stored),
        workers=workers,
        models=Models(settings, workers.alive, lambda: known_models(connection)),
        keys=keys,
        limits=limits,
        rates=rates,
        numbers=numbers,
        exposition=exposition if settings.metrics else None,
        feed=Feed(connection, numbers, workers.alive),
        webhooks=endpoints,
        failed=failed,
        retries=Retries(failed, records, stored, states, answers),
        answers=answers,
        history=History(
            lambda: queue_status(connection, states, settings, workers.alive()),
            workers.alive,
            lambda: states.usage(last_days(1)),
        ),
    )
