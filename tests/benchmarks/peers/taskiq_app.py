"""`taskiq_app.py PORT`: taskiq behind the same HTTP; its worker is `taskiq worker benchmarks.peers.taskiq_app:broker`.

BENCH_BROKER is a `nats://` or a `redis://` URL. The NATS broker is the durable one (JetStream, pulled), its results
are in NATS's object store; Redis has stream and results. Results are asked for every 10 ms and not every 200, as is
taskiq's default, which would make every request last that long.
"""

import contextlib
import os
from collections.abc import AsyncIterator

from starlette.applications import Starlette

from benchmarks.peers import http_app, simulated

CHECK_INTERVAL_S = 0.01
_URL = os.environ["BENCH_BROKER"]

if _URL.startswith("nats"):
    from taskiq_nats import NATSObjectStoreResultBackend, PullBasedJetStreamBroker

    broker = PullBasedJetStreamBroker(_URL).with_result_backend(NATSObjectStoreResultBackend(_URL, keep_results=False))
else:
    from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

    broker = RedisStreamBroker(_URL).with_result_backend(RedisAsyncResultBackend(_URL, keep_results=False))


@broker.task("generate")
async def generate(body: str) -> str:
    """The engine's answer."""
    return await simulated.answer(body)


async def whole(body: bytes) -> str:
    """Kick the task, wait for its result."""
    task = await generate.kiq(body.decode())
    return (await task.wait_result(check_interval=CHECK_INTERVAL_S, timeout=60)).return_value


@contextlib.asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """Connected."""
    await broker.startup()
    yield
    await broker.shutdown()


if __name__ == "__main__":
    http_app.serve(http_app.port(), whole, lifespan=lifespan)
