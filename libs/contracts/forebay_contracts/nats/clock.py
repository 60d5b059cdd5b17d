"""The clock of the queue: that of NATS. All times that processes exchange are of this clock.

A process asks NATS for the time and goes by its own monotonic clock in between. So the clocks of the machines need not
agree, and a machine may set its clock at any time. In a cluster the leader of the stream INFERENCE answers, which also
drops expired messages.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Final

import orjson
from nats.errors import Error as NatsError

from forebay_contracts.nats.request_reply import Requests
from forebay_contracts.wire import names

MEASURE_INTERVAL_S: Final = 10.0
"""Pause between two measurements."""

MEASURE_TIMEOUT_S: Final = 1.0
"""A later answer says too little about the time."""

MAX_SKEW_S: Final = 1.0
"""The largest difference between this machine's clock and that of NATS that nobody is warned of."""

log = logging.getLogger(__name__)

_zero = time.time() - time.monotonic()
"""The time of the queue at which the monotonic clock was zero. Until it is measured: that of this machine."""


def now() -> float:
    """The time of the queue: seconds since the epoch, by the clock of NATS."""
    return _zero + time.monotonic()


def skew_s() -> float:
    """By how much this machine's clock is ahead of that of NATS."""
    return time.time() - now()


async def measure(requests: Requests) -> None:
    """Ask NATS for the time. Without an answer, or before there is a stream, nothing changes.

    The answer was made between question and arrival. If that agrees with what is known, it stays as it is, so that a
    slow answer moves nothing.
    """
    global _zero
    asked = time.monotonic()
    try:
        answer = await requests.request(f"$JS.API.STREAM.INFO.{names.STREAM}", timeout_s=MEASURE_TIMEOUT_S)
    except (NatsError, TimeoutError):
        return
    arrived = time.monotonic()
    if (text := orjson.loads(answer.data).get("ts")) is not None:
        made = datetime.fromisoformat(text).timestamp()
        if not made - arrived <= _zero <= made - asked:
            _zero = made - (asked + arrived) / 2


@contextlib.asynccontextmanager
async def followed(requests: Requests) -> AsyncIterator[None]:
    """Measure every MEASURE_INTERVAL_S as long as the block lasts. Warn once if the machine's clock is off."""
    task = asyncio.create_task(_follow(requests))
    try:
        yield
    finally:
        task.cancel()


async def _follow(requests: Requests) -> None:
    warned = False
    while True:
        await measure(requests)
        off = abs(skew_s()) > MAX_SKEW_S
        if off and not warned:
            log.warning(
                "[RequestQueue] this machine's clock is %.1f s %s that of NATS: the times of its log lines are off",
                abs(skew_s()),
                "ahead of" if skew_s() > 0 else "behind",
            )
        warned = off
        await asyncio.sleep(MEASURE_INTERVAL_S)
