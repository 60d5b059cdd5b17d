"""What tests of the page do to the system behind it."""

import asyncio
import time
from typing import Any

from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus
from support.browser import Window
from support.stack import Stack

FOR_EVER = "[[tokens=2000 delay_ms=500]]"
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


async def newest_id(window: Window, status: str) -> str:
    """The id of a request that the page shows in this state."""
    row = window.page.locator("#requests tr", has=window.page.locator(f".state-{status}")).first
    await row.wait_for()
    return await row.locator("td.id").inner_text()


def load(stack: Stack, count: int, text: str) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(stack.chat(text)) for _ in range(count)]


async def leave(*sent: asyncio.Task[Any]) -> None:
    """The clients of these requests go away."""
    for task in sent:
        task.cancel()
    await asyncio.gather(*sent, return_exceptions=True)


async def heartbeat(stack: Stack, worker: str, model: str, status: WorkerStatus, *adapters: str) -> None:
    """Let the api hear of a worker."""
    now = time.time()
    given = {"id": worker, "model": model, "status": status, "adapters": adapters, "engine": HOSTILE}
    info = WorkerInfo(version="1", started_at=now, heartbeat_at=now, slots=1, **given)
    await (await stack.connection.jetstream.key_value("inference-workers")).put(worker, info.encode())
