"""An inference server as a process of the worker."""

import asyncio

import psutil

from forebay_inference.engine.served.process import ServerProcess


async def test_what_a_killed_server_started_ends_with_it() -> None:
    server = ServerProcess("server")
    await server.start(["sh", "-c", "sleep 100 & echo $!; exec sleep 100"], {})
    async with asyncio.timeout(20):
        while not server.last_lines:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        started = psutil.Process(int(server.last_lines[0]))
        assert server._process is not None
        server._process.kill()
        await server.ended(20)
        while started.is_running() and started.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert "SIGKILL" in (server.fault or "")
    await server.close()
