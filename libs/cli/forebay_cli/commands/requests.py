"""`forebay requests`: the states of requests, read from NATS without any service."""

import heapq
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from textwrap import wrap
from typing import Annotated

import typer
from rich.table import Table

from forebay_cli import console
from forebay_cli.declarations import AsJson, DataDir, NatsUrl, duration_s, synchronous
from forebay_cli.nats_connection import connected, target
from forebay_contracts.nats import clock, permissions
from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.answer_log import JetStreamAnswerLog
from forebay_contracts.queueing.answer_texts import answer_texts
from forebay_contracts.queueing.failed import FailedRequests
from forebay_contracts.queueing.recent_requests import recent_states
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import RequestNotFound
from forebay_contracts.wire.state import RequestState, RequestStatus

MAX_STATES_READ = 20_000
"""The latest changes of state that are searched; older ones are not found."""

MAX_FAILED_READ = 10_000
"""The failed requests that are searched, the oldest."""


ID_WIDTH = 36


@synchronous
async def requests(
    status: Annotated[RequestStatus | None, typer.Option(help="Only those in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only those of this model: its name, or the end of it.")] = None,
    since_s: Annotated[
        float | None,
        typer.Option(
            "--since", help="Only those queued within the last 90s, 10m, 2h.", parser=duration_s, metavar="DURATION"
        ),
    ] = None,
    request_id: Annotated[
        str | None, typer.Option("--id", help="Only this one, with all its fields and its stored answer.")
    ] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only those that `forebay retry` can run again, oldest first.")
    ] = False,
    limit: Annotated[int, typer.Option(help="Most requests to show.", min=1, max=10_000)] = 20,
    data_dir: DataDir = None,
    nats_url: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show the newest requests and their states."""

    def wanted(state: RequestState) -> bool:
        return (
            status in (None, state.status)
            and (model is None or state.model == model or state.model.endswith("/" + model))
            and (since_s is None or state.queued_at >= clock.now() - since_s)
        )

    texts: list[str] | None = None
    async with connected(target(data_dir, nats_url)) as link:
        if failed and request_id is None:
            kept = await FailedRequests(link).page("*", most=MAX_FAILED_READ)
            found = list(islice(filter(wanted, kept or ()), limit))
        elif request_id is None:
            states = filter(wanted, await recent_states(link, MAX_STATES_READ))
            found = heapq.nlargest(limit, states, key=lambda state: state.queued_at)
        else:
            found = [await find(link, request_id)]
            texts = await stored_texts(link, found[0])
    if as_json:
        more = {} if texts is None else {"answer": texts}
        console.print_json([state.model_dump(mode="json") | more for state in found])
    else:
        console.print_tables(
            requests_table(found, console.stdout.width) if request_id is None else request_table(found[0], texts or ())
        )


async def find(link: Connection, request_id: str) -> RequestState:
    """The state of one request, by its id or that of its answer.

    Raises:
        RequestNotFound: its state is not stored, or not any more.
    """
    request_id = names.request_id(request_id)
    # The id becomes part of a subject.
    stored = await KeyValueStateStore(link).get(request_id) if names.is_request_id(request_id) else None
    if stored is None:
        raise RequestNotFound(
            f"no request {request_id} is known: it was refused before it was queued (the api's log line "
            f"`{request_id} answered` says why), or it is older than REQUEST_STATE_TTL"
        )
    return stored.state


async def stored_texts(link: Connection, state: RequestState) -> list[str] | None:
    """The text so far of each choice of a stored answer; None if none is stored, or this user may not read it."""
    own = await permissions.own(link) if state.logged else None
    if own is None or not own.publish.permit(f"$JS.API.DIRECT.GET.{names.ANSWERS}"):
        return None
    return await answer_texts(JetStreamAnswerLog(link), state.id)


def request_table(state: RequestState, texts: Sequence[str] = ()) -> Table:
    """Every field of one request, and the text of each choice of its stored answer."""
    waited, ran = _durations(state)
    known = state.model_dump(mode="json", exclude={"schema_version", "id", "timestamp", "usage"}, exclude_none=True)
    for name in ("queued_at", "started_at", "finished_at", "deadline"):
        if name in known:
            known[name] = time.strftime("%F %T", time.localtime(known[name]))
    usage = {} if state.usage is None else state.usage.model_dump()
    answer = {f"answer_{number}" if number else "answer": text for number, text in enumerate(texts)}
    times = {"waited": waited} | ({"ran": ran} if ran else {})
    return console.pairs(f"Request {state.id}", known | times | usage | answer)


def requests_table(states: Iterable[RequestState], width: int = console.PIPE_WIDTH) -> Table:
    """A line for each of `states`; where the terminal has fewer columns than that takes, more lines each."""
    columns = ("id", "status", "type", "model", "queued", "waited", "ran", "attempt", "tokens", "error")
    rows = [_row(state) for state in states]
    made = console.table("Requests", columns, rows)
    if console.needed_width(made) <= width:
        return made
    return console.table("Requests", _stacked(columns), [_stacked(row) for row in rows])


def _stacked(row: Sequence[object]) -> list[str]:
    """A row with two cells above each other: for that 80 columns have room."""
    one, status, kind, model, queued, waited, ran, attempt, tokens, error = (
        "" if cell is None else str(cell) for cell in row
    )
    return [
        "\n".join([one, *wrap(model, ID_WIDTH)]),
        f"{status}\n{kind}",
        f"{queued}\n{attempt}",
        f"{waited}\n{ran}",
        f"{error}\n{tokens}",
    ]


def _row(state: RequestState) -> tuple[object, ...]:
    return (
        state.id,
        state.status.value,
        state.completion_type,
        state.model,
        time.strftime("%H:%M:%S", time.localtime(state.queued_at)),
        *_durations(state),
        state.attempt,
        state.usage.completion_tokens if state.usage else None,
        state.error if state.fault is None else f"{state.error or ''} ({state.fault})".strip(),
    )


def _durations(state: RequestState) -> tuple[str, str | None]:
    """The wait for the first attempt, and the time since then over all attempts."""
    now, started = clock.now(), state.started_at
    waited = (started or state.finished_at or now) - state.queued_at
    return f"{waited:.2f} s", None if started is None else f"{(state.finished_at or now) - started:.2f} s"
