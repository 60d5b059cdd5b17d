"""OpenAI's list objects, and the query parameters that page through them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Query

from forebay_contracts.wire.errors import InvalidRequest

Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


def page(items: Sequence[dict[str, Any]], limit: int, order: Order, after: str) -> dict[str, Any]:
    """At most `limit` of `items`, behind the one whose id is `after`. `items` are oldest first.

    Raises:
        InvalidRequest: there is no item `after`.
    """
    ordered = list(items) if order == "asc" else list(reversed(items))
    if after:
        places = [place for place, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"There is no item '{after}'.", param="after")
        ordered = ordered[places[-1] + 1 :]  # of several with one id the last, so that pages come to an end
    data = ordered[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(ordered) > limit,
    }
