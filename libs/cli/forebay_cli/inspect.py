"""`forebay status`, `requests`, `topology` and `cancel`: the queue as NATS has it, with no service asked."""

import asyncio
import contextlib
import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nats.errors import Error as NatsError
from nats.js.api import ConsumerInfo, StreamInfo
from nats.js.errors import NotFoundError
from rich.console import Group
from rich.live import Live
from rich.table import Table

from forebay_cli import console
from forebay_cli.links import connected, settings
from forebay_contracts import cancellation, names, presence, topology
from forebay_contracts.connection import Connection
from forebay_contracts.errors import QueueConflict, QueueUnavailable, RequestNotFound
from forebay_contracts.messages import RequestState, RequestStatus, WorkerInfo
from forebay_contracts.queue import JetStreamQueue
from forebay_contracts.recent import recent_states
from forebay_contracts.states import KeyValueStateStore
from forebay_contracts.status import ModelQueue, QueueStatus, queue_status

WATCH_INTERVAL_S = 1.0

MODEL_COLUMNS = ("model", "waiting", "processing/limit", "paused until")

SCANNED_CHANGES = 20_000
"""`forebay requests` looks through so many of the latest changes of state, whatever it is asked for."""


async def status(*, watch: bool, as_json: bool) -> None:
    """Print the queue's numbers and the workers, once or every second."""
    read = settings()
    async with connected(read) as link:
        states = KeyValueStateStore(link)

        async def look() -> tuple[QueueStatus, list[WorkerInfo]]:
            workers = await _workers(link)
            return await queue_status(link, states, read, workers), workers

        if not watch:
            numbers, workers = await look()
            if as_json:
                console.print_json(_status_json(numbers, workers))
                return
            for made in _status_tables(numbers, workers):
                console.print_table(made)
            return
        with contextlib.nullcontext() if as_json else Live(console=console.stdout, auto_refresh=False) as live:
            while True:
                numbers, workers = await look()
                if live is None:
                    console.print_json(_status_json(numbers, workers), one_line=True)
                else:
                    live.update(Group(*_status_tables(numbers, workers)), refresh=True)
                await asyncio.sleep(WATCH_INTERVAL_S)


@dataclass(frozen=True)
class Filter:
    """Which requests are asked for; None: whichever."""

    status: RequestStatus | None = None
    model: str | None = None
    since_s: float | None = None
    request_id: str | None = None

    def wants(self, state: RequestState) -> bool:
        """Whether `state` is one of them."""
        return (
            self.status in (None, state.status)
            and (self.model is None or state.model == self.model or state.model.endswith("/" + self.model))
            and (self.since_s is None or state.queued_at >= time.time() - self.since_s)
        )


async def requests(wanted: Filter, *, limit: int, as_json: bool) -> None:
    """Print the newest requests, newest first; one that is asked for by its id with all that is known of it.

    Raises:
        RequestNotFound: one was asked for by its id, and is not known (any more).
    """
    async with connected(settings()) as link:
        if wanted.request_id is None:
            states = await recent_states(link, SCANNED_CHANGES)
            found = heapq.nlargest(limit, filter(wanted.wants, states), key=lambda state: state.queued_at)
        else:
            found = [await _one(link, wanted.request_id)]
    if as_json:
        console.print_json([state.model_dump(mode="json") for state in found])
        return
    if wanted.request_id is not None:
        console.print_table(console.table(f"Request {wanted.request_id}", ("", ""), _request_lines(found[0])))
        return
    columns = ("id", "status", "type", "model", "queued", "waited", "ran", "attempt", "tokens", "error")
    console.print_table(console.table("Requests", columns, [_request_row(state) for state in found]))


async def cancel(request_id: str) -> None:
    """Call a request off.

    Raises:
        RequestNotFound: no such request is known (any more).
        QueueConflict: it has ended already.
    """
    async with connected(settings()) as link:
        states = KeyValueStateStore(link)
        known = await _one(link, request_id)
        queue = JetStreamQueue(link)
        reason = "cancelled by the operator"
        if not await cancellation.call_off(link, queue, states, request_id, RequestStatus.CANCELLED, reason):
            latest = await states.get(request_id)
            ended = latest.state if latest else known
            raise QueueConflict(f"request {request_id} has ended already: {ended.status.value}")
    console.stdout.print(f"cancelled {request_id}", markup=False)


async def apply_topology() -> None:
    """Make streams, consumer and buckets what the settings say, and print what was changed."""
    read = settings()
    async with connected(read) as link:
        changes = await topology.ensure(link, read, read.served_model, read.served_aliases)
    for change in changes or ["nothing to change"]:
        console.stdout.print(change, markup=False)


async def show_topology(*, as_json: bool) -> None:
    """Print the live streams, buckets and consumers with their limits."""
    read = settings()
    async with connected(read) as link:
        try:
            owned = [config.name for config in topology.stream_configs(read)]
            streams = await asyncio.gather(*(link.jetstream.stream_info(name) for name in owned))
            consumers = await topology.consumers(link)
        except NotFoundError as exc:
            raise QueueUnavailable("the topology is not (all) there yet: `forebay topology apply` makes it") from exc
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("NATS did not answer") from exc
    stream_rows, consumer_rows = [_stream_row(info) for info in streams], [_consumer_row(info) for info in consumers]
    if as_json:
        console.print_json({"streams": stream_rows, "consumers": consumer_rows})
        return
    console.print_table(_table_of("Streams and buckets", stream_rows))
    console.print_table(_table_of("Consumers, one a model", consumer_rows))


async def _workers(link: Connection) -> list[WorkerInfo]:
    try:
        return await presence.read(link, names.WORKERS_BUCKET, WorkerInfo)
    except NotFoundError:
        return []
    except (NatsError, TimeoutError) as exc:
        raise QueueUnavailable("NATS did not answer") from exc


def _status_json(numbers: QueueStatus, workers: list[WorkerInfo]) -> dict[str, Any]:
    # `workers` is a number in QueueStatus; here it is the workers themselves, whose number it was.
    return numbers.model_dump() | {"workers": [worker.model_dump(mode="json") for worker in workers]}


def _status_tables(numbers: QueueStatus, workers: list[WorkerInfo]) -> list[Table]:
    columns = ("id", "model", "status", "progress", "busy/slots", "quantization", "device", "engine", "version")
    rows = [
        (
            w.id,
            w.model,
            w.status.value,
            w.progress,
            f"{w.busy}/{w.slots}",
            w.quantization,
            w.device,
            w.engine,
            w.version,
        )
        for w in workers
    ]
    fields = numbers.model_dump(exclude={"workers", "workers_ready", "models"})
    return [
        console.table("Queue", ("", ""), list(fields.items())),
        console.table("Models", MODEL_COLUMNS, [_model_row(line) for line in numbers.models]),
        console.table(f"Workers: {numbers.workers_ready} of {numbers.workers} ready", columns, rows),
    ]


def _model_row(line: ModelQueue) -> tuple[object, ...]:
    paused = None if line.paused_until is None else time.strftime("%F %T", time.localtime(line.paused_until))
    return (line.model, line.waiting, f"{line.processing}/{line.max_concurrent}", paused)


async def _one(link: Connection, request_id: str) -> RequestState:
    # An id goes into subjects: what cannot be one goes no further.
    stored = await KeyValueStateStore(link).get(request_id) if names.is_request_id(request_id) else None
    if stored is None:
        raise RequestNotFound(
            f"no request {request_id} is known: it was refused before it was queued, which the api's log line "
            f"`{request_id} answered` tells, or it is older than REQUEST_STATE_TTL"
        )
    return stored.state


def _durations(state: RequestState) -> tuple[str, str | None]:
    """How long it waited for its first attempt, and how long it has run since, other attempts included."""
    now, started = time.time(), state.started_at
    waited = (started or state.finished_at or now) - state.queued_at
    return f"{waited:.2f} s", None if started is None else f"{(state.finished_at or now) - started:.2f} s"


def _request_lines(state: RequestState) -> list[tuple[object, ...]]:
    waited, ran = _durations(state)
    known = state.model_dump(mode="json", exclude={"schema_version", "id", "timestamp", "usage"}, exclude_none=True)
    for name in ("queued_at", "started_at", "finished_at", "deadline"):
        if name in known:
            known[name] = time.strftime("%F %T", time.localtime(known[name]))
    usage = {} if state.usage is None else state.usage.model_dump()
    return [*(known | {"waited": waited} | ({"ran": ran} if ran else {}) | usage).items()]


def _request_row(state: RequestState) -> tuple[object, ...]:
    waited, ran = _durations(state)
    return (
        state.id,
        state.status.value,
        state.completion_type,
        state.model,
        time.strftime("%H:%M:%S", time.localtime(state.queued_at)),
        waited,
        ran,
        state.attempt,
        state.usage.completion_tokens if state.usage else None,
        state.error if state.fault is None else f"{state.error or ''} ({state.fault})".strip(),
    )


def _stream_row(info: StreamInfo) -> dict[str, Any]:
    config, state = info.config, info.state
    return {
        "name": config.name,
        "subjects": " ".join(config.subjects or ()),
        "messages": state.messages,
        "max_msgs": config.max_msgs,
        "last_seq": state.last_seq,
        "bytes": state.bytes,
        "retention": config.retention,
        "discard": config.discard,
        "storage": config.storage,
        "max_age_s": config.max_age,
        "replicas": config.num_replicas,
    }


def _consumer_row(info: ConsumerInfo) -> dict[str, Any]:
    config = info.config
    return {
        "name": info.name,
        "model": (config.metadata or {}).get(names.MODEL_METADATA),
        "max_ack_pending": config.max_ack_pending,
        "pending": info.num_pending,
        "ack_pending": info.num_ack_pending,
        "redelivered": info.num_redelivered,
        "pulls_waiting": info.num_waiting,
        "ack_wait_s": config.ack_wait,
        "paused_until": config.pause_until if info.paused else None,
    }


def _table_of(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    columns = list(rows[0]) if rows else [""]
    return console.table(title, columns, [list(row.values()) for row in rows])
