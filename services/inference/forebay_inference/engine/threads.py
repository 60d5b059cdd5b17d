"""Blocking work beside the event loop that never holds up the end of the process."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

T = TypeVar("T")


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Run `work` in a daemon thread: neither loading nor a thread that it starts may hold up an exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            settle = partial(future.set_result, work())
        except Exception as exc:
            settle = partial(future.set_exception, exc)
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            loop.call_soon_threadsafe(lambda: future.done() or settle())

    threading.Thread(target=run, daemon=True, name="engine-work").start()
    return await future
