"""Shows the place of a request in the queue, as long as it waits."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import httpx

from forebay_cli import console
from forebay_cli.api_client import REQUEST_ID_HEADER, ApiFailure

EARLY: Final = {"Forebay-Stream": "early"}
"""Has the api send the request's id while it waits."""

LOOK_AFTER_S: Final = 0.5
"""Time until the first look, and between two."""

TIMEOUT_S: Final = 2.0


@contextlib.contextmanager
def shown(client: httpx.Client, response: httpx.Response) -> Iterator[Callable[[], None]]:
    """Show the place of the request behind `response` until the function is called that this gives."""
    progress, over = console.Progress(), threading.Event()

    def look() -> None:
        while not over.wait(LOOK_AFTER_S):
            # An answer that breaks off says so itself.
            with contextlib.suppress(ApiFailure, httpx.HTTPError, ValueError):
                path = f"queue/request/{response.headers.get(REQUEST_ID_HEADER)}"
                progress.show(described(client.get(path, timeout=TIMEOUT_S).json()))

    looking = threading.Thread(target=look, daemon=True)

    def stop() -> None:
        if not over.is_set():
            over.set()
            looking.join()
            progress.stop()

    looking.start()
    try:
        yield stop
    finally:
        stop()


def described(request: dict[str, Any]) -> str:
    """Where a request is, in a few words, of what the api says of it."""
    if request["status"] != "queued":
        return "running"
    position, wait_s = request.get("position"), request.get("estimated_wait_s")
    place = "waiting in the queue" if position is None else f"waiting: place {position} in the queue"
    return place if wait_s is None else f"{place}, about {wait_s:.0f} s"
