"""deploy/nats/forebay.conf on three servers: what crosses accounts crosses routes as well, also when a server dies."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.secured import ClusteredSite, running
from support.stack import MODEL


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[ClusteredSite]:
    site = ClusteredSite(tmp_path / "site")
    await site.cluster.start()
    try:
        yield site
    finally:
        await site.cluster.stop()


async def test_a_stream_and_a_backlog_outlive_a_worker_and_a_server(site: ClusteredSite) -> None:
    # How long an election takes is the machine's to say.
    limits = {"max_concurrent_requests": 8, "max_queue_size": 200, "nats_replicas": 3, "admission_patience": 60}
    async with running(site, apis=2, workers=2, **limits) as stack:
        stream = await stack.openai().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "[[tokens=60 delay_ms=50]]"}], stream=True
        )
        text, waiting = "", []
        stored = await stack.openai(0).responses.create(model=MODEL, input="[[tokens=60 delay_ms=50]]", background=True)
        async for chunk in stream:
            if not waiting:
                waiting = [
                    asyncio.create_task(stack.chat("[[tokens=5 delay_ms=20]]", api=number % 2)) for number in range(60)
                ]
                await stack.workers[0].kill()
                leader = (await stack.connection.jetstream.stream_info("INFERENCE")).cluster.leader
                await asyncio.to_thread(site.cluster.by_name(leader).kill)
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        assert text == " ".join(f"t{number}" for number in range(60))
        answers = await asyncio.gather(*waiting)
        assert [answer.text for answer in answers if answer.status_code != 200] == []
        events = await stack.openai(1).responses.retrieve(stored.id, stream=True)
        assert [event.response.output_text async for event in events if event.type == "response.completed"] == [text]
        await stack.idle()
        status = await stack.status()
        assert (status["total_processed"], status["total_failed"]) == (62, 0)
    assert not [line for server in site.cluster.servers for line in server.log if "Violation" in line]
