"""NATS goes away and comes back: what was accepted is answered, and nothing runs that was refused."""

import asyncio
from pathlib import Path

import pytest
from nats.js import JetStreamContext
from nats.js.errors import APIError

from support.nats import NatsServer
from support.stack import running


async def test_restart_of_nats_loses_nothing(nats_server: NatsServer) -> None:
    async with running(nats_server, max_concurrent_requests=4, max_queue_size=200, admission_patience=60) as stack:
        answers = [asyncio.create_task(stack.chat("[[tokens=10 delay_ms=5]]")) for _ in range(100)]
        await stack.taken(100)
        await asyncio.to_thread(nats_server.restart)
        texts = [(await answer).json()["choices"][0]["message"]["content"] for answer in answers]
        assert texts == ["t0 t1 t2 t3 t4 t5 t6 t7 t8 t9"] * 100
        await stack.idle()
        status = await stack.status()
        assert (status["total_queued"], status["total_processed"], status["total_failed"]) == (100, 100, 0)
        assert status["active_requests"] == 0


async def test_streams_go_on_over_a_restart_of_nats(nats_server: NatsServer) -> None:
    async with running(nats_server, max_concurrent_requests=8, max_queue_size=200) as stack:
        async with stack.frames("delta") as deltas:
            answers = [asyncio.create_task(stack.chat("[[tokens=60 delay_ms=50]]", stream=True)) for _ in range(8)]
            for _ in range(40):  # in the middle of the answers
                await anext(deltas)
        await asyncio.to_thread(nats_server.restart)
        expected = [f"t{n}" for n in range(60)]
        for answer in answers:
            response = await answer
            pieces = [part.split('"')[0] for part in response.text.split('"content":"')[1:]]
            assert "".join(pieces).split() == expected
            assert response.text.endswith("data: [DONE]\n\n")


async def test_refused_while_nats_is_away_never_runs(nats_server: NatsServer) -> None:
    async with running(nats_server, admission_patience=1) as stack:
        assert (await stack.chat("hi")).status_code == 200
        await asyncio.to_thread(nats_server.stop)
        refused = await stack.chat("[[tokens=7]]")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "queue_unavailable"
        await asyncio.to_thread(nats_server.start)
        await stack.beats(stack.apis[0])
        await stack.beats(stack.workers[0])
        assert await stack.connection.wait_connected(10)
        assert (await stack.chat("hi")).status_code == 200
        assert (await stack.status())["total_queued"] == 2
        assert await stack.state(refused.headers["x-request-id"]) is None


async def fill(js: JetStreamContext) -> None:
    """Publish until the server takes no more."""
    while True:
        await js.publish("junk", b"x" * 50_000)


async def test_full_disk_is_a_clear_503_and_passes(tmp_path: Path) -> None:
    limits = tmp_path / "limits.conf"
    # Named here too: a block in a file sets the server's own default over what the command line says.
    limits.write_text(f"jetstream {{ store_dir: '{tmp_path / 'store'}', max_file_store: 4MB }}\n")
    server = NatsServer(tmp_path / "store", "-c", str(limits))
    server.start()
    try:
        async with running(
            server, max_concurrent_requests=2, answer_log_bytes=1 << 20, file_store_bytes=1 << 20
        ) as stack:
            assert (await stack.chat("hi")).status_code == 200
            await stack.idle()
            js = stack.connection.jetstream
            await js.add_stream(name="JUNK", subjects=["junk"])
            with pytest.raises(APIError, match="insufficient"):
                await fill(js)
            refused = await stack.chat("[[tokens=3]]" + "y" * 50_000)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "queue_unavailable"
            assert "insufficient" in refused.json()["error"]["message"]
            await js.delete_stream("JUNK")
            assert (await stack.chat("hi")).status_code == 200
            await stack.idle()
            assert (await stack.status())["total_processed"] == 2
    finally:
        server.stop()
