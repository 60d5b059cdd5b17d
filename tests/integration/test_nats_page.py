"""docs/nats-cli.md: the requests behind its commands that change something, and what they answer."""

import asyncio
import base64
import json
from pathlib import Path

from support.nats import NatsServer
from support.stack import MODEL, running
from support.view import holds, idle, jetstream

CONSUMER = f"HuggingFaceTB-{MODEL}"
CONTEXT = Path(__file__).parents[2] / "deploy" / "nats" / "context.json"


async def test_pause_counter_purge_and_drain(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        assert (await stack.chat("[[tokens=1]]")).status_code == 200
        await idle(stack)
        total = await jetstream(
            stack, "STREAM.MSG.GET.INFERENCE_COUNTERS", {"last_by_subj": "inference.counters.completed"}
        )
        assert json.loads(base64.b64decode(total["message"]["data"])) == {"val": "1"}
        pause = f"CONSUMER.PAUSE.INFERENCE.{CONSUMER}"
        assert (await jetstream(stack, pause, {"pause_until": "2099-01-01T00:00:00Z"}))["paused"] is True
        waits = asyncio.create_task(stack.chat("[[tokens=1]]"))
        await holds(stack, 1)
        info = await jetstream(stack, f"CONSUMER.INFO.INFERENCE.{CONSUMER}")
        assert (info["num_pending"], info["num_ack_pending"]) == (1, 0)
        purged = await jetstream(stack, "STREAM.PURGE.INFERENCE", {"filter": f"inference.requests.{CONSUMER}.*"})
        assert (purged["success"], purged["purged"]) == (True, 1)
        waits.cancel()
        assert (await jetstream(stack, pause, {}))["paused"] is False
        drained = await stack.connection.client.request(f"inference.drain.{stack.workers[0].id}", b"", timeout=5)
        assert json.loads(drained.data) == {"draining": stack.workers[0].id, "running": 0}
        assert await stack.workers[0].ended() == 0


def test_the_context_can_be_read() -> None:
    assert json.loads(CONTEXT.read_text())["url"] == "nats://127.0.0.1:4222"
