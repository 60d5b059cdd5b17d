"""OpenAI's list objects."""

from collections.abc import Sequence
from typing import Any, Literal

from forebay_contracts.wire.errors import InvalidRequest


def page(items: Sequence[dict[str, Any]], limit: int, order: Literal["asc", "desc"], after: str) -> dict[str, Any]:
    """At most `limit` of `items`, behind the one whose id is `after`. `items` are oldest first.

    Raises:
        InvalidRequest: there is no item `after`.
    """
    ordered = list(items) if order == "asc" else list(reversed(items))
    if after:
        places = [place for place, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"There is no item '{after}'.", param="after")
        ordered = ordered[places[0] + 1 :]
    data = ordered[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(ordered) > limit,
    }
