"""Three NATS servers, of which the leader dies under load."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.cluster import Cluster
from support.stack import Stack, running


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    started = await Cluster(tmp_path).start()
    try:
        yield started
    finally:
        await started.stop()


async def leader(stack: Stack) -> str:
    """The name of the stream's leader."""
    reply = await stack.connection.jetstream._api_request("$JS.API.STREAM.INFO.INFERENCE", timeout=5)
    name: str = reply["cluster"]["leader"]
    return name


async def test_everything_is_kept_three_times(cluster: Cluster) -> None:
    async with running(cluster, nats_replicas=3) as stack:
        assert (await stack.chat("hi")).status_code == 200
        for name in ("INFERENCE", "INFERENCE_COUNTERS", "KV_inference-requests"):
            info = await stack.connection.jetstream._api_request(f"$JS.API.STREAM.INFO.{name}", timeout=5)
            assert info["config"]["num_replicas"] == 3
            assert len(info["cluster"]["replicas"]) == 2


async def test_death_of_the_leader_loses_and_doubles_nothing(cluster: Cluster) -> None:
    limits = {"max_concurrent_requests": 32, "max_queue_size": 500}
    async with running(cluster, nats_replicas=3, **limits) as stack:
        first = [asyncio.create_task(stack.chat("[[tokens=10 delay_ms=20]]")) for _ in range(150)]
        await stack.apis[0].logged(r"queued for \S+ at 100")
        old = cluster.by_name(await leader(stack))
        await asyncio.to_thread(old.kill)
        second = [asyncio.create_task(stack.chat("[[tokens=10 delay_ms=20]]")) for _ in range(150)]
        answers = await asyncio.gather(*first, *second)
        assert [answer.status_code for answer in answers] == [200] * 300
        texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
        assert texts == {"t0 t1 t2 t3 t4 t5 t6 t7 t8 t9"}
        await stack.idle()
        status = await stack.status()
        assert (status["total_processed"], status["total_failed"]) == (300, 0)
