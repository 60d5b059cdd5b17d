"""Blocking work on threads of its own, which never hold up the end of the process."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

T = TypeVar("T")

_DEEP_STACK_BYTES = 256 << 20
_stack_size = threading.Lock()


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


def on_deep_stack(work: Callable[[], T]) -> T:
    """The result of `work`, which may recurse deeply outside of Python. Of 256 MB, only what it uses takes memory."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:
            future.set_exception(exc)

    with _stack_size:
        before = threading.stack_size(_DEEP_STACK_BYTES)
        try:
            threading.Thread(target=run, daemon=True, name="deep-stack").start()
        finally:
            threading.stack_size(before)
    return future.result()
