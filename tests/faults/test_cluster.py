"""Three NATS servers, of which the leader dies under load."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forebay_contracts.nats.connection import connected
from forebay_contracts.settings import Settings, load
from support.cluster import Cluster
from support.nats import flushed
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


async def test_a_request_that_the_cluster_is_still_agreeing_on_is_waited_for(cluster: Cluster) -> None:
    async with running(cluster, apis=0, nats_replicas=3) as stack:
        head = cluster.by_name(await leader(stack))
        await stack.api(nats_url=head.url)
        async with connected(load(Settings, nats_url=head.url, _env_file=None), "test") as connection:
            tries = await connection.client.subscribe("inference.requests.>")
            await flushed(connection.client)
            followers = [server.pid for server in cluster.servers if server is not head]
            for pid in followers:
                os.kill(pid, signal.SIGSTOP)
            try:
                asked = asyncio.create_task(stack.chat("hi"))
                # The second is refused as one that is being stored already.
                for _ in range(3):
                    await tries.next_msg(timeout=10)
            finally:
                for pid in followers:
                    os.kill(pid, signal.SIGCONT)
            answer = await asked
            assert answer.status_code == 200, answer.text


async def test_death_of_the_leader_loses_and_doubles_nothing(cluster: Cluster) -> None:
    # How long an election takes is the machine's to say.
    limits = {"max_concurrent_requests": 32, "max_queue_size": 500, "admission_patience": 60}
    async with running(cluster, nats_replicas=3, **limits) as stack:
        first = [asyncio.create_task(stack.chat("[[tokens=10 delay_ms=20]]")) for _ in range(150)]
        await stack.taken(100)
        old = cluster.by_name(await leader(stack))
        await asyncio.to_thread(old.kill)
        second = [asyncio.create_task(stack.chat("[[tokens=10 delay_ms=20]]")) for _ in range(150)]
        answers = await asyncio.gather(*first, *second)
        assert [answer.text for answer in answers if answer.status_code != 200] == []
        texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
        assert texts == {"t0 t1 t2 t3 t4 t5 t6 t7 t8 t9"}
        await stack.idle()
        status = await stack.status()
        assert (status["total_processed"], status["total_failed"]) == (300, 0)
