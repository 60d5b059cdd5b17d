"""The floor under the path: what NATS itself costs with the same client library, without HTTP and without us.

    python tests/benchmarks/floor.py NATS_URL IN_FLIGHT SECONDS

Publish to a file-stored WorkQueue stream, pull, three KV puts, reply, ack. Prints JSON as `driver.py` does. Both ends
are in this one process.
"""

import asyncio
import json
import sys
import time
from typing import Any

import nats
import psutil
import uvloop
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig, KeyValueConfig, RetentionPolicy, StreamConfig


async def floor(url: str, in_flight: int, seconds: float) -> dict[str, Any]:
    """Load for `seconds`; the figures."""
    client, worker = await nats.connect(url), await nats.connect(url)
    js, worker_js = client.jetstream(), worker.jetstream()
    await js.add_stream(StreamConfig(name="FLOOR", subjects=["floor"], retention=RetentionPolicy.WORK_QUEUE))
    states = await js.create_key_value(KeyValueConfig(bucket="floor"))
    worker_states = await worker_js.key_value("floor")
    waiting: dict[str, asyncio.Future[None]] = {}

    async def replied(msg: Msg) -> None:
        waiting.pop(msg.data.decode()).set_result(None)

    await client.subscribe("floor-replies", cb=replied)
    await worker_js.add_consumer("FLOOR", ConsumerConfig(durable_name="w", max_ack_pending=in_flight))

    async def slot() -> None:
        pull = await worker_js.pull_subscribe_bind("w", "FLOOR")
        while not over:
            try:
                (msg,) = await pull.fetch(1, timeout=1)
            except nats.errors.TimeoutError:
                continue
            key = msg.data.decode()
            await worker_states.put(key, b"processing")
            await worker.publish("floor-replies", msg.data)
            await worker_states.put(key, b"completed")
            await msg.ack()

    over = False
    latencies_s: list[float] = []

    async def ask(number: int) -> None:
        turn = 0
        while (began := time.perf_counter()) < until:
            key = f"{number}-{turn}"
            waiting[key] = asyncio.get_running_loop().create_future()
            await js.publish("floor", key.encode())
            putting = asyncio.create_task(states.put(key, b"queued"))
            if key in waiting:
                await waiting[key]
            latencies_s.append(time.perf_counter() - began)
            await putting
            turn += 1

    slots = [asyncio.create_task(slot()) for _ in range(in_flight)]
    used = sum(psutil.Process().cpu_times()[:2])
    began = time.perf_counter()
    until = began + seconds
    await asyncio.gather(*(ask(number) for number in range(in_flight)))
    took_s = time.perf_counter() - began
    used = sum(psutil.Process().cpu_times()[:2]) - used
    over = True
    await asyncio.gather(*slots)
    await js.delete_stream("FLOOR")
    await js.delete_key_value("floor")
    await client.close()
    await worker.close()
    latencies_s.sort()

    def percentile_ms(share: float) -> float:
        return round(1000 * latencies_s[min(int(len(latencies_s) * share), len(latencies_s) - 1)], 3)

    return {
        "requests": len(latencies_s),
        "requests_per_s": round(len(latencies_s) / took_s, 1),
        "p50_ms": percentile_ms(0.5),
        "p95_ms": percentile_ms(0.95),
        "p99_ms": percentile_ms(0.99),
        "client_cpu_s": round(used, 3),
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(floor(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))))
