"""`forebay status --watch`, as a person and a program see it move."""

import asyncio
import json
import os
import pty
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.command import END_TIMEOUT_S, START_TIMEOUT_S, environment, forebay, launch
from support.nats import NatsServer
from support.stack import running as running_stack

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("usual_port_is_taken")]


async def test_a_watch_outlives_nats(tmp_path: Path, nats_server: NatsServer) -> None:
    async with running_stack(nats_server) as stack:
        env = environment(tmp_path, nats_url=nats_server.url)
        watch = await launch("status", "--watch", "--json", env=env)
        assert watch.stdout is not None

        async def until(seen: Callable[[dict[str, Any]], bool]) -> None:
            assert watch.stdout is not None
            async with asyncio.timeout(START_TIMEOUT_S):
                while not seen(json.loads(await watch.stdout.readline())):
                    pass

        def busy(slots: int) -> Callable[[dict[str, Any]], bool]:
            return lambda line: [worker["busy"] for worker in line.get("workers", ())] == [slots]

        await until(busy(0))
        runs = asyncio.create_task(stack.chat("[[tokens=60 delay_ms=100]]"))
        await until(busy(1))
        nats_server.stop()
        await until(lambda line: "error" in line)
        nats_server.start()
        await until(busy(1))
        assert (await runs).status_code == 200
        await until(busy(0))
        watch.send_signal(signal.SIGINT)
        async with asyncio.timeout(END_TIMEOUT_S):
            await watch.communicate()

        # Where there is no terminal, the tables come one after the other.
        plain = await launch("status", "--watch", env=env)
        assert plain.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            for _ in range(2):
                while stack.workers[0].id.encode() not in await plain.stdout.readline():
                    pass
        plain.send_signal(signal.SIGINT)
        async with asyncio.timeout(END_TIMEOUT_S):
            await plain.communicate()


async def test_a_watch_on_a_terminal_says_why_it_stands_still(tmp_path: Path, nats_server: NatsServer) -> None:
    env = environment(tmp_path, nats_url=nats_server.url, term="xterm", columns=80, lines=24)
    assert (await forebay("topology", "apply", data_dir=tmp_path, nats_url=nats_server.url)).code == 0
    ours, its = pty.openpty()
    watch = await launch("status", "--watch", env=env, stdout=its, stdin=its)
    os.close(its)
    seen = b""

    async def until(text: bytes) -> None:
        """Read what is drawn until `text` is."""
        nonlocal seen
        async with asyncio.timeout(START_TIMEOUT_S):
            while text not in seen:
                seen += await asyncio.to_thread(os.read, ours, 65_536)
        seen = b""

    try:
        await until(b"Workers: 0 of 0 ready")
        nats_server.stop()
        await until(b"NATS did not answer")
        nats_server.start()
        await until(b"\x1b[2K\x1b[1mWorkers: 0 of 0 ready")  # at the top again, where the reason was
    finally:
        watch.kill()
        await watch.communicate()
        os.close(ours)
