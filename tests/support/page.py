"""What tests of the page do to the system behind it."""

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from playwright.async_api import Locator

from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus
from forebay_contracts.wire.state import RequestState, RequestStatus
from support.browser import Window
from support.stack import Stack

FOR_EVER = "[[tokens=2000 delay_ms=500]]"
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


async def newest_id(window: Window, status: str) -> str:
    """The id of a request that the view of requests shows in this state."""
    return await id_of(window.page.locator("#requests tr", has=window.page.locator(f".state-{status}")).first)


async def id_of(row: Locator) -> str:
    """The id of the request of a row."""
    await row.wait_for()
    found = await row.get_attribute("data-id")
    assert found
    return found


async def ids(window: Window) -> list[str]:
    """The ids of the requests that the view of requests shows."""
    found: list[str] = await window.page.evaluate(
        "[...document.querySelectorAll('#requests tr')].map(row => row.dataset.id)"
    )
    return found


def past(number: int, **fields: Any) -> RequestState:
    """A request that was queued so many seconds ago and took one."""
    now = time.time()
    at = now - number
    times = {"timestamp": at, "queued_at": at, "started_at": at + 0.25, "finished_at": at + 1, "deadline": at + 60}
    given = {"id": f"{number:08x}-0000-4000-8000-000000000000", "status": RequestStatus.COMPLETED, "worker": "gpu-1"}
    return RequestState(**{**given, **times, "completion_type": "chat", "model": "org/Model", "attempt": 1, **fields})


async def remember(stack: Stack, states: Iterable[RequestState]) -> None:
    """Write first states, many at once."""
    some = asyncio.Semaphore(64)

    async def write(state: RequestState) -> None:
        async with some:
            await stack.states.write(state, 0)

    await asyncio.gather(*map(write, states))


def load(stack: Stack, count: int, text: str) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(stack.chat(text)) for _ in range(count)]


async def leave(*sent: asyncio.Task[Any]) -> None:
    """The clients of these requests go away."""
    for task in sent:
        task.cancel()
    await asyncio.gather(*sent, return_exceptions=True)


async def heartbeat(stack: Stack, worker: str, model: str, status: WorkerStatus, *adapters: str) -> None:
    """Let the api hear of a worker, and again each second."""
    now = time.time()
    given = {"id": worker, "model": model, "status": status, "adapters": adapters, "engine": HOSTILE}
    info = WorkerInfo(version="1", started_at=now, heartbeat_at=now, slots=1, **given)
    bucket = await stack.connection.jetstream.key_value("inference-workers")

    async def beat() -> None:
        while True:
            await bucket.put(worker, info.encode())
            await asyncio.sleep(1)

    stack.played.append(asyncio.create_task(beat()))
