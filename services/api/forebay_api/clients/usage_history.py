"""Of the counters of usage, of each day that is over, the last increment alone is kept: it has the sum.

NATS recognises a repeated count by the increments before it, so a day keeps them until it is over. They take a thousand
times the place of the sums, and would leave it for days, not for USAGE_DAYS.
"""

import asyncio
import json
import logging
import random
from typing import Final

from nats.errors import Error as NatsError

from forebay_contracts.nats import clock
from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.usage import DAY_S, day_of
from forebay_contracts.wire import names

LATE_S: Final = 600.0
"""How long after its end a day may still be counted."""

SPREAD_S: Final = 60.0
"""Apis begin within this time, so that the first one does the work."""

PURGE_TIMEOUT_S: Final = 5.0
"""How long NATS may take for one counter."""

log = logging.getLogger(__name__)


async def follow(connection: Connection) -> None:
    """Thin out now, and after the end of each day."""
    while True:
        await asyncio.sleep(random.uniform(0, SPREAD_S))
        try:
            await thin_out(connection)
        except (NatsError, TimeoutError) as exc:
            log.info("[RequestQueue] the usage of past days is not thinned out: %r", exc)
        await asyncio.sleep(DAY_S - clock.now() % DAY_S + LATE_S)


async def thin_out(connection: Connection) -> None:
    """Keep one increment of each counter of the days that are over. Raises nats.errors.Error, TimeoutError."""
    today = day_of(clock.now() - LATE_S)
    info = await connection.jetstream.stream_info(names.USAGE, subjects_filter=names.USAGE_SUBJECTS)
    for counter, increments in (info.state.subjects or {}).items():
        if increments > 1 and names.usage_of(counter)[0] < today:
            order = json.dumps({"filter": counter, "keep": 1}).encode()
            subject = f"$JS.API.STREAM.PURGE.{names.USAGE}"
            await connection.requests.request(subject, order, timeout_s=PURGE_TIMEOUT_S)
