"""A webhook that the OpenAI SDK for Node verifies; the one for Python does it in `tests/integration`."""

import asyncio
import json
from pathlib import Path

import pytest

from support.nats import NatsServer
from support.receiver import SECRET
from support.stack import MODEL, running

pytestmark = [pytest.mark.clients, pytest.mark.timeout(300)]


async def test_the_openai_sdk_for_node_verifies_an_event(nats_server: NatsServer, node: Path, tmp_path: Path) -> None:
    receiver = await asyncio.create_subprocess_exec(
        "node", "webhook.js", SECRET, cwd=node, stdout=asyncio.subprocess.PIPE
    )
    assert receiver.stdout is not None
    try:
        url = (await receiver.stdout.readline()).decode().strip()
        file = tmp_path / "webhooks.toml"
        file.write_text(f'[node]\nurl = "{url}"\nsecret = "{SECRET}"\n')
        async with running(nats_server, webhooks_file=file) as stack:
            begun = await stack.openai().responses.create(model=MODEL, input="[[tokens=2]]", background=True)
            async with asyncio.timeout(30):
                event = json.loads(await receiver.stdout.readline())
            assert (event["type"], event["data"]) == ("response.completed", {"id": begun.id})
            assert await receiver.wait() == 0
    finally:
        if receiver.returncode is None:
            receiver.kill()
            await receiver.wait()
