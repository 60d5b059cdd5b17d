"""`celery_app.py PORT`: Celery on Redis behind the same HTTP; its worker is `celery -A benchmarks.peers.celery_app`.

BENCH_BROKER is a `redis://` URL, for messages and results. Celery's client blocks, so each request waits on a thread.
"""

import asyncio
import os

import anyio.to_thread
from celery import Celery

from benchmarks.peers import http_app, simulated

THREADS = 256
_URL = os.environ["BENCH_BROKER"]
_loop = asyncio.new_event_loop()

app = Celery("peer", broker=_URL, backend=_URL)
app.conf.update(result_backend_thread_safe=True, broker_pool_limit=THREADS, result_expires=600)
_limiter: anyio.CapacityLimiter | None = None


@app.task(name="generate")
def generate(body: str) -> str:
    """The engine's answer."""
    return _loop.run_until_complete(simulated.answer(body))


def _ask(body: str) -> str:
    result = generate.delay(body)
    text: str = result.get(timeout=60, interval=0.01)
    return text


async def whole(body: bytes) -> str:
    """Send the task, wait for its result."""
    global _limiter
    _limiter = _limiter or anyio.CapacityLimiter(THREADS)
    return await anyio.to_thread.run_sync(_ask, body.decode(), limiter=_limiter)


if __name__ == "__main__":
    http_app.serve(http_app.port(), whole)
