"""Reads a stream by batched direct gets (NATS ADR-31), without a consumer.

A user that may only read may not make consumers, since a consumer can deliver to any subject of its account.
"""

import json
from collections.abc import Sequence
from typing import Any

from nats.aio.msg import Msg
from nats.js.errors import NotFoundError

from forebay_contracts.nats.connection import Connection

BATCH = 1_000
"""Most messages of one answer; of one by subjects NATS allows 1,024."""

READ_TIMEOUT_S = 5.0
"""How long the next message may take."""

_END = "204"
_NOTHING = "404"


async def messages(
    connection: Connection, stream: str, subjects: str, first: int = 1, most: int | None = None
) -> list[Msg]:
    """The messages of `stream` on `subjects` from sequence `first` on, oldest first, each with its headers.

    With `most`, only so many.

    Raises:
        NotFoundError: there is no such stream.
        nats.errors.Error, TimeoutError: NATS does not answer.
    """
    return await _read(connection, stream, {"next_by_subj": subjects}, first, most)


async def last_messages(connection: Connection, stream: str, subjects: Sequence[str]) -> list[Msg]:
    """The last message of `stream` on each of `subjects`, oldest first, each with its headers. Raises as `messages`."""
    found = []
    for start in range(0, len(subjects), BATCH):
        found += await _read(connection, stream, {"multi_last": subjects[start : start + BATCH]}, 1, None)
    return found


async def _read(connection: Connection, stream: str, wanted: dict[str, Any], first: int, most: int | None) -> list[Msg]:
    client, found = connection.client, list[Msg]()
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    try:
        while True:
            batch = BATCH if most is None else min(BATCH, most - len(found))
            order = {"seq": first, "batch": batch, **wanted}
            await client.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(order).encode(), reply=inbox)
            while True:
                msg = await subscription.next_msg(timeout=READ_TIMEOUT_S)
                headers = msg.headers or {}
                if (status := headers.get("Status")) is None:
                    found.append(msg)
                    continue
                if len(found) == most:
                    return found
                if status == _END and int(headers["Nats-Num-Pending"]) > 0:
                    first = int(headers["Nats-Last-Sequence"]) + 1
                    break
                if status in (_END, _NOTHING):
                    return found
                raise NotFoundError(description=f"stream {stream}: {status} {headers.get('Description')}")
    finally:
        await subscription.unsubscribe()
