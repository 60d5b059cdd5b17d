"""`GET /v1/usage`: what keys used of models, a day."""

from datetime import date, timedelta
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from forebay_api.context import Caller, Running
from forebay_contracts.nats import clock
from forebay_contracts.queueing.usage import UsageRow, day_of, grouped, total
from forebay_contracts.wire.errors import InvalidRequest

DAYS: Final = 7
"""So many days, with today, are shown if the client names none."""

MAX_DAYS: Final = 366
"""Most days of one answer."""

Group = Literal["day", "model", "key"]

router = APIRouter(prefix="/v1", tags=["usage"])


class UsageList(BaseModel):
    """The usage from one day to another, both included."""

    object: Literal["list"]
    first: str = Field(serialization_alias="from")
    last: str = Field(serialization_alias="to")
    data: list[UsageRow]
    total: UsageRow


@router.get("/usage", response_model=UsageList, response_model_exclude_unset=True)
async def get_usage(
    context: Running,
    caller: Caller,
    first: Annotated[date | None, Query(alias="from")] = None,
    last: Annotated[date | None, Query(alias="to")] = None,
    model: Annotated[str | None, Query()] = None,
    key: Annotated[str | None, Query()] = None,
    group_by: Annotated[list[Group] | None, Query()] = None,
) -> dict[str, Any]:
    """Requests that have ended, tokens in and out, and seconds in the queue, a day (UTC), model and key.

    `from` and `to` are days; without them, it is the last seven. `model` is a name, or its part after the slash.
    `group_by` (repeated) chooses what is not summed over. An operator sees the usage of all keys, and `key` chooses
    one; others see their own. Without keys, `key` is null.
    """
    last = last or date.fromisoformat(day_of(clock.now()))
    first = first or date.fromordinal(max(last.toordinal() - DAYS + 1, 1))
    count = (last - first).days + 1
    if not 1 <= count <= MAX_DAYS:
        raise InvalidRequest(f"`to` must be 0 to {MAX_DAYS - 1} days after `from`.", param="to", code="invalid_value")
    days = [(first + timedelta(days=number)).isoformat() for number in range(count)]
    rows = await context.states.usage(days, None if caller.operator else [caller.name])
    rows = [row for row in rows if key in (None, row.key) and (model is None or f"/{row.model}".endswith(f"/{model}"))]
    return {
        "object": "list",
        "first": days[0],
        "last": days[-1],
        "data": grouped(rows, dict.fromkeys(group_by or ("day", "model", "key"))),
        "total": total(rows),
    }
