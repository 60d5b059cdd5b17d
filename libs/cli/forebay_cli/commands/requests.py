"""`forebay requests` and `cancel`: what became of requests, as NATS has it, with no service asked."""

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from forebay_cli import console
from forebay_cli.connection import connected, settings
from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.admission import JetStreamAdmission
from forebay_contracts.queueing.cancellation import Cancellation, NatsCancelNotices
from forebay_contracts.queueing.recent_requests import recent_states
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueConflict, RequestNotFound
from forebay_contracts.wire.state import RequestState, RequestStatus

SCANNED_CHANGES = 20_000
"""`forebay requests` looks through so many of the latest changes of state, whatever it is asked for."""


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
        console.print_table(request_table(found[0]))
        return
    console.print_table(requests_table(found))


async def cancel(request_id: str, *, as_json: bool) -> None:
    """Call a request off.

    Raises:
        RequestNotFound: no such request is known (any more).
        QueueConflict: it has ended already.
    """
    async with connected(settings()) as link:
        states = KeyValueStateStore(link)
        known = await _one(link, request_id)
        cancellation = Cancellation(states, JetStreamAdmission(link), NatsCancelNotices(link))
        done = await cancellation.cancel(request_id, "cancelled by the operator")
        latest = await states.get(request_id)
    ended = (latest.state if latest else known).status
    if as_json:
        console.print_json({"id": request_id, "cancelled": done, "status": ended})
    if not done:
        raise QueueConflict(f"request {request_id} has ended already: {ended.value}")
    if not as_json:
        console.stdout.print(f"cancelled {request_id}", markup=False)


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


def request_table(state: RequestState) -> Table:
    """All that is known of one request."""
    waited, ran = _durations(state)
    known = state.model_dump(mode="json", exclude={"schema_version", "id", "timestamp", "usage"}, exclude_none=True)
    for name in ("queued_at", "started_at", "finished_at", "deadline"):
        if name in known:
            known[name] = time.strftime("%F %T", time.localtime(known[name]))
    usage = {} if state.usage is None else state.usage.model_dump()
    return console.pairs(f"Request {state.id}", known | {"waited": waited} | ({"ran": ran} if ran else {}) | usage)


def requests_table(states: Sequence[RequestState]) -> Table:
    """A line for each of `states`."""
    columns = ("id", "status", "type", "model", "queued", "waited", "ran", "attempt", "tokens", "error")
    return console.table("Requests", columns, [_request_row(state) for state in states])


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
