"""The `forebay` command as a user runs it: real processes, the simulated engine."""

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from support.stack import MODEL

START_TIMEOUT_S = 60
END_TIMEOUT_S = 30


@dataclass
class Ended:
    code: int | None
    stdout: str
    stderr: str

    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def error(self) -> str:
        """What follows the line that names the server."""
        return re.sub(r"\Aserver: .*\n", "", self.stderr)


def environment(data_dir: Path, **settings: object) -> dict[str, str]:
    values = {"DATA_DIR": data_dir, "DRAIN_TIMEOUT": 5, "ACK_WAIT": 2, "COLUMNS": 200} | settings
    return os.environ | {name.upper(): str(value) for name, value in values.items()}


async def launch(*arguments: str, env: dict[str, str], **pipes: Any) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "forebay_cli", *arguments, env=env, **{"stdout": pipe, "stderr": pipe} | pipes
    )


async def forebay(*arguments: str, data_dir: Path, given: str | None = None, **settings: object) -> Ended:
    """Run a command to its end."""
    return await run(*arguments, env=environment(data_dir, **settings), given=given)


async def run(*arguments: str, env: dict[str, str], given: str | None = None) -> Ended:
    """The same in an environment that is all given."""
    process = await launch(*arguments, env=env, stdin=asyncio.subprocess.PIPE)
    async with asyncio.timeout(START_TIMEOUT_S):
        stdout, stderr = await process.communicate((given or "").encode())
    return Ended(process.returncode, stdout.decode(), stderr.decode())


@dataclass
class Up:
    """A running `forebay up`."""

    process: asyncio.subprocess.Process
    data_dir: Path
    url: str = ""
    stderr: list[str] = field(default_factory=list)

    async def ended(self) -> Ended:
        """Wait for its end; what it said after the ready line."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        async with asyncio.timeout(END_TIMEOUT_S):
            stdout, stderr = await asyncio.gather(self.process.stdout.read(), self.process.stderr.read())
            await self.process.wait()
        return Ended(self.process.returncode, stdout.decode(), "".join(self.stderr) + stderr.decode())

    def children(self, name: str = "") -> list[psutil.Process]:
        """The processes below it whose command line holds `name`."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in below if name in " ".join(child.cmdline())]

    async def chat(self, text: str, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        async with httpx.AsyncClient(timeout=120) as client:
            return await client.post(
                f"{self.url}/v1/chat/completions",
                json={"model": MODEL, "messages": messages, **body},
            )


@contextlib.asynccontextmanager
async def up(data_dir: Path, *options: str, **settings: object) -> AsyncIterator[Up]:
    """A `forebay up` that is ready; killed at the end if it still runs."""
    arguments = ("up", "--engine", "simulated", "--port", "0", "--data-dir", str(data_dir), *options)
    process = await launch(*arguments, env=environment(data_dir, **settings))
    running = Up(process, data_dir)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            line = (await process.stdout.readline()).decode()
        ready = re.fullmatch(r"ready (http://127\.0\.0\.1:\d+)\n", line)
        if ready is None:
            pytest.fail(f"not ready: {line!r} {(await running.ended()).stderr}")
        running.url = ready[1]
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await running.ended()


async def settled(data_dir: Path) -> dict[str, Any]:
    """The status once all requests have ended: an answer reaches its client a moment before it is counted."""
    async with asyncio.timeout(60):
        while True:
            status: dict[str, Any] = (await forebay("status", "--json", data_dir=data_dir)).json()
            if status["active_requests"] == 0:
                return status
