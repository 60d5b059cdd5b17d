"""Admission and pull with 0 to 100,000 requests queued, beside an empty queue on a server of its own, in turns.

python tests/benchmarks/backlog.py [--quick]
"""

import asyncio
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import systems
from benchmarks.common import MODEL, log, memory_mb, part_main, ratios, spread
from forebay_contracts.nats import topology
from forebay_contracts.nats.connection import Connection, connect
from forebay_contracts.queueing.admission import JetStreamAdmission
from forebay_contracts.queueing.deliveries import JetStreamDeliveries
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire.request import CompletionType, InferenceRequest

BUDGET_S = 150
SAMPLES = 100
IN_FLIGHT = 200


def request() -> InferenceRequest:
    """A short chat."""
    now = time.time()
    return InferenceRequest(
        id=str(uuid.uuid4()),
        completion_type=CompletionType.CHAT,
        model=MODEL,
        created_at=now,
        deadline=now + 3000,
        reply_to="inference.replies.benchmark.0",
        messages=({"role": "user", "content": "[[tokens=5]]"},),
    )


class Queue(NamedTuple):
    """Both ends of it."""

    admission: JetStreamAdmission
    deliveries: JetStreamDeliveries


async def opened(url: str) -> tuple[Connection, Queue]:
    """A queue on a server, made."""
    limits = {"max_queue_size": 200_000, "max_concurrent_requests": 64, "default_model": MODEL, "request_timeout": 3600}
    settings = load(Settings, nats_url=url, _env_file=None, **limits)
    connection = await connect(settings, "forebay-benchmark")
    await topology.ensure(connection, settings, MODEL)
    return connection, Queue(JetStreamAdmission(connection), JetStreamDeliveries(connection, MODEL))


async def fill(queue: Queue, count: int) -> None:
    """Publish so many more."""
    left = iter(range(count))

    async def some() -> None:
        for _ in left:
            await queue.admission.publish(request())

    await asyncio.gather(*(some() for _ in range(IN_FLIGHT)))


async def sample(queue: Queue) -> tuple[float, float]:
    """Median ms of a publish, and of a pull; as many leave the queue as came."""
    published, pulled = [], []
    for _ in range(SAMPLES):
        one, began = request(), time.perf_counter()
        await queue.admission.publish(one)
        published.append(time.perf_counter() - began)
        began = time.perf_counter()
        delivery = await queue.deliveries.pull()
        pulled.append(time.perf_counter() - began)
        await delivery.ack()
    return 1000 * statistics.median(published), 1000 * statistics.median(pulled)


async def measure(quick: bool) -> dict[str, Any]:
    """All depths."""
    rounds, depths = (2, (0, 1000)) if quick else (5, (0, 1000, 10_000, 100_000))
    found: dict[str, Any] = {"rounds": rounds, "depths": {}}
    with systems.nats_server() as full, systems.nats_server() as empty:
        (full_connection, filled), (empty_connection, other) = await opened(full.url), await opened(empty.url)
        await sample(filled), await sample(other)
        depth = 0
        for goal in depths:
            await fill(filled, goal - depth)
            depth = goal
            rows = [(await sample(filled), await sample(other)) for _ in range(rounds)]
            entry: dict[str, Any] = {"nats_rss_mb": memory_mb(full.pid)["rss"]}
            for index, name in enumerate(("publish", "pull")):
                mine, theirs = [row[0][index] for row in rows], [row[1][index] for row in rows]
                entry[name] = {"ms": spread(mine), "empty_ms": spread(theirs), "ratio": ratios(mine, theirs)}
            found["depths"][str(goal)] = entry
            log(f"{goal} queued: {entry}")
        await filled.stop_pulling()
        await other.stop_pulling()
        await full_connection.close()
        await empty_connection.close()
    return found


if __name__ == "__main__":
    sys.exit(part_main("backlog", BUDGET_S, measure, __doc__ or ""))
