"""`/v1/queue/requests`, `recent` and `history`: the newest requests, how the last ones ended, and the last hour.

They read what the feed of events and the history keep in memory, so many pages cost NATS no more than one.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query

from forebay_api.clients.keys import Client
from forebay_api.context import Caller, Running
from forebay_api.watching import history
from forebay_api.watching.feed import MAX_KEPT, without_faults
from forebay_contracts.nats import clock
from forebay_contracts.wire.request import CompletionType, Tier
from forebay_contracts.wire.state import RequestState, RequestStatus

# fmt: off
SHOWN: Final = {
    "id", "status", "completion_type", "timestamp", "error", "fault", "model", "attempt", "worker", "queued_at",
    "started_at", "finished_at", "usage", "retryable", "key", "tier", "turn", "deadline", "logged", "attempts",
    "attempt_at", "first_token_at", "resumed",
}
# fmt: on
"""The fields of a state that clients see. Only operators see `fault`, which says what went wrong inside."""

RECENT_S: Final = 300.0
"""What `/v1/queue/recent` looks back on."""

MAX_CAUSES: Final = 10
"""Most causes of failures that it names, the most frequent."""

router = APIRouter(prefix="/v1/queue", tags=["queue"])

Text = Annotated[str | None, Query(max_length=200)]
Age = Annotated[float | None, Query(ge=0, le=10**9)]


@router.get("/requests")
async def list_requests(
    context: Running,
    caller: Caller,
    status: Annotated[list[RequestStatus] | None, Query(max_length=10)] = None,
    model: Text = None,
    key: Text = None,
    worker: Text = None,
    tier: Tier | None = None,
    completion_type: Annotated[CompletionType | None, Query(alias="type")] = None,
    older_s: Age = None,
    newer_s: Age = None,
    text: Text = None,
    order: Literal["newest", "oldest"] = "newest",
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    offset: Annotated[int, Query(ge=0, le=MAX_KEPT)] = 0,
) -> dict[str, Any]:
    """The requests whose state changed last, at most some thousands, and of them those that fit.

    `status` can be repeated. `model` and `worker` are parts of a name, `key` is a whole one. `older_s` and `newer_s`
    are ages in seconds since the request was queued. `text` is a part of its id, its error or, for operators, its
    fault. `order` goes by the time at which they were queued. `total` counts all that fit, `counts` those that fit in
    any status, by status. With `complete`, no older ones were left out. A key that is no operator's sees its own.
    """
    now = clock.now()
    kept = list(await context.feed.states(caller))
    in_model, in_worker, in_text = ((part or "").lower() for part in (model, worker, text))
    tests: list[tuple[object, Callable[[RequestState], bool]]] = [
        (model, lambda state: in_model in state.model.lower()),
        (key, lambda state: state.key == key),
        (worker, lambda state: in_worker in (state.worker or "").lower()),
        (tier, lambda state: state.tier == tier),
        (completion_type, lambda state: state.completion_type == completion_type),
        (older_s, lambda state: now - state.queued_at >= (older_s or 0)),
        (newer_s, lambda state: now - state.queued_at <= (newer_s or 0)),
        (text, lambda state: in_text in _searched(state, caller)),
    ]
    tests = [test for test in tests if test[0] is not None]
    fitting = [state for state in kept if all(test(state) for _, test in tests)]
    counts = Counter(state.status for state in fitting)
    if status:
        fitting = [state for state in fitting if state.status in status]
    choose = heapq.nlargest if order == "newest" else heapq.nsmallest
    first = choose(offset + limit, fitting, key=lambda state: (state.queued_at, state.id))
    return {
        "object": "list",
        "at": now,
        "data": [shown(caller, state) for state in first[offset:]],
        "total": len(fitting),
        "counts": {one.value: counts[one] for one in RequestStatus},
        "complete": context.feed.complete,
    }


@router.get("/recent")
async def get_recent(context: Running, caller: Caller) -> dict[str, Any]:
    """What became of the requests of the last five minutes, by model, and what they failed of.

    `wait_p95_s` is the 95th percentile of the wait of those that began, and `waiting_s` the wait so far of the one that
    waits longest. `retried` counts those that needed a second attempt. A key that is no operator's sees its own.
    """
    now = clock.now()
    models: defaultdict[str, list[RequestState]] = defaultdict(list)
    for state in await context.feed.states(caller):
        if not state.status.final or now - (state.finished_at or state.queued_at) <= RECENT_S:
            models[state.model].append(state)
    return {
        "at": now,
        "seconds": RECENT_S,
        "models": [_recent(model, states, now) for model, states in sorted(models.items())],
        "causes": _causes((state for states in models.values() for state in states), caller),
    }


@router.get("/history")
async def get_history(
    context: Running, caller: Caller, after: Annotated[float, Query(ge=0, le=10**11)] = 0.0
) -> dict[str, Any]:
    """The last hour as this api process saw it, in columns: every ten seconds, of the queue and of each model.

    With `after`, only what was sampled after this time (seconds since the epoch). `usage` has what keys used of models
    in each minute, for requests that have ended in it. `marks` are events: a worker that is gone, a limit that changed.
    A key that is no operator's sees the usage of its own.
    """
    kept = context.history
    used: defaultdict[float, list[dict[str, Any]]] = defaultdict(list)
    for one in kept.used:
        for (model, key), (requests, tokens, seconds) in one.rows.items():
            if one.at > after and caller.may_see(key):
                row = {"model": model, "key": key, "requests": requests, "tokens": tokens}
                used[one.at].append(row | {"queue_seconds": round(seconds, 3)})
    return {
        "object": "history",
        "now": clock.now(),
        "seconds": history.SECONDS,
        "sample_s": history.SAMPLE_S,
        "usage_s": history.USAGE_S,
        **history.columns([sample for sample in kept.samples if sample.at > after]),
        "usage": [{"at": at, "rows": rows} for at, rows in used.items()],
        "marks": [mark for mark in kept.marks if mark["at"] > after],
    }


def shown(caller: Client, state: RequestState) -> dict[str, Any]:
    """The fields of `state` that `caller` may see."""
    return without_faults(caller, state.model_dump(include=SHOWN))


def _searched(state: RequestState, caller: Client) -> str:
    return " ".join((state.id, state.error or "", (state.fault or "") if caller.operator else "")).lower()


def _recent(model: str, states: list[RequestState], now: float) -> dict[str, Any]:
    ended = Counter(state.status for state in states)
    began = [state for state in states if state.started_at is not None and now - state.started_at <= RECENT_S]
    waits = sorted(state.started_at - state.queued_at for state in began if state.started_at is not None)
    waiting = [now - state.queued_at for state in states if state.status is RequestStatus.QUEUED]
    return {
        "model": model,
        **{status.value: ended[status] for status in RequestStatus if status.final},
        "wait_p95_s": round(waits[int(0.95 * (len(waits) - 1))], 3) if waits else None,
        "waiting_s": round(max(waiting), 3) if waiting else None,
        "retried": sum(state.attempt - state.turn > 1 for state in began),
    }


def _causes(states: Iterable[RequestState], caller: Client) -> list[dict[str, Any]]:
    found: defaultdict[tuple[str, str | None, str], list[float]] = defaultdict(list)
    for state in states:
        if state.status is RequestStatus.FAILED:
            # `attempt 3 on worker w: why`
            fault = (state.fault or "").partition(": ")[2] if caller.operator else ""
            found[state.model, state.worker, fault or state.error or ""].append(state.finished_at or state.queued_at)
    most = heapq.nlargest(MAX_CAUSES, found.items(), key=lambda cause: len(cause[1]))
    return [
        {"model": model, "worker": worker, "cause": cause, "count": len(ends), "last_at": max(ends)}
        for (model, worker, cause), ends in most
    ]
